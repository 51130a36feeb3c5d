"""accelerate: the regularizer in its accumulating loop, the first and the third door, against loops by hand."""

import copy
from contextlib import nullcontext
from functools import cache, partial

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradreg

pytest.importorskip("accelerate")
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState

from gradreg.integrations.accelerate import AcceleratedRegularizer

GAMMA, EPSILON, BATCH = 0.3, 0.1, 4
ROWS = 5 * BATCH  # windows of 3 and 2
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)


@pytest.fixture(autouse=True)
def _fresh():
    """accelerate keeps its state in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def net(kind="smooth"):
    torch.manual_seed(0)
    middle = {
        "smooth": [nn.Tanh()],
        "dropout": [nn.Tanh(), nn.Dropout(0.5)],
        "batchnorm": [nn.BatchNorm1d(8), nn.Tanh()],
    }[kind]
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3)).double()


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 6, generator=generator, dtype=torch.float64), torch.arange(ROWS) % 3


def train(
    layers,
    steps,
    clip=None,
    epochs=2,
    data=None,
    scale=None,
    batch=BATCH,
    make=SGD,
    resume=None,
    gamma=GAMMA,
    precision="no",
    shards=False,
):
    """The loop of the module's docstring; the model, the losses, the regularizer and the accelerator."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, mixed_precision=precision)
    if shards:  # accelerate has it on accelerators only
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=30, cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if scale is not None:  # accelerate makes one on accelerators only
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    optimizer = make([p for p in layers.parameters() if p.requires_grad])
    per_process = 0.9 ** (1 / accelerator.num_processes)  # accelerate steps it once for each of them
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, per_process)
    data = DataLoader(TensorDataset(*(data or rows())), batch_size=batch)
    model, optimizer, data, scheduler = accelerator.prepare(layers, optimizer, data, scheduler)
    regularizer = AcceleratedRegularizer(accelerator, model, gamma, EPSILON)
    if resume is not None:
        accelerator.load_state(resume)
    dtype = next(layers.parameters()).dtype
    losses = []

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0].to(dtype)), batch[1])

    for _ in range(epochs):
        for k, batch in enumerate(data):
            torch.manual_seed(k)
            with accelerator.accumulate(model):
                losses.append(regularizer.backward(loss_fn, batch))
                regularizer.diagnostics()
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return torch.stack(losses), regularizer, accelerator


