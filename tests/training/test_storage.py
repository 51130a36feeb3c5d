"""Where weights live: storages that are shared, weights that the forward re-assigns, parameters that come and go."""

import pytest
import torch
from by_hand import (
    SEED,
    batch,
    each_door,
    everything,
    expected,
    loss_of,
    net,
    regularizer_of,
    smooth,
    step,
)
from problems import assert_close, assert_same, gradients
from torch import nn
from torch.nn import functional as F

import gradreg
from gradreg import _vectors as vectors
from gradreg.training import displacement


@pytest.fixture(params=["pointing", "in place"])
def branch(request, monkeypatch):
    """Both ways to displace a weight."""
    if request.param == "in place":
        monkeypatch.setattr(displacement, "_may_point_elsewhere", lambda p: False)
    return request.param


# One storage under several parameters.


def square():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def same_data(model):
    model[2].weight.data = model[0].weight.data


def transposed_data(model):
    model[2].weight.data = model[0].weight.data.T


def overlapping_rows(model):
    flat = torch.randn(24, dtype=torch.float64)
    model[0].weight.data, model[2].weight.data = flat[:16].view(4, 4), flat[8:].view(4, 4)


def bias_inside_a_weight(model):
    model[0].bias.data = model[0].weight.data[0]


def same_array(model):
    array = model[0].weight.detach().numpy()
    model[0].weight.data, model[2].weight.data = torch.from_numpy(array), torch.from_numpy(array)


SHARED = [same_data, transposed_data, overlapping_rows, bias_inside_a_weight, same_array]
each_sharing = pytest.mark.parametrize("share", SHARED, ids=lambda share: share.__name__)


@each_sharing
@each_door
def test_one_storage_under_two_parameters_is_refused(door, share, branch):
    model = square()
    share(model)
    before = everything(model)[0]
    with pytest.raises(ValueError, match=r"storage.*one (nn\.)?Parameter"):
        step(door, regularizer_of(model), loss_of)
    assert_same(everything(model)[0], before)


@each_sharing
def test_one_storage_under_a_selected_and_another_parameter_is_refused(share):
    model = square()
    share(model)
    with pytest.raises(ValueError, match="storage"):
        step("backward", regularizer_of(model, include="0.weight"), loss_of)


def test_one_storage_that_is_shared_after_the_first_step_is_refused_in_the_next():
    model = square()
    regularizer = regularizer_of(model)
    step("backward", regularizer, loss_of)
    same_data(model)
    with pytest.raises(ValueError, match="storage"):
        step("backward", regularizer, loss_of)


def test_a_weight_that_overlaps_itself_is_refused():
    """A row that was expanded: one number at many places."""
    model = square()
    model[2].weight.data = torch.randn(1, 4, dtype=torch.float64).expand(4, 4)
    with pytest.raises(ValueError, match=r"2\.weight"):
        step("backward", regularizer_of(model), loss_of)


def views_of_one_storage(model):
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.data = part.view(p.shape)


def interleaved(model):
    """Two weights that take turns in one storage, and have no element in common."""
    both = torch.stack([model[0].weight.data, model[2].weight.data], dim=-1)
    model[0].weight.data, model[2].weight.data = both[..., 0], both[..., 1]


def one_parameter_at_two_places(model):
    model[2].weight = model[0].weight


@pytest.mark.parametrize("layout", [views_of_one_storage, interleaved, one_parameter_at_two_places])
@each_door
def test_parameters_without_an_element_in_common_go_on_working(door, layout):
    model = square()
    layout(model)
    by_hand, before = expected(model, loss_of), everything(model)[0]
    step(door, regularizer_of(model), loss_of)
    assert_close(gradients(model), by_hand)
    assert_same(everything(model)[0], before)


# Weights that the forward re-assigns.


class Assigns(nn.Module):
    """Weight normalization by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        self.normalize(self.inner)
        return self.outer(self.inner(x).tanh())

    def normalize(self, layer):
        layer.weight.data = F.normalize(layer.weight.data)


class Divides(Assigns):
    def normalize(self, layer):
        layer.weight.data.div_(layer.weight.data.norm(dim=1, keepdim=True))


class Copies(Assigns):
    def normalize(self, layer):
        with torch.no_grad():
            layer.weight.copy_(F.normalize(layer.weight))


class Clamps(Assigns):
    """WGAN's clipping of the weights."""

    def normalize(self, layer):
        layer.weight.data.clamp_(-0.3, 0.3)


class Masks(Assigns):
    """Pruning by hand."""

    def normalize(self, layer):
        layer.weight.data *= torch.arange(4) < 3


