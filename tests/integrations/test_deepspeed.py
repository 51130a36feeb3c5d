"""DeepSpeed: ZeRO-1 and 2 against a loop by hand, on one process and on two; what is refused."""

import copy
import os

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import gradreg

pytest.importorskip("deepspeed")
import deepspeed

from gradreg.integrations.deepspeed import DeepSpeedRegularizer

HOST = [
    "TypedStorage is deprecated",
    "`torch.jit.script_method` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in HOST]
GAMMA, EPSILON, ROWS = 0.3, 0.1, 12
# Compiling this communication op takes a minute, and it is not needed.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@pytest.fixture(scope="module", autouse=True)
def _one_process(tmp_path_factory):
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]


def net(kind="smooth"):
    torch.manual_seed(0)
    middle = {
        "smooth": [nn.Tanh()],
        "dropout": [nn.Tanh(), nn.Dropout(0.5)],
        "batchnorm": [nn.BatchNorm1d(8), nn.Tanh()],
    }[kind]
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3))


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 6, generator=generator), torch.arange(ROWS) % 3


def windows(x, y, size):
    """Three windows: whole, whole, ragged."""
    micro = list(zip(x.split(size), y.split(size)))
    return [micro[:3], micro[1:], micro[:2]]


def engine_of(layers, stage, steps=3, optimizer=torch.optim.SGD, lr=0.2, **config):
    defaults = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": steps,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trained = [p for p in layers.parameters() if p.requires_grad]
    return deepspeed.initialize(
        model=layers, optimizer=optimizer(trained, lr=lr, **options), config=defaults | config, dist_init_required=False
    )[0]


def train(engine, regularizer, of_windows):
    dtype = next(engine.module.parameters()).dtype

    def loss_fn(batch):
        return F.cross_entropy(engine(batch[0].to(dtype)).float(), batch[1])

    losses = []
    for k, window in enumerate(of_windows):
        torch.manual_seed(k)
        losses.append(regularizer.backward(loss_fn, window))
        engine.step()
    return torch.stack(losses)


