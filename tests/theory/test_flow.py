"""The flow against the theory: w₊∘w₋ = α_GR², and the end minimizes the potential. Fast flows against slow."""

import math

import pytest
import torch
from torch import tensor

from gradreg.functional import Scheme, regularized_gradient
from gradreg.theory import DiagonalNetwork, flow, flows, minimize_potential, moments, potential, sparse_regression
from gradreg.theory.flow import regularized_field

CENTERED = sparse_regression(6, 12, 2, seed=1)
SHIFTED = sparse_regression(6, 12, 2, shift=3.0, scale=2.0, noise=0.1, seed=2)
FOURTH = Scheme("fourth", ((1.0, 2 / 3), (-1.0, -2 / 3), (2.0, -1 / 12), (-2.0, 1 / 12)))
METHODS = [
    *((scheme, epsilon) for scheme in ("forward", "backward", "central", FOURTH) for epsilon in (0.01, 0.05, 0.2)),
    ("exact", None),
]
NAMES = [f"{scheme if isinstance(scheme, str) else scheme.name}-{epsilon}" for scheme, epsilon in METHODS]
every_method = pytest.mark.parametrize(("scheme", "epsilon"), METHODS, ids=NAMES)
both_modes = pytest.mark.parametrize("per_sample", [False, True], ids=["full-batch", "per-sample"])
SETTINGS = [(CENTERED, 0.3, 0.2), (SHIFTED, 0.1, 0.01)]  # data, α, γ


def end_of(data, alpha, gamma, scheme, epsilon, per_sample, **options):
    return flow(
        data.X, data.y, alpha=alpha, gamma=gamma, epsilon=epsilon, scheme=scheme, per_sample=per_sample, **options
    )


@both_modes
@pytest.mark.parametrize(("data", "alpha", "gamma"), SETTINGS, ids=["centered", "shifted"])
@every_method
def test_the_theory_holds_for_every_scheme_and_epsilon(data, alpha, gamma, scheme, epsilon, per_sample):
    end = end_of(data, alpha, gamma, scheme, epsilon, per_sample)
    assert end.converged, end.reason
    assert (end.alpha_gr / alpha - 1).abs().max() > 1e-3  # regularization did something
    torch.testing.assert_close(end.w_plus * end.w_minus, end.alpha_gr**2, rtol=0, atol=1e-8)
    expected = minimize_potential(data.X, data.y, end.alpha_gr)
    torch.testing.assert_close(end.beta, expected, rtol=0, atol=1e-6)


@both_modes
@pytest.mark.parametrize(("data", "alpha", "gamma"), SETTINGS, ids=["centered", "shifted"])
def test_the_batched_flow_equals_the_flow_one_at_a_time(data, alpha, gamma, per_sample):
    methods = METHODS[::3]
    schemes, epsilons = zip(*methods)
    ends = flows(
        data.X, data.y, alpha=alpha, gamma=gamma, epsilon=epsilons, scheme=schemes, per_sample=per_sample, accuracy=1e-9
    )
    assert ends.converged.all(), ends.reasons
    for k, (scheme, epsilon) in enumerate(methods):
        one = end_of(data, alpha, gamma, scheme, epsilon, per_sample)
        for name in ("beta", "w_plus", "w_minus", "alpha_gr"):
            torch.testing.assert_close(getattr(ends, name)[k], getattr(one, name), rtol=0, atol=1e-7)


def test_a_wrong_alpha_gr_is_noticed():
    """The agreement is not an accident of loose tolerances: the solution of plain descent is far from it."""
    end = end_of(SHIFTED, 0.1, 0.01, "forward", 0.05, False)
    plain = minimize_potential(SHIFTED.X, SHIFTED.y, 0.1)
    assert (end.beta - plain).abs().max() > 1e-2
    assert (end.w_plus * end.w_minus - 0.01).abs().max() > 1e-3