class Renormalized(nn.Module):
    """An embedding that shortens its rows when they are read."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Embedding(5, 6, max_norm=1.0), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        return self.outer(self.inner(torch.arange(8) % 5).tanh()) + 0 * x.sum()


WRITERS = [Assigns, Divides, Copies, Clamps, Masks, Renormalized]


@pytest.mark.parametrize("kind", WRITERS)
@each_door
def test_weights_that_the_forward_writes_are_in_the_end_those_of_the_first_pass(door, kind, branch):
    model, plain = kind(), kind()
    loss_of(plain)
    by_hand = expected(model, loss_of)
    regularizer = regularizer_of(model)
    step(door, regularizer, loss_of)
    assert_same(list(model.parameters()), list(plain.parameters()))
    assert_close(gradients(model), by_hand)
    step(door, regularizer, loss_of)
    assert_close(gradients(model), expected(plain, loss_of))


@each_door
def test_a_forward_that_assigns_new_parameters_is_followed(door, branch):
    """A hypernetwork by hand: what is a weight is another object after each pass."""
    model = Assigns()

    def forward(x):
        model.inner.weight.data = model.inner.weight.data.clone()
        return model.outer(model.inner(x).tanh())

    model.forward = forward
    plain = Assigns()
    plain.forward = lambda x: plain.outer(plain.inner(x).tanh())
    by_hand = expected(plain, lambda twin: F.cross_entropy(twin.outer(twin.inner(batch()[0]).tanh()), batch()[1]))
    before = [p.detach().clone() for p in model.parameters()]
    step(door, regularizer_of(model), loss_of)
    assert_same(list(model.parameters()), before)
    assert_close(gradients(model), by_hand)


# Buffers that the forward makes anew or resizes.


class Observer(nn.Module):
    """Quantization-aware training: the range of each channel, whose number is known when it is first called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))

    def forward(self, x):
        if self.low.numel() == 0:
            self.low.resize_(x.shape[1]).zero_()
            self.high.resize_(x.shape[1]).zero_()
        self.low.copy_(torch.minimum(self.low, x.detach().amin(0)))
        self.high.copy_(torch.maximum(self.high, x.detach().amax(0)))
        return x * (1 + self.high.clone() - self.low.clone())


class Replaces(Observer):
    def forward(self, x):
        if self.low.numel() == 0:
            self.low = x.detach().amin(0)
        self.low = torch.minimum(self.low, x.detach().amin(0))
        return x * (1 - self.low)


class Appears(nn.Module):
    """A buffer that is None until it is needed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.scale is None:
            self.scale = x.detach().std()
        return x * self.scale


class Registers(nn.Module):
    """A cache of positions, registered by the first forward."""

    def forward(self, x):
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.linspace(1, 2, x.shape[1], dtype=x.dtype), persistent=False)
        return x * self.positions


@pytest.mark.parametrize("kind", [Observer, Replaces, Appears, Registers])
@each_door
def test_a_buffer_that_the_forward_makes_or_resizes_changes_once(door, kind):
    model, plain = net(nn.Linear(4, 6), kind(), nn.Linear(6, 3)), net(nn.Linear(4, 6), kind(), nn.Linear(6, 3))
    by_hand = expected(model, loss_of)
    loss_of(plain)
    regularizer = regularizer_of(model)
    step(door, regularizer, loss_of)
    assert_close(gradients(model), by_hand)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
    step(door, regularizer, loss_of)
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))


class Aliased(nn.Module):
    """Running moments that are written by views into one buffer, as some do that are sent among ranks at once."""

    def __init__(self, kind):
        super().__init__()
        self.register_buffer("moments", torch.tensor([0.0, 1.0]).double())
        self.mean = self.moments.numpy()[:1] if kind == "array" else self.moments[:1]

    def forward(self, x):
        self.mean *= 0.5
        self.mean += 0.5 * float(x.detach().mean())
        return (x - self.moments[0]) / self.moments[1]


class Unalike(nn.Module):
    """Buffers of several kinds: numbers of two types, one that is a view, one that is not contiguous, one empty."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6).double())
        self.register_buffer("transposed", torch.zeros(5, 6).double().t())
        self.register_buffer("part", torch.zeros(12).double()[3:9])
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x):
        self.count += 1
        for b in (self.mean, self.part, self.transposed[:, 1]):
            b.mul_(0.5).add_(x.detach().mean(0))
        return x - self.mean - self.part / self.count - self.transposed[:, 1]


@pytest.mark.parametrize("kind", ["view", "array", "several kinds"])
@each_door
def test_buffers_in_memory_that_others_reach_change_once(door, kind):
    make = Unalike if kind == "several kinds" else lambda: Aliased(kind)
    model, plain = (net(nn.Linear(4, 6), make(), nn.Linear(6, 3)) for _ in range(2))
    regularizer = regularizer_of(model)
    for _ in range(3):
        addresses = [b.data_ptr() for b in model.buffers()]
        by_hand = expected(plain, loss_of) if kind == "several kinds" else None
        model.zero_grad()
        step(door, regularizer, loss_of)
        torch.manual_seed(SEED)
        loss_of(plain)
        if by_hand is not None:  # copies of a model do not share what it shares
            assert_close(gradients(model), by_hand)
        assert_same(list(model.buffers()), list(plain.buffers()))
        assert [b.data_ptr() for b in model.buffers()] == addresses


def test_a_failing_step_leaves_a_resized_buffer_as_it_was():
    model = net(nn.Linear(4, 6), Observer(), nn.Linear(6, 3))
    regularizer = regularizer_of(model)

    def failing():
        raise KeyError(loss_of(model).item())

    with pytest.raises(KeyError):
        regularizer.backward(failing)
    assert model[1].low.numel() == 0
    step("backward", regularizer, loss_of)
    assert model[0].weight.grad.isfinite().all()


