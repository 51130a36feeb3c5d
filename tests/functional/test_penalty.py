"""The mathematics: R = ½‖∇L‖², its gradient by every scheme, and the relations between methods."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, hessian, vmap

from gradreg.functional import (
    Adaptive,
    Gradient,
    Normalized,
    Scheme,
    directional_derivative,
    penalty,
    penalty_gradient,
    regularized_gradient,
)

# torch.func.hessian imports torch.jit, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
STENCILS = ["forward", "backward", "central"]
SCHEMES = [*STENCILS, "exact"]
ASCENTS = ["gradient", "normalized", "adaptive"]
X, Y = (t.double() for t in (torch.linspace(-1, 1, 24).view(6, 4), torch.linspace(0, 1, 6)))


def loss(theta):
    """Smooth and not quadratic."""
    return ((X @ theta).tanh() - Y).square().mean()


def theta():
    return torch.tensor([0.3, -0.5, 0.2, 0.7], dtype=torch.float64)


def test_penalty_is_half_the_squared_gradient():
    torch.testing.assert_close(penalty(loss, theta()), grad(loss)(theta()).square().sum() / 2)


def test_exact_gradient_is_the_hessian_times_the_gradient():
    expected = hessian(loss)(theta()) @ grad(loss)(theta())
    torch.testing.assert_close(penalty_gradient(loss, theta()), expected)
    torch.testing.assert_close(grad(lambda p: penalty(loss, p))(theta()), expected)


def test_exact_gradient_along_the_normalized_gradient_is_that_of_the_norm():
    expected = grad(lambda p: grad(loss)(p).norm())(theta())
    torch.testing.assert_close(penalty_gradient(loss, theta(), ascent="normalized"), expected)


entries = st.floats(-2, 2, allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(
    matrix=st.lists(entries, min_size=9, max_size=9),
    point=st.lists(entries, min_size=3, max_size=3),
    epsilon=st.floats(1e-2, 1e2),
    scheme=st.sampled_from(STENCILS),
    ascent=st.sampled_from(ASCENTS),
)
def test_on_a_quadratic_every_scheme_is_exact_at_any_epsilon(matrix, point, epsilon, scheme, ascent):
    a = torch.tensor(matrix, dtype=torch.float64).view(3, 3)
    p = torch.tensor(point, dtype=torch.float64)

    def quadratic(p):
        return p @ (a + a.T) @ p / 2 + p.sum()

    exact = penalty_gradient(quadratic, p, ascent=ascent)
    found = penalty_gradient(quadratic, p, scheme=scheme, epsilon=epsilon, ascent=ascent)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_the_error_has_the_promised_order(scheme, order, ascent):
    exact = penalty_gradient(loss, theta(), ascent=ascent)
    coarse, fine = (
        (penalty_gradient(loss, theta(), scheme=scheme, epsilon=e, ascent=ascent) - exact).norm() for e in (2e-2, 1e-2)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_a_scheme_of_ones_own():
    """Four-point stencil, order 4: [8 (g₁ − g₋₁) − (g₂ − g₋₂)] / 12ε."""
    scheme = Scheme("fourth", ((1.0, 2 / 3), (-1.0, -2 / 3), (2.0, -1 / 12), (-2.0, 1 / 12)))
    exact = penalty_gradient(loss, theta())
    coarse, fine = ((penalty_gradient(loss, theta(), scheme=scheme, epsilon=e) - exact).norm() for e in (0.8, 0.4))
    assert math.log2(coarse / fine) == pytest.approx(4, abs=0.3)


def test_backward_is_forward_with_the_other_sign():
    d, g, e = grad(loss)(theta()), grad(loss), 0.1
    expected = (g(theta()) - g(theta() - e * d)) / e
    torch.testing.assert_close(penalty_gradient(loss, theta(), scheme="backward", epsilon=e), expected)


def test_equal_gamma_and_epsilon_are_unnormalized_sam():
    g = grad(loss)
    expected = g(theta() + 0.1 * g(theta()))
    torch.testing.assert_close(regularized_gradient(loss, theta(), 0.1, 0.1), expected)


def test_normalized_is_sam():
    g = grad(loss)
    expected = g(theta() + 0.1 * g(theta()) / g(theta()).norm())
    torch.testing.assert_close(regularized_gradient(loss, theta(), 0.1, 0.1, ascent="normalized"), expected)


def test_normalized_with_a_smaller_gamma_is_gnp():
    """(1 − α) ∇L(θ) + α ∇L(θ + r ∇L/‖∇L‖) with α = γ/r."""
    g, radius, alpha = grad(loss), 0.1, 0.8
    second = g(theta() + radius * g(theta()) / g(theta()).norm())
    found = regularized_gradient(loss, theta(), alpha * radius, radius, ascent="normalized")
    torch.testing.assert_close(found, (1 - alpha) * g(theta()) + alpha * second)


def test_adaptive_is_asam():
    """d = T² g / ‖T g‖, T = |θ| + η."""
    g, rho, t = grad(loss), 0.1, theta().abs() + 0.01
    direction = t**2 * g(theta()) / (t * g(theta())).norm()
    found = regularized_gradient(loss, theta(), rho, rho, ascent="adaptive")
    torch.testing.assert_close(found, g(theta() + rho * direction))


def test_adaptive_does_not_see_a_rescaling_of_the_weights():
    """L(θ) = f(Aθ) with A diagonal: with η = 0 the displaced point A(θ + εd) is that of A = 1."""
    scales = torch.tensor([2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    ascent = Adaptive(eta=0.0)
    plain = regularized_gradient(loss, theta(), 0.1, 0.1, ascent=ascent)
    scaled = regularized_gradient(lambda p: loss(scales * p), theta() / scales, 0.1, 0.1, ascent=ascent)
    torch.testing.assert_close(scaled, scales * plain)


def test_adaptive_can_leave_vectors_alone():
    params, grads = [torch.ones(2, 2), torch.ones(2)], [torch.full((2, 2), 3.0), torch.full((2,), 4.0)]
    vectors, _ = Adaptive(eta=1.0, weights_only=True)(params, grads)
    # T = |1| + 1 = 2 for the matrix, 1 for the vector: T² g = 12 and 4
    torch.testing.assert_close(vectors, [torch.full((2, 2), 12.0), torch.full((2,), 4.0)])


@pytest.mark.parametrize("ascent", [Gradient(), Normalized(), Adaptive()], ids=ASCENTS)
def test_the_direction_does_not_depend_on_a_loss_scale(ascent):
    params, grads = [theta()], [grad(loss)(theta())]
    vectors, scale = ascent(params, grads)
    scaled, factor = ascent(params, [8.0 * g for g in grads], 8.0)
    torch.testing.assert_close(scaled[0] * factor, vectors[0] * scale)


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_zero_gradient_gives_zero(scheme, ascent):
    found = regularized_gradient(lambda p: (p * 0).sum(), theta(), 0.1, 0.1, scheme=scheme, ascent=ascent)
    torch.testing.assert_close(found, torch.zeros_like(theta()), rtol=0, atol=0)


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_maps_over_parameters(scheme, ascent):
    points = torch.stack([theta(), 2 * theta(), -theta()])

    def f(p):
        return regularized_gradient(loss, p, 0.3, 0.1, scheme=scheme, ascent=ascent)

    torch.testing.assert_close(vmap(f)(points), torch.stack([f(p) for p in points]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_maps_over_gamma_and_epsilon(scheme):
    gammas = torch.tensor([0.0, 0.1, 0.5], dtype=torch.float64)
    epsilons = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)

    def f(gamma, epsilon):
        return regularized_gradient(loss, theta(), gamma, epsilon, scheme=scheme)

    expected = torch.stack([f(g.item(), e.item()) for g, e in zip(gammas, epsilons)])
    torch.testing.assert_close(vmap(f)(gammas, epsilons), expected)


TREES = {
    "tensor": lambda p: p,
    "list": lambda p: [p[:1], p[1:]],
    "tuple": lambda p: (p[:3], p[3:]),
    "dict": lambda p: {"a": p[:2], "b": [p[2:]]},
}


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tree", TREES)
def test_parameters_are_any_tree_and_their_partition_changes_nothing(tree, scheme, ascent):
    def whole(params):
        return torch.cat(torch.utils._pytree.tree_leaves(params))

    params = TREES[tree](theta())
    found = regularized_gradient(lambda p: loss(whole(p)), params, 0.3, 0.1, scheme=scheme, ascent=ascent)
    expected = regularized_gradient(loss, theta(), 0.3, 0.1, scheme=scheme, ascent=ascent)
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(params)
    torch.testing.assert_close(whole(found), expected)


def test_parameters_are_not_modified():
    p = theta()
    regularized_gradient(loss, p, 0.3, 0.1)
    torch.testing.assert_close(p, theta(), rtol=0, atol=0)


def test_serves_a_module_through_functional_call():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1).double()
    params = dict(model.named_parameters())

    def module_loss(p):
        return functional_call(model, p, (X,)).squeeze(1).tanh().sub(Y).square().mean()

    found = penalty_gradient(module_loss, params)
    value = sum(
        g.square().sum() for g in torch.autograd.grad(module_loss(params), model.parameters(), create_graph=True)
    )
    expected = torch.autograd.grad(value / 2, model.parameters())
    torch.testing.assert_close([found["weight"], found["bias"]], list(expected))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"scheme": "sideways", "epsilon": 0.1}, ValueError, "scheme must be one of .*'sideways'"),
        ({"ascent": "up"}, ValueError, "ascent must be one of .*'up'"),
        ({"ascent": 3}, TypeError, "ascent must be one of .*got 3"),
        ({"scheme": "forward"}, ValueError, "epsilon must be a positive number with scheme='forward', got None"),
        ({"scheme": "central", "epsilon": 0.0}, ValueError, "epsilon must be a positive number .*got 0.0"),
        ({"scheme": "backward", "epsilon": -1}, ValueError, "epsilon must be a positive number .*got -1"),
        ({"scheme": "forward", "epsilon": math.nan}, ValueError, "epsilon must be a positive number .*got nan"),
    ],
)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        penalty_gradient(loss, theta(), **options)


def test_the_direction_is_whatever_one_passes():
    d = torch.tensor([1.0, 2.0, 0.0, -1.0], dtype=torch.float64)
    found = directional_derivative(loss, theta(), d, epsilon=None, scheme="exact")
    torch.testing.assert_close(found, hessian(loss)(theta()) @ d)