def test_without_penalty_alpha_gr_is_alpha():
    scale = torch.linspace(0.1, 0.4, 12, dtype=torch.float64)
    end = flow(CENTERED.X, CENTERED.y, alpha=scale, gamma=0.0)
    torch.testing.assert_close(end.alpha_gr, scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(end.beta, minimize_potential(CENTERED.X, CENTERED.y, scale), rtol=0, atol=1e-6)
    together = flows(CENTERED.X, CENTERED.y, alpha=[scale, 0.3], gamma=0.0)
    torch.testing.assert_close(together.beta[0], end.beta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("data", [CENTERED, SHIFTED], ids=["centered", "shifted"])
def test_a_larger_ascent_step_shrinks_the_mean_scale(data):
    """Mean α_GR: F-GR with a large ε < F-GR with a small one < DB < B-GR."""
    gamma = 0.2 if data is CENTERED else 0.01
    ends = flows(
        data.X, data.y, alpha=0.1, gamma=gamma, epsilon=[0.05, 0.01, None, 0.05],
        scheme=["forward", "forward", "exact", "backward"],
    )  # fmt: skip
    means = ends.alpha_gr.mean(1).tolist()
    assert ends.converged.all()
    assert means == sorted(means)
    assert means[-1] < 0.1


@pytest.mark.parametrize("per_sample", [False, True])
@every_method
def test_the_field_is_the_regularized_gradient_by_autograd(scheme, epsilon, per_sample):
    data, d = SHIFTED, 12
    torch.manual_seed(0)
    state = torch.rand(3 * d, dtype=torch.float64)
    field = regularized_field(data.X, data.y, 0.3, epsilon or 1.0, scheme_of(scheme), per_sample)
    found = torch.as_tensor(field(state.numpy()))[: 2 * d]
    groups = [(data.X[i : i + 1], data.y[i : i + 1]) for i in range(6)] if per_sample else [(data.X, data.y)]
    point = [state[:d], state[d : 2 * d]]

    def loss_of(X, y):
        return lambda w: ((X @ (w[0] ** 2 - w[1] ** 2) - y) ** 2).sum() / (4 * len(y))

    each = [torch.cat(regularized_gradient(loss_of(*g), point, 0.3, epsilon, scheme=scheme)) for g in groups]
    torch.testing.assert_close(-found, torch.stack(each).mean(0))


def scheme_of(scheme):
    from gradreg.functional.schemes import resolve_scheme

    return resolve_scheme(scheme)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("forward", (0.1, 0.01)),
        ("backward", (-0.1, 0.01)),
        ("central", (0.0, 0.01)),
        ("exact", (0.0, 0.0)),
        # ω s² and ω s³ of a fourth-order stencil: 0, and 2/3 + 2/3 − 8/12 − 8/12 = 0
        (FOURTH, (0.0, 0.0)),
    ],
    ids=["forward", "backward", "central", "exact", "fourth"],
)
def test_moments(scheme, expected):
    assert moments(scheme, 0.1) == pytest.approx(expected, abs=1e-15)


# The potential.


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 10.0])
def test_the_gradient_of_the_potential_is_arcsinh(alpha):
    beta = tensor([-2.0, 0.0, 1e-4, 3.0], dtype=torch.float64, requires_grad=True)
    potential(beta, alpha).backward()
    torch.testing.assert_close(beta.grad, torch.asinh(beta / (2 * alpha**2)).detach())


def test_the_potential_is_the_formula_of_the_paper():
    beta, a = tensor([-2.0, 0.5, 3.0], dtype=torch.float64), tensor([0.3, 0.5, 0.7], dtype=torch.float64)
    phi = (beta * torch.asinh(beta / (2 * a**2)) - (beta**2 + 4 * a**4).sqrt()).sum()
    at_zero = -(2 * a**2).sum()
    torch.testing.assert_close(potential(beta, a), phi - at_zero)


def test_a_large_scale_gives_the_euclidean_norm_with_error_of_order_alpha_to_the_minus_four():
    beta = tensor([3.0, -4.0, 1.0], dtype=torch.float64)
    coarse, fine = (abs(4 * a**2 * potential(beta, a) / 26 - 1) for a in (10.0, 20.0))
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.1)


def test_a_small_scale_gives_the_absolute_norm():
    """φ_a / log(1/a²) → ‖β‖₁, with an error that falls as 1/log(1/a²)."""
    beta = tensor([3.0, -4.0, 1.0], dtype=torch.float64)
    coarse, fine = (abs(potential(beta, 10.0**-k) / (2 * k * math.log(10)) - 8).item() for k in (20, 40))
    assert fine < 0.05
    assert coarse / fine == pytest.approx(2, rel=1e-3)