def by_hand(layers, steps, clip=None, epochs=2, autocast=nullcontext):
    """The same with nothing but autograd; losses at θ, and the last ‖g1‖ and ‖ĝ − g1‖/‖g1‖."""
    parameters = [p for p in layers.parameters() if p.requires_grad]
    optimizer = SGD(parameters)
    batches = list(enumerate(DataLoader(TensorDataset(*rows()), batch_size=BATCH)))
    losses, last = [], {}

    def gradient(window, seen=None):
        total = [torch.zeros_like(p) for p in parameters]
        for k, (x, y) in window:
            torch.manual_seed(k)
            with autocast():
                output = layers(x.to(parameters[0].dtype))
            loss = F.cross_entropy(output.to(parameters[0].dtype), y)
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss / steps, parameters))]
            if seen is not None:
                seen.append(loss.detach())
        return total

    for _ in range(epochs):
        for start in range(0, len(batches), steps):
            window, before = batches[start : start + steps], copy.deepcopy(list(layers.buffers()))
            first = gradient(window, losses)
            after, weights = copy.deepcopy(list(layers.buffers())), [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, g in zip(parameters, first):
                    p += EPSILON * g
                for buffer, old in zip(layers.buffers(), before):
                    buffer.copy_(old)
            second = gradient(window)
            with torch.no_grad():
                for p, w, g1, g2 in zip(parameters, weights, first, second):
                    p.copy_(w)
                    p.grad = g1 + GAMMA / EPSILON * (g2 - g1)
                for buffer, new in zip(layers.buffers(), after):
                    buffer.copy_(new)
            length = torch.cat([g.flatten() for g in first]).norm()
            penalty = torch.cat([(p.grad - g).flatten() for p, g in zip(parameters, first)]).norm()
            last = {"grad_norm": length.item(), "penalty_ratio": (penalty / length).item()}
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.9
    return torch.stack(losses), last


def assert_same(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(list(ours.state_dict().values()), list(theirs.state_dict().values()), **tolerance)


@pytest.mark.parametrize("kind", ["smooth", "dropout", "batchnorm"])
@pytest.mark.parametrize(("steps", "clip"), [(1, None), (3, None), (3, 0.1)])
def test_windows_equal_a_loop_by_hand(kind, steps, clip):
    ours, theirs = net(kind), net(kind)
    losses, regularizer, _ = train(ours, steps, clip)
    expected, last = by_hand(theirs, steps, clip)
    assert_same(ours, theirs)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-13)
    for name, value in last.items():
        assert regularizer.diagnostics()[name].item() == pytest.approx(value, rel=1e-6)
    assert regularizer.regularizer.step == 2 * len(range(0, 5, steps))


def test_frozen_parameters_and_a_loss_scale():
    ours, theirs = net(), net()
    for layers in (ours, theirs):
        layers[0].weight.requires_grad_(False)
    _, regularizer, accelerator = train(ours, 3, scale=1024.0)
    _, last = by_hand(theirs, 3)
    assert_same(ours, theirs)
    assert accelerator.scaler.get_scale() == 1024.0
    assert regularizer.diagnostics()["grad_norm"].item() == pytest.approx(last["grad_norm"], rel=1e-6)


def test_bf16():
    ours, theirs = net().float(), net().float()
    train(ours, 3, 0.1, precision="bf16")
    by_hand(theirs, 3, 0.1, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ramp", [gradreg.warmup(GAMMA, 6), gradreg.TargetRatio(0.05), None], ids=str)
def test_resume_is_exact(tmp_path, ramp):
    make = partial(torch.optim.AdamW, lr=0.05)
    straight, first, resumed = net(), net(), net()
    train(straight, 3, make=make, gamma=ramp, epochs=3)
    train(first, 3, make=make, gamma=ramp, epochs=1)[2].save_state(str(tmp_path / "state"))
    _, regularizer, _ = train(resumed, 3, make=make, gamma=ramp, epochs=2, resume=str(tmp_path / "state"))
    assert_same(resumed, straight, rtol=0, atol=0)
    assert regularizer.state_dict()["step"] == 6


def test_no_penalty_is_plain_training():
    ours, plain = net("dropout"), net("dropout")
    _, regularizer, _ = train(ours, 3, gamma=0.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = SGD(plain.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = DataLoader(TensorDataset(*rows()), batch_size=BATCH)
    model, optimizer, data, scheduler = accelerator.prepare(plain, optimizer, data, scheduler)
    for _ in range(2):
        for k, (x, y) in enumerate(data):
            torch.manual_seed(k)
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert_same(ours, plain, rtol=0, atol=0)
    assert regularizer.state_dict()["step"] == 4


@pytest.mark.parametrize("scale", [None, 1000.0, 4096.0])
def test_the_first_door_takes_the_division_as_part_of_the_loss(scale):
    ours, theirs = net(), net()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    if scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    batches = list(DataLoader(TensorDataset(*rows()), batch_size=BATCH))[:3]
    model = accelerator.prepare(ours)
    for layers, options in ((model, {"backward": accelerator.backward}), (theirs, {})):
        share = 1 / 3 if layers is theirs else 1.0
        regularizer = gradreg.GradientRegularizer(layers, GAMMA, EPSILON)

        def loss_fn(batch, layers=layers, share=share):
            return share * F.cross_entropy(layers(batch[0]), batch[1])

        regularizer.backward(loss_fn, batches, **options)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad / (scale or 1.0), q.grad, rtol=0, atol=1e-13)


# The optimizer wrapper, prepared.


def closures(layers, steps=1, scale=None):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    if scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    data = DataLoader(TensorDataset(*rows()), batch_size=BATCH)
    model, data = accelerator.prepare(layers, data)
    regularizer = gradreg.GradientRegularizer(model, GAMMA, EPSILON)
    base = SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    optimizer, scheduler = accelerator.prepare(gradreg.RegularizedOptimizer(base, regularizer), scheduler)
    assert isinstance(optimizer, AcceleratedOptimizer)
    for _ in range(2):
        for x, y in data:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            if scale is not None:
                closure()  # without a gradient torch refuses first, with another message
            with accelerator.accumulate(model):
                optimizer.step(closure)
                scheduler.step()


def test_a_prepared_wrapper_is_right_without_accumulation():
    ours, theirs = net("batchnorm"), net("batchnorm")
    closures(ours)
    by_hand(theirs, 1)
    assert_same(ours, theirs)


def test_a_prepared_wrapper_refuses_accumulation_and_scalers():
    before = net()
    ours = net()
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=3\) drops the closure"):
        closures(ours, steps=3)
    with pytest.raises(ValueError, match="closure cannot be used with a GradScaler"):
        closures(ours, scale=1024.0)
    assert_same(ours, before, rtol=0, atol=0)


# Two processes.


def on_one_rank(rank):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "ACCELERATE_USE_CPU": "true"}
    x, y = rows()
    # accelerate deals whole batches to ranks in turn: rank r gets batch 2k + r
    order = torch.cat([torch.cat([torch.arange(s, s + BATCH)[r::2] for r in (0, 1)]) for s in range(0, ROWS, BATCH)])
    results = []
    for shards in (False, True):
        layers = net()
        losses, regularizer, accelerator = train(
            layers, 3, 0.1, data=(x[order], y[order]), batch=BATCH // 2, shards=shards
        )
        assert accelerator.num_processes == 2
        assert accelerator.gather(losses.mean()[None]).numel() == 2
        weights = [ranks.gathered(value) for value in layers.state_dict().values()]
        results.append((weights, regularizer.diagnostics()["penalty_ratio"].item(), bare_model_is_refused(accelerator)))
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return results


def bare_model_is_refused(accelerator):
    try:
        AcceleratedRegularizer(accelerator, net(), GAMMA, EPSILON)
    except ValueError as error:
        return str(error)
    return "no error"


@cache
def on_two_ranks():
    return ranks.on_two_ranks(on_one_rank)


@pytest.mark.parametrize("k", [0, 1], ids=["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(k):
    theirs = net()
    _, last = by_hand(theirs, 3, 0.1)
    for of_rank in on_two_ranks():
        weights, ratio, message = of_rank[k]
        torch.testing.assert_close(weights, list(theirs.state_dict().values()), rtol=0, atol=1e-13)
        assert ratio == pytest.approx(last["penalty_ratio"], rel=1e-6)
        assert "model must be what accelerator.prepare returned, got a bare Sequential" in message


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "central"}, "more than one replay"),
        ({"ascent_sync": "local"}, 'ascent_sync="local"'),
        ({"ascent": gradreg.Previous()}, "every\\(gamma, 10\\)"),
        ({"batch": gradreg.Fraction(0.1)}, "batch=Fraction"),
        ({"at": gradreg.Ahead(gradreg.Previous(), 1.0)}, "at=Ahead"),
        ({"exclude": "nothing"}, "matches no parameter"),
    ],
)
def test_the_regularizer_refuses_when_built(options, message):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=message):
        AcceleratedRegularizer(accelerator, accelerator.prepare(net()), GAMMA, EPSILON, **options)


