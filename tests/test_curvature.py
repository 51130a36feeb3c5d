import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from gradreg import curvature
from gradreg.curvature import gradient_norm, hessian_trace, top_eigenvalues

MEASURES = [gradient_norm, hessian_trace, top_eigenvalues]


class Tied(nn.Module):
    """A matrix used twice, a frozen one, and one that the loss does not use."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.w(self.frozen(self.w(x).tanh()))


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def norm_layer():
    """BatchNorm with statistics of its own, in evaluation mode."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3))
    model(torch.randn(20, 3))
    return model.eval()


def attention():
    """Fused attention has no second derivative: its formula must be taken."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(3, 9)

        def forward(self, x):
            q, k, v = self.project(x.unflatten(0, (-1, 1))).unsqueeze(1).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v).flatten(1)

    return Attention()


def problem(make=mlp, sizes=(4, 4, 3)):
    """A model, its loss of a batch, batches of unequal size."""
    model = make().double()
    loss = lambda batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return model, loss, [(torch.randn(n, 3, dtype=torch.float64), torch.randint(3, (n,))) for n in sizes]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def reference(model, batches):
    """Gradient and Hessian of the mean over all rows at once, from torch."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x, y = (torch.cat(parts) for parts in zip(*batches))

    def loss(flat):
        parts = flat.split([p.numel() for p in trainable.values()])
        values = {name: part.view(p.shape) for part, (name, p) in zip(parts, trainable.items())}
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        flat = torch.cat([p.flatten() for p in trainable.values()])
        return torch.autograd.functional.jacobian(loss, flat), torch.autograd.functional.hessian(loss, flat)


def spectrum(hessian, by):
    values = torch.linalg.eigvalsh(hessian)
    return values[(values.abs() if by == "magnitude" else values).argsort(descending=True)].tolist()


@pytest.mark.parametrize("make", [mlp, Tied, norm_layer, attention])
def test_the_numbers_are_those_of_the_whole_hessian(make):
    model, loss, batches = problem(make)
    gradient, hessian = reference(model, batches)
    assert gradient_norm(loss, model, batches) == pytest.approx(gradient.norm().item(), rel=1e-12)
    for by in ("magnitude", "value"):
        found = top_eigenvalues(loss, model, batches, k=3, by=by, tolerance=1e-9)
        assert found.values == pytest.approx(spectrum(hessian, by)[:3], abs=1e-8)
    trace = hessian_trace(loss, model, batches, num_probes=400)
    assert abs(trace.mean - hessian.trace().item()) < 4 * trace.standard_error
    spread = 2 * (hessian - hessian.diag().diag()).square().sum()  # the variance of a probe
    assert trace.standard_error == pytest.approx((spread / 400).sqrt().item(), rel=0.2)


def test_all_eigenvalues_negative_ones_too():
    model, loss, batches = problem()
    _, hessian = reference(model, batches)
    everything = spectrum(hessian, "magnitude")
    assert min(everything) < -1e-3
    found = top_eigenvalues(loss, model, batches, k=len(everything), tolerance=0)
    assert found.values == pytest.approx(everything, abs=1e-8)
    assert max(found.residuals) < 1e-8


def test_the_mean_over_all_probes_is_the_trace():
    model, loss, batches = problem(lambda: nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 3, bias=False)))
    data = curvature._Loss(loss, model, batches, None)
    signs = [torch.tensor(v) for v in itertools.product((-1.0, 1.0), repeat=data.size)]
    forms = curvature._quadratic_forms(data, lambda: signs)
    _, hessian = reference(model, batches)
    assert math.fsum(forms) / len(forms) == pytest.approx(hessian.trace().item(), abs=1e-12)
    assert forms[5] == pytest.approx((signs[5] @ hessian @ signs[5]).item(), abs=1e-12)


def quadratic(*eigenvalues):
    """L = ½ θᵀHθ in a turned basis, at a point that is no eigenvector."""
    turn, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues)))
    hessian = turn @ torch.tensor(eigenvalues).diag() @ turn.T
    theta = torch.randn(len(eigenvalues), requires_grad=True)
    return lambda batch: theta @ hessian @ theta / 2 + 0 * batch.sum(), [theta], [torch.ones(1)]


@pytest.mark.parametrize(
    ("eigenvalues", "by", "expected"),
    [
        ((5.0, 5.0, 1.0), "value", [5, 5]),
        ((2.0, 2.0, 2.0, 2.0), "value", [2, 2, 2]),
        ((0.0, 0.0, 0.0, 0.0), "magnitude", [0, 0, 0]),
        ((1.0, -4.0, 3.0, 0.0), "magnitude", [-4, 3, 1]),
        ((1.0, -4.0, 3.0, 0.0), "value", [3, 1, 0]),
    ],
)
def test_repeated_and_zero_eigenvalues(eigenvalues, by, expected):
    found = top_eigenvalues(*quadratic(*eigenvalues), k=len(expected), by=by)
    assert found.values == pytest.approx(expected, abs=1e-8)


def test_the_residual_bounds_the_error_and_the_tolerance_is_kept():
    values = [100 * 0.9**k for k in range(100)]
    exact = sorted(values, reverse=True)
    rough = top_eigenvalues(*quadratic(*values), k=3, max_products=6, tolerance=0)
    assert rough.num_products == 6 + 3
    for value, residual in zip(rough.values, rough.residuals):
        assert residual > 1e-3
        assert min(abs(value - e) for e in exact) <= residual
    fine = top_eigenvalues(*quadratic(*values), k=3, tolerance=1e-6)
    assert fine.num_products < 60
    assert max(fine.residuals) <= 1e-6 * 100
    assert fine.values == pytest.approx(exact[:3], abs=1e-7)