def test_the_lazy_limit_is_the_solution_of_least_norm():
    expected = torch.linalg.pinv(CENTERED.X) @ CENTERED.y
    found = minimize_potential(CENTERED.X, CENTERED.y, 100.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_rich_limit_is_basis_pursuit():
    """Against a linear program: minimize Σ(u + v) with X(u − v) = y, u, v ≥ 0."""
    from scipy.optimize import linprog

    data = sparse_regression(8, 16, 4, noise=0.1, seed=3)
    program = linprog([1.0] * 32, A_eq=torch.cat([data.X, -data.X], 1).numpy(), b_eq=data.y.numpy())
    found = minimize_potential(data.X, data.y, 1e-30)
    assert found.abs().sum().item() == pytest.approx(program.fun, rel=1e-6)


def test_the_minimizer_fits_and_no_other_solution_is_below():
    data = SHIFTED
    scale = torch.linspace(0.05, 1.0, 12, dtype=torch.float64)
    best = minimize_potential(data.X, data.y, scale)
    torch.testing.assert_close(data.X @ best, data.y, rtol=0, atol=1e-9)
    kernel = torch.linalg.svd(data.X).Vh[6:]  # directions that X does not see
    for direction in torch.cat([kernel, -kernel]):
        assert potential(best + 1e-2 * direction, scale) > potential(best, scale)


# The data.


def test_the_test_error_is_the_expected_one():
    data = sparse_regression(5, 9, 3, shift=2.0, scale=1.5)
    beta = torch.linspace(-0.5, 0.5, 9, dtype=torch.float64)
    fresh = sparse_regression(400_000, 9, 3, shift=2.0, scale=1.5, seed=7).X
    measured = (fresh @ (beta - data.beta)).square().mean() / (fresh @ data.beta).var()
    assert data.test_error(beta).item() == pytest.approx(measured.item(), rel=1e-2)


def test_a_seed_decides_the_data_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    first, again, other = (sparse_regression(5, 9, 2, noise=0.1, seed=s) for s in (4, 4, 5))
    assert torch.equal(first.X, again.X)
    assert torch.equal(first.y, again.y)
    assert not torch.equal(first.X, other.X)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.is_active.tolist() == [True] * 2 + [False] * 7


def test_noise_has_its_size():
    data = sparse_regression(20_000, 3, 1, noise=0.5)
    assert (data.y - data.X @ data.beta).std().item() == pytest.approx(0.5, rel=0.03)


# What does not converge says so.


def test_a_flow_that_runs_out_of_time_says_so():
    end = end_of(CENTERED, 0.3, 0.2, "forward", 0.05, False, max_time=1.0)
    assert not end.converged
    assert "max_time = 1 reached" in end.reason
    assert end.time == 1.0
    # The invariant holds on the way too.
    torch.testing.assert_close(end.w_plus * end.w_minus, end.alpha_gr**2, rtol=0, atol=1e-8)
    together = flows(CENTERED.X, CENTERED.y, alpha=0.3, gamma=0.2, epsilon=0.05, max_time=1.0)
    torch.testing.assert_close(together.w_plus[0], end.w_plus, rtol=0, atol=1e-7)
    assert not together.converged.any()
    assert together.reasons == ("max_time = 1 reached",)


def test_a_flow_that_runs_out_of_work_says_so():
    end = end_of(CENTERED, 0.3, 0.2, "forward", 0.05, False, max_evaluations=50)
    assert not end.converged
    assert "max_evaluations = 50 reached" in end.reason
    assert end.time > 0
    together = flows(CENTERED.X, CENTERED.y, alpha=0.3, gamma=[0.2, 0.0], epsilon=0.05, max_steps=3)
    assert together.reasons == ("max_steps = 3 reached",) * 2


TOO_STRONG = {"alpha": 0.1, "gamma": 10.0, "epsilon": 1.0}


def test_a_flow_that_collapses_says_so():
    """γ‖∇L‖²/2 is zero at w = 0 too: a strong penalty leads to that saddle, where Xβ ≠ y."""
    end = flow(SHIFTED.X, SHIFTED.y, **TOO_STRONG, max_time=1e3)
    assert not end.converged
    assert "max_time = 1000 reached" in end.reason
    assert "saddle w = 0" in end.reason
    assert end.train_loss == pytest.approx((SHIFTED.y.square().sum() / 24).item())
    together = flows(SHIFTED.X, SHIFTED.y, **TOO_STRONG, max_steps=500)
    assert not together.converged.any()
    assert "saddle w = 0" in together.reasons[0]


def test_one_that_does_not_converge_does_not_spoil_the_others():
    alone = flows(SHIFTED.X, SHIFTED.y, alpha=0.1, gamma=0.01, epsilon=0.01)
    together = flows(SHIFTED.X, SHIFTED.y, alpha=0.1, gamma=[10.0, 0.01], epsilon=[1.0, 0.01], max_steps=500)
    assert together.converged.tolist() == [False, True]
    torch.testing.assert_close(together.beta[1], alone.beta[0], rtol=0, atol=1e-10)


def test_data_that_zero_fits_converge_at_the_start():
    end = flow(CENTERED.X, 0 * CENTERED.y, alpha=0.3, gamma=0.1, epsilon=0.1)
    assert end.converged
    assert end.beta.tolist() == [0.0] * 12
    assert flows(CENTERED.X, 0 * CENTERED.y, alpha=0.3, gamma=0.1, epsilon=0.1).converged.all()


# Bad input, refused before anything is integrated.

X, y = CENTERED.X, CENTERED.y
GOOD = {"alpha": 0.3, "gamma": 0.1, "epsilon": 0.1}


@pytest.mark.parametrize("run", [flow, flows])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": y[:-1]}, r"X and y must be of shapes \(n, d\) and \(n,\).*got \(6, 12\) and \(5,\)"),
        ({"X": X[0]}, r"X and y must be of shapes"),
        ({"X": X[:, :6]}, r"flows? needs fewer rows than columns, n < d, got n = 6 and d = 6"),
        ({"X": X * math.nan}, "X and y must be finite"),
        ({"y": y * math.inf}, "X and y must be finite"),
        ({"X": X[[0, 0, 1, 2, 3, 4]], "y": y + torch.arange(6)}, "rows of X are linearly dependent"),
        ({"alpha": 0.0}, "alpha must be finite and > 0"),
        ({"alpha": -0.1}, "alpha must be finite and > 0"),
        ({"gamma": -1.0}, "gamma must be a finite number ≥ 0, got -1.0"),
        ({"gamma": math.nan}, "gamma must be a finite number ≥ 0, got nan"),
        ({"epsilon": 0.0}, r"epsilon must be a finite number > 0 with scheme='forward', got 0.0. .*\"exact\""),
        ({"epsilon": None}, "epsilon must be a finite number > 0 .*got None"),
        ({"epsilon": 0.0, "scheme": "central"}, "epsilon must be .*'central', got 0.0"),
        ({"scheme": "sideways"}, "scheme must be one of"),
        ({"max_time": 0.0}, "max_time must be > 0, got 0.0"),
        ({"tolerance": -1.0}, "tolerance must be > 0"),
    ],
)
def test_bad_input(run, change, message):
    with pytest.raises(ValueError, match=message):
        run(**{"X": X, "y": y, **GOOD, **change})


def test_bad_lists():
    with pytest.raises(ValueError, match="lists of one length"):
        flows(X, y, alpha=0.3, gamma=[0.1, 0.2], epsilon=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="lists of one length"):
        flows(X, y, alpha=0.3, gamma=[], epsilon=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow(X, y, **{**GOOD, "alpha": torch.ones(3)}), r"alpha must be a number or of shape \(12,\)"),
        (lambda: minimize_potential(X[:, :5], y, 0.1), "minimize_potential needs fewer rows than columns"),
        (lambda: minimize_potential(X, y, 0.0), "alpha must be finite and > 0"),
        (lambda: potential(y, -1.0), "alpha must be finite and > 0"),
        (lambda: DiagonalNetwork(0, 0.1), "d must be at least 1"),
        (lambda: DiagonalNetwork(3, math.inf), "alpha must be finite"),
        (lambda: sparse_regression(5, 9, 0), "1 ≤ num_active ≤ d"),
        (lambda: sparse_regression(5, 9, 1, scale=0.0), "scale > 0"),
        (lambda: sparse_regression(5, 9, 1, noise=-1.0), "noise ≥ 0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