def by_hand(layers, of_windows, steps=3, clip=None, gamma=GAMMA, exclude=()):
    named = dict(layers.named_parameters())
    parameters = [p for p in named.values() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    losses, last = [], {}

    def gradient(window, k):
        torch.manual_seed(k)
        total = [torch.zeros_like(p) for p in parameters]
        value = 0.0
        for x, y in window:
            loss = F.cross_entropy(layers(x), y) / steps
            total = [t + g for t, g in zip(total, torch.autograd.grad(loss, parameters))]
            value = value + loss.detach()
        return total, value

    for k, window in enumerate(of_windows):
        before = copy.deepcopy(list(layers.buffers()))
        first, loss = gradient(window, k)
        losses.append(loss)
        after, weights = copy.deepcopy(list(layers.buffers())), [p.detach().clone() for p in parameters]
        moved = [not any(p is named[name] for name in exclude) for p in parameters]
        with torch.no_grad():
            for p, g, m in zip(parameters, first, moved):
                p += EPSILON * g * m
            for buffer, old in zip(layers.buffers(), before):
                buffer.copy_(old)
        second, _ = gradient(window, k)
        with torch.no_grad():
            for p, w, g1, g2, m in zip(parameters, weights, first, second, moved):
                p.copy_(w)
                p.grad = g1 + m * gamma / EPSILON * (g2 - g1)
            for buffer, new in zip(layers.buffers(), after):
                buffer.copy_(new)
        length = torch.cat([g.flatten() for g, m in zip(first, moved) if m]).norm()
        penalty = torch.cat([(p.grad - g).flatten() for p, g in zip(parameters, first)]).norm()
        last = {"grad_norm": length.item(), "penalty_ratio": (penalty / length).item()}
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return torch.stack(losses), last


def assert_same(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(list(ours.state_dict().values()), list(theirs.state_dict().values()), **tolerance)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("kind", "clip", "gamma"), [("smooth", None, GAMMA), ("dropout", 0.1, GAMMA), ("batchnorm", None, EPSILON)]
)
def test_windows_equal_a_loop_by_hand(stage, kind, clip, gamma):
    ours, theirs = net(kind), net(kind)
    engine = engine_of(ours, stage, gradient_clipping=clip or 0.0)
    regularizer = DeepSpeedRegularizer(engine, gamma, EPSILON)
    losses = train(engine, regularizer, windows(*rows(), 3))
    expected, last = by_hand(theirs, windows(*rows(), 3), clip=clip, gamma=gamma)
    assert_same(ours, theirs)
    torch.testing.assert_close(losses, expected)
    found = regularizer.diagnostics()
    for name, value in last.items():
        assert found[name].item() == pytest.approx(value, rel=1e-3)
    assert (found["active_steps"], found["skipped_steps"], regularizer.step) == (3, 0, 3)


def test_what_is_frozen_or_excluded():
    ours, theirs = net(), net()
    for layers in (ours, theirs):
        layers[0].weight.requires_grad_(False)
    engine = engine_of(ours, 2)
    train(engine, DeepSpeedRegularizer(engine, GAMMA, EPSILON, exclude="2.bias"), windows(*rows(), 3))
    by_hand(theirs, windows(*rows(), 3), exclude=["2.bias"])
    assert_same(ours, theirs)


@pytest.mark.parametrize(("stage", "accumulate"), [(2, "bf16"), (2, "fp32"), (1, "bf16")])
def test_bf16(stage, accumulate):
    """The displacement starts from the masters, and the difference is formed in float32."""
    engine = engine_of(net(), stage, bf16={"enabled": True}, data_types={"grad_accum_dtype": accumulate})
    regularizer = DeepSpeedRegularizer(engine, GAMMA, EPSILON)
    train(engine, regularizer, windows(*rows(), 3)[1:])  # now masters and weights differ by a rounding
    window = windows(*rows(), 3)[0]
    low = net().bfloat16()
    low.load_state_dict(engine.module.state_dict())
    masters = [deepspeed.utils.safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]

    def gradient(layers):
        total = [
            torch.zeros_like(p, dtype=torch.float32 if accumulate == "fp32" else p.dtype) for p in low.parameters()
        ]
        for x, y in window:
            loss = F.cross_entropy(layers(x.bfloat16()).float(), y) / 3
            total = [t + g.to(t.dtype) for t, g in zip(total, torch.autograd.grad(loss, list(layers.parameters())))]
        return [t.float() for t in total]

    first = gradient(low)
    with torch.no_grad():
        for p, master, g in zip(low.parameters(), masters, first):
            p.copy_(master + EPSILON * g)
    second = gradient(low)
    before = [p.clone() for p in engine.module.parameters()]
    regularizer.backward(lambda batch: F.cross_entropy(engine(batch[0].bfloat16()).float(), batch[1]), window)
    for p, g1, g2 in zip(engine.module.parameters(), first, second):
        expected = g1 + GAMMA / EPSILON * (g2 - g1)
        ours = deepspeed.utils.safe_get_full_grad(p).float()
        close = {"rtol": 1e-5, "atol": 1e-6} if accumulate == "fp32" else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(ours, expected, **close)
    assert all(torch.equal(p, q) for p, q in zip(engine.module.parameters(), before))


@pytest.mark.parametrize("ascent", ["gradient", "normalized"])
def test_a_loss_scale_changes_nothing(ascent):
    results = []
    for scale in (1.0, 1024.0):
        layers = net()
        engine = engine_of(layers, 2, gradient_clipping=0.1)
        engine.optimizer.override_loss_scale(scale)
        regularizer = DeepSpeedRegularizer(engine, GAMMA, EPSILON, ascent=ascent)
        train(engine, regularizer, windows(*rows(), 3))
        results.append((layers, regularizer.diagnostics()))
    assert_same(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_no_penalty_is_plain_training():
    ours, plain = net("dropout"), net("dropout")
    engine = engine_of(ours, 2)
    train(engine, DeepSpeedRegularizer(engine, 0.0, EPSILON), windows(*rows(), 3)[:2])
    other = engine_of(plain, 2)
    for k, window in enumerate(windows(*rows(), 3)[:2]):
        torch.manual_seed(k)
        for x, y in window:
            other.backward(F.cross_entropy(other(x), y))
            other.step()
    assert_same(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", [gradreg.warmup(GAMMA, 4), gradreg.warmup(gradreg.TargetRatio(0.05), 4)], ids=str)
def test_resume_is_exact(tmp_path, gamma):
    def start():
        engine = engine_of(net(), 2, optimizer=torch.optim.AdamW, lr=0.05)
        return engine, DeepSpeedRegularizer(engine, gamma, EPSILON)

    of_windows = windows(*rows(), 3)
    straight, regularizer = start()
    train(straight, regularizer, of_windows)
    first, regularizer = start()
    train(first, regularizer, of_windows[:1])
    first.save_checkpoint(str(tmp_path), client_state={"gradreg": regularizer.state_dict()})
    resumed, regularizer = start()
    _, client_state = resumed.load_checkpoint(str(tmp_path))
    regularizer.load_state_dict(client_state["gradreg"])
    train(resumed, regularizer, of_windows[1:])
    torch.manual_seed(0)
    assert_same(resumed.module, straight.module, rtol=0, atol=0)
    assert regularizer.state_dict()["active_steps"] == 2
    assert regularizer.state_dict().get("target", {}).get("num_readings") in (None, 2)
    with pytest.raises(ValueError, match="must have the keys"):
        regularizer.load_state_dict({"step": 1})


def test_without_a_number_gamma_follows_a_ratio():
    engine = engine_of(net(), 1)
    regularizer = DeepSpeedRegularizer(engine)
    train(engine, regularizer, windows(*rows(), 3)[:1] * 13)
    found = regularizer.diagnostics()
    assert found["gamma"] != regularizer.epsilon / 1000
    assert 0 < found["penalty_ratio"] < 2 * regularizer.gamma.target


def test_an_exception_puts_the_weights_back():
    ours, before = net(), net()
    engine = engine_of(ours, 2)
    calls = []

    def loss_fn(batch):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the machine is on fire")
        return F.cross_entropy(engine(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match="on fire"):
        DeepSpeedRegularizer(engine, GAMMA, EPSILON).backward(loss_fn, windows(*rows(), 3)[0])
    assert_same(ours, before, rtol=0, atol=0)


def test_a_zero_or_infinite_gradient_is_skipped():
    engine = engine_of(net(), 1)
    regularizer = DeepSpeedRegularizer(engine, GAMMA, EPSILON)
    for factor in (0.0, torch.inf):
        regularizer.backward(lambda x, factor=factor: factor * engine(x).square().sum(), [rows()[0]])
    assert regularizer.diagnostics()["skipped_steps"] == 2
    assert not deepspeed.utils.safe_get_full_grad(engine.module[0].weight).isfinite().all()


def on_one_rank(rank, stages):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    results = []
    for stage in stages:
        layers = net()
        engine = engine_of(layers, stage, gradient_clipping=0.1)
        regularizer = DeepSpeedRegularizer(engine, GAMMA, EPSILON, exclude="2.bias")
        # The rows of a micro-batch are dealt to the ranks in turn.
        of_windows = [[(x[rank::2], y[rank::2]) for x, y in window] for window in windows(*rows(), 4)]
        losses = train(engine, regularizer, of_windows)
        results.append((layers.state_dict(), regularizer.diagnostics()["penalty_ratio"].item(), losses))
    with pytest.raises(ValueError, match=r"ranks must agree on gamma, got 0\.1 on rank 0 and 1\.1 on rank 1"):
        train(engine, DeepSpeedRegularizer(engine, 0.1 + rank, EPSILON), of_windows)
    return results


def test_two_ranks_equal_one_process():
    theirs = net()
    expected, last = by_hand(theirs, windows(*rows(), 4), clip=0.1, exclude=["2.bias"])
    of_ranks = ranks.on_two_ranks(on_one_rank, (1, 2))
    for (state, ratio, losses), (_, _, others) in zip(*of_ranks):
        torch.testing.assert_close(list(state.values()), list(theirs.state_dict().values()), rtol=1e-5, atol=1e-6)
        assert ratio == pytest.approx(last["penalty_ratio"], rel=1e-3)
        torch.testing.assert_close((losses + others) / 2, expected)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (3, {}, "zero_optimization.stage=3 shards the weights"),
        (0, {}, "zero_optimization.stage must be 1 or 2, got 0"),
        (2, {"scheme": "central"}, 'scheme="central" is not for DeepSpeed'),
        (2, {"exclude": "nothing"}, "matches no parameter"),
    ],
)
def test_refusals(stage, options, message):
    engine = engine_of(net(), stage)
    with pytest.raises(ValueError, match=message):
        DeepSpeedRegularizer(engine, GAMMA, EPSILON, **options)


def test_what_zero_does_beside_partitions_is_refused(monkeypatch):
    with pytest.raises(TypeError, match=r"what deepspeed\.initialize returned, got Sequential"):
        DeepSpeedRegularizer(net(), GAMMA, EPSILON)
    engine = engine_of(net(), 1)
    with pytest.raises(TypeError, match=r"got Tensor: .* pass the function itself"):
        DeepSpeedRegularizer(engine, GAMMA, EPSILON).backward(engine(rows()[0]).sum(), [rows()])
    engine = engine_of(net(), 1, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"})
    with pytest.raises(ValueError, match="does not support BF16_Optimizer"):
        DeepSpeedRegularizer(engine, GAMMA, EPSILON)
    engine = engine_of(net(), 2)
    for owner, name, value, message in [
        (engine, "mpu", object(), "mpu"),
        (engine.optimizer, "cpu_offload", True, "offload_optimizer"),
        (engine, "has_moe_layers", True, "expert layers"),
        (engine.module[0].weight, "use_muon", True, "Muon"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            with pytest.raises(ValueError, match=f"does not support .*{message}"):
                DeepSpeedRegularizer(engine, GAMMA, EPSILON)