def test_a_loss_in_the_place_of_its_function_and_other_mistypings():
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net())
    regularizer = AcceleratedRegularizer(accelerator, model, GAMMA, EPSILON)
    with pytest.raises(TypeError, match=r"got Tensor: .* pass the function itself"):
        regularizer.backward(F.cross_entropy(model(rows()[0]), rows()[1]), rows())
    with pytest.raises(TypeError, match=r"must be an accelerate.Accelerator, got Sequential"):
        AcceleratedRegularizer(model, accelerator, GAMMA, EPSILON)


def test_a_window_in_disorder_is_refused():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = accelerator.prepare(net())
    optimizer = accelerator.prepare(SGD(model.parameters()))
    regularizer = AcceleratedRegularizer(accelerator, model, GAMMA, EPSILON)
    batch = [t[:BATCH] for t in rows()]

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with accelerator.accumulate(model):
        regularizer.backward(loss_fn, batch)
    model.zero_grad()
    with accelerator.accumulate(model), pytest.raises(ValueError, match="gradients of the 1 micro-batches before"):
        regularizer.backward(loss_fn, batch)
    accelerator.sync_gradients = True
    regularizer = AcceleratedRegularizer(accelerator, model, GAMMA, EPSILON)
    regularizer.backward(loss_fn, batch)
    with pytest.raises(ValueError, match="gradients that were there before"):
        regularizer.backward(loss_fn, batch)
    optimizer.zero_grad(set_to_none=False)
    regularizer.backward(loss_fn, batch)