# Parameters that come and go between steps.


def append_a_layer(model):
    model.append(nn.Linear(3, 3).double())


def insert_a_layer(model):
    model.insert(1, nn.Linear(6, 6).double())


def replace_a_layer(model):
    model[0] = nn.Linear(4, 6).double()


def load_by_assignment(model):
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()}, assign=True)


def move_there_and_back(model):
    model.float().double()


def assign_data(model):
    for p in model.parameters():
        p.data = p.data.clone()


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model[0])


def freeze(model):
    model[0].requires_grad_(False)


def tie(model):
    model[2].bias = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.append(nn.Linear(3, 3).double())
    model[3].bias = model[2].bias


def drop_a_bias(model):
    model[0].bias = None


CHANGES = [
    append_a_layer,
    insert_a_layer,
    replace_a_layer,
    load_by_assignment,
    move_there_and_back,
    assign_data,
    parametrize,
    freeze,
    tie,
    drop_a_bias,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@each_door
def test_a_model_that_changed_between_steps_is_followed_from_the_first_step_on(door, change):
    model = smooth()
    regularizer = regularizer_of(model)
    step(door, regularizer, loss_of)
    change(model)
    by_hand, before = expected(model, loss_of), everything(model)[0]
    step(door, regularizer, loss_of)
    assert_close(gradients(model), by_hand)
    assert_same(everything(model)[0], before)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_wrapper_that_lives_on_follows_the_model(change):
    """One wrapper over all steps; a parameter that is new to the base joins it by add_param_group or not at all."""
    model = smooth()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = gradreg.RegularizedOptimizer(base, regularizer_of(model))

    def closure():
        optimizer.zero_grad()
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    change(model)
    by_hand = expected(model, loss_of)
    optimizer.step(closure)
    assert_close(gradients(model), by_hand)


def test_a_lazy_layer_is_followed_from_the_first_step_on():
    lazy, twin = (net(nn.Linear(4, 6), nn.Tanh(), nn.LazyLinear(3)) for _ in range(2))
    torch.manual_seed(SEED)
    loss_of(twin)
    by_hand = expected(twin, loss_of)
    step("backward", regularizer_of(lazy), loss_of)
    assert_close(gradients(lazy), by_hand)


@each_door
def test_a_layer_that_the_forward_makes_at_its_first_call_is_displaced_from_the_second_step_on(door):
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 6).double()

        def forward(self, x):
            if not hasattr(self, "outer"):
                self.outer = smooth()[2]
            return self.outer(self.inner(x).tanh())

    torch.manual_seed(0)
    model = Grows()
    regularizer = regularizer_of(model)
    step(door, regularizer, loss_of)
    by_hand = expected(model, loss_of)
    step(door, regularizer, loss_of)
    assert_close(gradients(model), by_hand)


# The copy.


@each_door
def test_no_memory_for_the_copy_leaves_all_as_it_was_and_the_next_step_works(door, branch, monkeypatch):
    model = net()
    regularizer = regularizer_of(model, replay_check=False)
    by_hand, original, taken = expected(model, loss_of), torch.empty_like, []
    of_few = vectors.moved
    weights = {p.data_ptr() for p in model.parameters() if p.ndim == 2}

    def exhausted(tensor, **options):
        """The first copy of a matrix fits, the second does not."""
        taken.extend([tensor] if tensor.data_ptr() in weights else [])
        if len(taken) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (a stand-in)")
        return original(tensor, **options)

    def exhausted_together(tensors, step, direction):
        for tensor in tensors:
            exhausted(tensor)
        return of_few(tensors, step, direction)

    before = everything(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", exhausted)
        patch.setattr(vectors, "moved", exhausted_together)
        with pytest.raises(torch.OutOfMemoryError):
            step(door, regularizer, loss_of)
    assert_same(everything(model)[0], before[0])
    assert list(model.state_dict()) == list(net().state_dict())
    assert regularizer.step == 0
    model.load_state_dict(net().state_dict())
    step(door, regularizer, loss_of)
    assert_close(gradients(model), by_hand)


@pytest.mark.parametrize("scheme", ["forward", "backward", "central"])
def test_in_place_and_pointing_give_the_same_bits(scheme, monkeypatch):
    first, second = net(), net()
    step("backward", regularizer_of(first, scheme=scheme), loss_of)
    monkeypatch.setattr(displacement, "_may_point_elsewhere", lambda p: False)
    step("backward", regularizer_of(second, scheme=scheme), loss_of)
    assert_same(everything(first)[1:], everything(second)[1:])


@each_door
def test_views_of_a_weight_that_were_taken_before_stand_where_the_weight_stands_afterwards(door, branch):
    model = smooth()
    view, flat = model[0].weight.data[0], model[0].weight.detach().flatten()
    before = view.clone(), flat.clone()
    step(door, regularizer_of(model), loss_of)
    assert_same([view, flat], list(before))
    model[0].weight.data.add_(1)
    assert_same([view, flat], [t + 1 for t in before])