def test_how_the_rows_are_cut_into_batches_changes_nothing():
    model, loss, [(x, y)] = problem(sizes=(11,))
    cut = list(zip(x.split(4), y.split(4)))
    whole, parts = (loss, model, [(x, y)]), (loss, model, cut)
    assert gradient_norm(*parts) == pytest.approx(gradient_norm(*whole), rel=1e-12)
    assert hessian_trace(*parts).samples == pytest.approx(hessian_trace(*whole).samples, rel=1e-9)
    assert top_eigenvalues(*parts).values == pytest.approx(top_eigenvalues(*whole).values, rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_is_left_behind(measure):
    model, loss, batches = problem(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)))
    model.train()
    loss(batches[0]).backward()
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = measure(loss, model, batches)
    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert torch.equal(state, torch.get_rng_state())
    assert measure(loss, model, batches) == first  # the same dropout masks


def test_an_error_leaves_nothing_behind_either():
    model, loss, batches = problem(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3)))
    before, state = model[0].running_mean.clone(), torch.get_rng_state()
    with pytest.raises(ValueError, match="finite"):
        gradient_norm(lambda batch: loss(batch) / 0, model, batches)
    assert torch.equal(before, model[0].running_mean)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_masks_are_the_same_in_all_passes():
    """Otherwise the products are of different matrices and the residuals stay large."""
    model, loss, batches = problem(lambda: nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Dropout(), nn.Linear(20, 3)))
    found = top_eigenvalues(loss, model.train(), batches, k=2, tolerance=1e-8)
    assert max(found.residuals) < 1e-7


def test_single_precision_says_how_far_it_got():
    model, loss, batches = problem()
    _, hessian = reference(model, batches)
    model.float()
    found = top_eigenvalues(loss, model, [(x.float(), y) for x, y in batches], k=2, tolerance=0)
    for value, residual, exact in zip(found.values, found.residuals, spectrum(hessian, "magnitude")):
        assert abs(value - exact) < 1e-6
        assert residual < 1e-5


def test_a_linear_loss_has_no_curvature():
    theta = torch.ones(3, requires_grad=True)
    linear = (lambda batch: (batch @ theta).mean(), [theta], [torch.ones(2, 3)])
    assert gradient_norm(*linear) == pytest.approx(3**0.5)
    assert hessian_trace(*linear).samples == (0.0,) * 32
    assert top_eigenvalues(*linear).values == (0.0,)


def test_progress_counts_the_work():
    model, loss, batches = problem()
    planned = {gradient_norm: 3, hessian_trace: 3 * 32, top_eigenvalues: 3 * (31 + 1)}
    for measure, most in planned.items():
        calls = []
        measure(loss, model, batches, progress=lambda *call, calls=calls: calls.append(call))
        assert calls[0] == (0, most)
        assert [done for done, _ in calls] == list(range(len(calls)))
        assert {of for _, of in calls} == {most}
        assert measure is top_eigenvalues or calls[-1] == (most, most)


def test_a_data_loader_and_a_dict():
    model, loss, batches = problem()
    x, y = (torch.cat(parts) for parts in zip(*batches))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    named = [{"x": x, "y": y} for x, y in batches]
    expected = pytest.approx(gradient_norm(loss, model, batches), rel=1e-12)
    assert gradient_norm(loss, model, loader) == expected
    assert gradient_norm(lambda batch: loss((batch["x"], batch["y"])), model, named) == expected


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "at least one row"),
        ({"batches": iter([1])}, "again and again, got a list_iterator"),
        ({"batches": [torch.tensor(1.0)]}, "0-dim"),
        ({"batches": [["no tensor"]]}, "must hold a tensor"),
        ({"parameters": []}, "requires gradients"),
        ({"parameters": nn.Linear(2, 2).requires_grad_(False)}, "requires gradients"),
        ({"parameters": [torch.ones(2, dtype=torch.complex128, requires_grad=True)]}, "real"),
        ({"loss_fn": lambda batch: torch.ones(2, requires_grad=True)}, r"scalar .* got shape \(2,\)"),
        ({"loss_fn": lambda batch: 1.0}, "scalar .* got float"),
        ({"loss_fn": lambda batch: torch.tensor(1.0)}, "depends on the parameters"),
        ({"loss_fn": lambda batch: torch.tensor(math.nan, requires_grad=True)}, "finite loss, got nan"),
    ],
)
def test_bad_input_is_named(measure, change, message):
    model, loss, batches = problem()
    with pytest.raises((ValueError, TypeError), match=message):
        measure(**{"loss_fn": loss, "parameters": model, "batches": batches, **change})


@pytest.mark.parametrize(
    ("measure", "change", "message"),
    [
        (hessian_trace, {"num_probes": 1}, "num_probes must be at least 2, got 1"),
        (top_eigenvalues, {"k": 0}, r"k must be a whole number from 1 to 31 \(the parameters\), got 0"),
        (top_eigenvalues, {"k": 32}, "from 1 to 31"),
        (top_eigenvalues, {"by": "size"}, "by must be 'magnitude' or 'value', got 'size'"),
        (top_eigenvalues, {"k": 3, "max_products": 2}, "max_products must be at least k = 3, got 2"),
    ],
)
def test_bad_numbers_are_named(measure, change, message):
    model, loss, batches = problem()
    with pytest.raises(ValueError, match=message):
        measure(loss, model, batches, **change)
