"""Lightning: the callback against loops written by hand, and what it and the optimizer wrapper refuse."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradreg

pytest.importorskip("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torchmetrics import MeanMetric

from gradreg.integrations.lightning import GradientRegularization

HOST = [
    "The 'train_dataloader' does not have many workers",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "You are using the `dataloader_iter` step flavor",
    "Found `dataloader_iter` argument in the `training_step`",
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in HOST]
GAMMA, EPSILON, BATCH = 0.3, 0.1, 4
ROWS = 5 * BATCH  # windows of 3 and 2
SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.9)


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


class Module(LightningModule):
    """`training_step` as users write it: parts of the module are called, its own forward is not."""

    def __init__(self, layers, optimizer=SGD, interval=None):
        super().__init__()
        self.layers, self.optimizer, self.interval = layers, optimizer, interval
        self.mean = MeanMetric()
        self.clipped = 0

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.layers(x.to(next(self.parameters()).dtype)), y)
        self.mean(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss.detach()})
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clipped += gradient_clip_val is not None
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.interval is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


def trainer_with(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": 2}
    return Trainer(callbacks=list(callbacks), log_every_n_steps=1, **(quiet | options))


def loader(data=None, batch=BATCH):
    return DataLoader(TensorDataset(*(data or rows())), batch_size=batch)


def fit(module, *callbacks, data=None, **options):
    trainer = trainer_with(*callbacks, **options)
    trainer.fit(module, loader(data))
    return trainer


def regularization(**options):
    return GradientRegularization(**({"gamma": GAMMA, "epsilon": EPSILON} | options))


def by_hand(layers, accumulate=1, clip=None, epochs=2, interval=None, autocast=nullcontext, scale=1.0, gamma=GAMMA):
    """The same training with nothing but autograd; losses at θ, and the last ‖g1‖ and ‖ĝ − g1‖/‖g1‖."""
    parameters = [p for p in layers.parameters() if p.requires_grad]
    optimizer = SGD(parameters)
    batches = list(enumerate(loader()))
    losses, last = [], {}

    def gradient(window, seen=None):
        total = [torch.zeros_like(p) for p in parameters]
        for index, (x, y) in window:
            torch.manual_seed(index)
            with autocast():
                loss = F.cross_entropy(layers(x.to(parameters[0].dtype)), y)
            found = torch.autograd.grad(scale * (loss / accumulate), parameters)
            total = [t + g / scale for t, g in zip(total, found)]
            if seen is not None:
                seen.append(loss.detach())
        return total

    for _ in range(epochs):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            before = copy.deepcopy(list(layers.buffers()))
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
                    p.grad = g1 + gamma / EPSILON * (g2 - g1)
                for buffer, new in zip(layers.buffers(), after):
                    buffer.copy_(new)
            length = torch.cat([g.flatten() for g in first]).norm()
            penalty = torch.cat([(p.grad - g).flatten() for p, g in zip(parameters, first)]).norm()
            last = {"grad_norm": length, "penalty_ratio": penalty / length}
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            if interval == "step":
                optimizer.param_groups[0]["lr"] *= 0.5
        if interval == "epoch":
            optimizer.param_groups[0]["lr"] *= 0.5
    return torch.stack(losses), last


def assert_same(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(list(ours.state_dict().values()), list(theirs.state_dict().values()), **tolerance)


@pytest.mark.parametrize("kind", ["smooth", "dropout", "batchnorm"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.1), (3, None), (3, 0.1)])
def test_windows_equal_a_loop_by_hand(kind, accumulate, clip):
    module, theirs = Module(net(kind)), net(kind)
    trainer = fit(module, regularization(), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    losses, last = by_hand(theirs, accumulate, clip)
    assert_same(module.layers, theirs)
    assert trainer.global_step == len(losses) // 5 * (5 if accumulate == 1 else 2)
    assert module.clipped == (trainer.global_step if clip else 0), "once a step"
    for name, value in last.items():
        assert trainer.logged_metrics[name].item() == pytest.approx(value.item(), rel=1e-6)
    assert trainer.logged_metrics["loss_epoch"].item() == pytest.approx(losses[-5:].mean().item(), rel=1e-6)
    assert trainer.logged_metrics["twice"].item() == pytest.approx(2 * losses[-1].item(), rel=1e-6)
    assert module.mean.compute().item() == pytest.approx(losses.mean().item(), rel=1e-6), "metrics count θ alone"


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_schedulers_and_frozen_parameters(interval):
    module, theirs = Module(net(), interval=interval), net()
    module.layers[0].weight.requires_grad_(False)
    theirs[0].weight.requires_grad_(False)
    fit(module, regularization(), accumulate_grad_batches=3)
    by_hand(theirs, 3, interval=interval)
    assert_same(module.layers, theirs)


def test_bf16_mixed():
    module, theirs = Module(net().float()), net().float()
    fit(module, regularization(), precision="bf16-mixed", accumulate_grad_batches=3, gradient_clip_val=0.1)
    by_hand(theirs, 3, 0.1, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert_same(module.layers, theirs, rtol=1e-5, atol=1e-6)


def test_double_and_half_precision():
    module, theirs = Module(net().float()), net().float().double()
    fit(module, regularization(), precision="64-true", accumulate_grad_batches=3)
    by_hand(theirs, 3)
    assert_same(module.layers, theirs)
    module, theirs = Module(net()), net().bfloat16()
    fit(module, regularization(), precision="bf16-true", accumulate_grad_batches=3)
    by_hand(theirs, 3)
    assert module.layers[0].weight.dtype == torch.bfloat16
    assert_same(module.layers, theirs, rtol=0.05, atol=0.01)


def test_a_gradient_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, theirs = Module(net().float()), net().float()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(module, regularization(), plugins=[plugin], accumulate_grad_batches=3, gradient_clip_val=0.1)
    _, last = by_hand(theirs, 3, 0.1, autocast=partial(torch.autocast, "cpu", torch.float16), scale=1024.0)
    assert_same(module.layers, theirs, rtol=1e-5, atol=1e-6)
    assert trainer.logged_metrics["grad_norm"].item() == pytest.approx(last["grad_norm"].item(), rel=1e-5)


def test_a_scaler_skips_a_step_that_overflows():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module, before = Module(net().float()), net().float()
    callback = regularization()
    fit(module, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=1, max_epochs=1)
    assert_same(module.layers, before, rtol=0, atol=0)
    assert callback.regularizer.diagnostics()["skipped_steps"] == 1
    assert scaler.get_scale() == 2.0**39


def test_resume_is_exact(tmp_path):
    make = partial(Module, optimizer=partial(torch.optim.AdamW, lr=0.05), interval="step")
    ramp = gradreg.warmup(GAMMA, 6)
    straight, first, resumed = make(net("dropout")), make(net("dropout")), make(net("dropout"))
    options = {"accumulate_grad_batches": 3}
    trainer = fit(straight, regularization(gamma=ramp), max_epochs=3, **options)
    fit(first, regularization(gamma=ramp), max_epochs=1, **options).save_checkpoint(tmp_path / "first.ckpt")
    callback = regularization(gamma=ramp)
    again = trainer_with(callback, max_epochs=3, **options)
    again.fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert callback.regularizer.step == trainer.global_step == again.global_step == 6
    assert_same(resumed.layers, straight.layers, rtol=0, atol=0)
    again.fit_loop.max_epochs = 4
    again.fit(resumed, loader())
    assert callback.regularizer.step == again.global_step == 8, "fit() again goes on"


def test_no_penalty_is_plain_training():
    ours, plain = Module(net("dropout")), Module(net("dropout"))
    callback = regularization(gamma=0.0)
    fit(ours, callback, accumulate_grad_batches=3)
    fit(plain, accumulate_grad_batches=3)
    assert_same(ours.layers, plain.layers, rtol=0, atol=0)
    assert ours.mean._update_count == plain.mean._update_count
    assert callback.regularizer.step == 4
    assert "training_step" not in ours.__dict__, "the module is as it was"


class Interrupted(Module):
    calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        if self.calls == 5:  # in the second pass of the first window
            raise RuntimeError("the machine is on fire")
        return super().training_step(batch, batch_idx)


def test_an_exception_in_the_second_pass_leaves_nothing_behind():
    module, before = Interrupted(net()), net()
    with pytest.raises(RuntimeError, match="on fire"):
        fit(module, regularization(), accumulate_grad_batches=3)
    assert_same(module.layers, before, rtol=0, atol=0)
    assert not {"training_step", "log"} & set(module.__dict__)
    assert module.mean._update_count == 3


class Silent(Module):
    silent = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.silent else loss


class InPlace(Module):
    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5)
        return super().training_step(batch, batch_idx)


def test_a_batch_that_is_altered_is_noticed():
    with pytest.raises(ValueError, match="another batch than the first pass"):
        fit(InPlace(net()), regularization())


def test_a_step_without_a_loss():
    module = Silent(net())
    module.silent = (1,)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(module, regularization(), accumulate_grad_batches=3, limit_train_batches=3, max_epochs=1)
    module.silent = (2,)
    with pytest.raises(ValueError, match="training_step returned None for the last micro-batch"):
        fit(module, regularization(), accumulate_grad_batches=3)


# Epochs and steps that a callback of the host runs without a backward pass.


class Skips(Module):
    """Leaves epochs or batches out, as a module may."""

    skipped = ()

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        return -1 if (self.current_epoch, batch_idx) in self.skipped else None


def averaged(kind, *callbacks, accumulate=1, gamma=GAMMA):
    """Weights averaged from epoch 2 of 4 on; with BatchNorm one more epoch runs for its statistics alone."""
    module, windows = Module(net(kind)), []
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)

    class Looks(Callback):
        def on_train_batch_end(self, *args):
            windows.extend(len(c._window) for c in callbacks if isinstance(c, GradientRegularization))

    trainer = fit(module, swa, *callbacks, Looks(), max_epochs=4, accumulate_grad_batches=accumulate)
    return module, trainer, windows


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["smooth", "batchnorm"])
@pytest.mark.filterwarnings("ignore:.*SWA.*")
def test_averaged_weights(kind, accumulate):
    plain, host, _ = averaged(kind, accumulate=accumulate)
    ours, trainer, _ = averaged(kind, regularization(gamma=0.0), accumulate=accumulate)
    assert_same(ours.layers, plain.layers, rtol=0, atol=0)
    assert trainer.global_step == host.global_step
    callback = regularization()
    ours, trainer, windows = averaged(kind, callback, accumulate=accumulate)
    assert trainer.global_step == host.global_step
    assert callback.regularizer is not None
    assert callback.regularizer.step == 4 * (5 if accumulate == 1 else 2), "as many as in the epochs that train"
    assert max(windows) <= accumulate, "the batches of an epoch without a backward pass are not kept"
    assert not torch.equal(ours.layers[0].weight, plain.layers[0].weight)


@pytest.mark.parametrize("skipped", [{(0, 0)}, {(0, 2), (0, 3)}, {(1, k) for k in range(5)}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_and_epochs_that_are_skipped(skipped, accumulate):
    def trained(*callbacks):
        module = Skips(net("dropout"))
        module.skipped = skipped
        trainer = fit(module, *callbacks, accumulate_grad_batches=accumulate)
        return module.layers, trainer.global_step

    plain, num_steps = trained()
    ours, num_ours = trained(regularization(gamma=0.0))
    assert_same(ours, plain, rtol=0, atol=0)
    assert num_steps == num_ours == trained(regularization())[1]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_window_without_any_loss_is_passed_over():
    module = Silent(net())
    module.silent = range(5)
    fit(module, regularization(), accumulate_grad_batches=3)
    assert_same(module.layers, net(), rtol=0, atol=0)


# Two processes.


def on_one_rank(rank, accumulate):
    import os

    os.environ["LOCAL_RANK"], os.environ["NODE_RANK"] = str(rank), "0"
    results = []
    for kind, clip in (("smooth", 0.1), ("batchnorm", None)):
        x, y = rows()
        module = Module(net(kind))
        data = DataLoader(TensorDataset(x[rank::2], y[rank::2]), batch_size=BATCH // 2)
        trainer = trainer_with(
            regularization(),
            strategy="ddp",
            devices=2,
            use_distributed_sampler=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
        )
        trainer.fit(module, data)
        results.append((module.layers.state_dict(), trainer.logged_metrics["penalty_ratio"].item()))
    wrapped = Wrapped(net())
    trainer_with(strategy="ddp", devices=2, use_distributed_sampler=False).fit(wrapped, data)
    return [*results, wrapped.layers.state_dict(), [model_parallel(rank, accumulate, *sizes) for sizes in SIZES]]


class Parallel(Module):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh, layers = self.device_mesh, self.layers
        if mesh["tensor_parallel"].size() > 1:
            parallelize_module(layers, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if mesh["data_parallel"].size() > 1:
            for module in (layers[0], layers):
                fully_shard(module, mesh=mesh["data_parallel"])


SIZES = [(2, 1), (1, 2)]  # data parallel, tensor parallel


def model_parallel(rank, accumulate, data_parallel, tensor_parallel):
    from lightning.pytorch.strategies import ModelParallelStrategy

    share = slice(rank, None, 2) if data_parallel == 2 else slice(None)
    module = Parallel(net())
    trainer = trainer_with(
        regularization(),
        strategy=ModelParallelStrategy(data_parallel, tensor_parallel, process_group_backend="gloo"),
        devices=2,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.1,
    )
    data = DataLoader(TensorDataset(*(t[share] for t in rows())), batch_size=BATCH // data_parallel)
    trainer.fit(module, data)
    return ranks.whole(module.layers), trainer.logged_metrics["penalty_ratio"].item()


def test_two_ranks_equal_one_process():
    of_ranks = ranks.on_two_ranks(on_one_rank, 3)
    theirs, one_by_one = net(), net()
    _, last = by_hand(theirs, 3, 0.1)
    by_hand(one_by_one)
    for (state, ratio), (state_bn, _), wrapped, parallel in of_ranks:
        torch.testing.assert_close(list(wrapped.values()), list(one_by_one.state_dict().values()), rtol=0, atol=1e-13)
        torch.testing.assert_close(list(state.values()), list(theirs.state_dict().values()), rtol=0, atol=1e-13)
        assert ratio == pytest.approx(last["penalty_ratio"].item(), rel=1e-6)
        same = [torch.equal(state_bn[k], of_ranks[0][1][0][k]) for k in state_bn if "running" not in k]
        assert all(same), "ranks agree"
        for weights, ratio_of_shards in parallel:
            torch.testing.assert_close(weights, list(theirs.state_dict().values()), rtol=0, atol=1e-13)
            assert ratio_of_shards == pytest.approx(last["penalty_ratio"].item(), rel=1e-6)


# What is refused.


class Manual(Module):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False


class Wrapped(Module):
    configure_gradient_clipping = LightningModule.configure_gradient_clipping

    def configure_optimizers(self):
        regularizer = gradreg.GradientRegularizer(self, GAMMA, EPSILON)
        return gradreg.RegularizedOptimizer(super().configure_optimizers(), regularizer)


class Drawing(Module):
    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return super().training_step(batch, 0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual(net()), "needs automatic_optimization=True"),
        (Wrapped(net()), "would regularize twice"),
        (Module(net(), optimizer=torch.optim.LBFGS), "LBFGS evaluates its closure several times"),
        (Drawing(net()), "draws its own batches"),
    ],
)
def test_the_callback_refuses(module, message):
    with pytest.raises(ValueError, match=message):
        fit(module, regularization())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "central"}, "more than one replay"),
        ({"scheme": "exact"}, "more than one replay"),
        ({"ascent_sync": "local"}, 'ascent_sync="local"'),
        ({"ascent": gradreg.Previous()}, "every\\(gamma, 10\\)"),
        ({"batch": gradreg.Fraction(0.1)}, "batch=Fraction"),
        ({"at": gradreg.Ahead(gradreg.Previous(), 1.0)}, "at=Ahead"),
        ({"gamma": -1.0}, "gamma must be a finite number"),
        ({"epsilon": 0.0}, "epsilon must be a finite number"),
    ],
)
def test_the_callback_refuses_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        regularization(**options)


def test_another_precision_plugin_is_refused():
    class Own(MixedPrecision):
        pass

    with pytest.raises(ValueError, match=r"must be served by one of .* got Own"):
        fit(Module(net()), regularization(), plugins=[Own("bf16-mixed", "cpu")])


# The optimizer wrapper alone, without the callback: right, or refused.


def test_a_wrapped_optimizer_is_right_without_accumulation_and_clipping():
    module, theirs = Wrapped(net("batchnorm")), net("batchnorm")
    fit(module)
    by_hand(theirs)
    assert_same(module.layers, theirs)


def test_a_wrapped_optimizer_is_right_in_bf16():
    module, theirs = Wrapped(net().float()), net().float()
    fit(module, precision="bf16-mixed")
    by_hand(theirs, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert_same(module.layers, theirs, rtol=1e-5, atol=1e-6)


class ClipsByItself(Wrapped):
    configure_gradient_clipping = Module.configure_gradient_clipping


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Wrapped, {"accumulate_grad_batches": 3}, r"accumulate_grad_batches=3\) hands the optimizer the last"),
        (Wrapped, {"gradient_clip_val": 0.1}, r"gradient_clip_val=0.1\) clips gradients inside the closure"),
        (ClipsByItself, {}, "configure_gradient_clipping clips gradients inside the closure"),
        (Wrapped, {"plugins": 16}, r"runs the closure by itself, once: use gradreg\.integrations\.lightning"),
    ],
)
def test_a_wrapped_optimizer_refuses(module, options, message):
    if "plugins" in options:
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))]}
    with pytest.raises(ValueError, match=message):
        fit(module(net().float()), **options)


class ByHand(Wrapped):
    """Manual optimization, by a closure or by none."""

    def __init__(self, *args, by_closure, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization, self.by_closure = False, by_closure

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = super(ByHand, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure if self.by_closure else None)


def test_manual_optimization():
    module, theirs = ByHand(net(), by_closure=True), net()
    fit(module)
    by_hand(theirs)
    assert_same(module.layers, theirs)
    with pytest.raises(ValueError, match="return the base optimizer from configure_optimizers"):
        fit(ByHand(net(), by_closure=False))
