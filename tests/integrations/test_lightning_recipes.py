"""Lightning without the callback: Fabric and manual optimization through the first door, against loops by hand."""

import gc
from functools import partial

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F

import gradreg

pytest.importorskip("lightning")
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule

from tests.integrations.test_lightning import (
    EPSILON,
    GAMMA,
    HOST,
    SGD,
    Module,
    assert_same,
    by_hand,
    fit,
    loader,
    net,
)

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in HOST]


# Fabric: the loop is the user's, the wrapper and the precision are Fabric's.


def with_fabric(layers, accumulate=1, clip=None, share=slice(None), **options):
    """The recipe of docs/hosts.md; each batch brings its number, as seed of its dropout masks."""
    fabric = Fabric(accelerator="cpu", **{"devices": 1, **options})
    fabric.launch()
    model, optimizer = fabric.setup(layers, SGD(layers.parameters()))
    regularizer = gradreg.GradientRegularizer(model, GAMMA, EPSILON)
    batches = [(k, x[share], y[share]) for k, (x, y) in enumerate(loader())]

    def loss_fn(batch):
        seed, x, y = batch
        torch.manual_seed(seed)
        return F.cross_entropy(model(x), y) / accumulate

    losses = []
    for _ in range(2):
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            optimizer.zero_grad()
            losses.append(regularizer.backward(loss_fn, window, backward=fabric.backward))
            if clip is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
    return losses, regularizer


@pytest.mark.parametrize("kind", ["smooth", "dropout", "batchnorm"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.1)])
def test_fabric_equals_a_loop_by_hand(kind, accumulate, clip):
    ours, theirs = net(kind), net(kind)
    _, regularizer = with_fabric(ours, accumulate, clip)
    _, last = by_hand(theirs, accumulate, clip)
    assert_same(ours, theirs)
    assert regularizer.diagnostics()["active_steps"] == (10 if accumulate == 1 else 4)
    assert last["penalty_ratio"] > 0.01


def test_fabric_in_bf16():
    ours, theirs = net().float(), net().float()
    with_fabric(ours, 3, 0.1, precision="bf16-mixed")
    by_hand(theirs, 3, 0.1, autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)


def test_names_match_through_the_wrapper_and_nothing_stays_on_the_model():
    fabric, layers = Fabric(accelerator="cpu", devices=1), net()
    model, _ = fabric.setup(layers, SGD(layers.parameters()))
    regularizer = gradreg.GradientRegularizer(model, GAMMA, EPSILON, include=["0.*"])
    assert list(regularizer.selection.named) == ["0.weight", "0.bias"]
    regularizer.backward(lambda: model(torch.ones(2, 6).double()).square().mean(), backward=fabric.backward)
    assert "_compiled_call_impl" not in vars(layers)
    assert "_compiled_call_impl" in vars(model)
    del regularizer
    gc.collect()
    assert "_compiled_call_impl" not in vars(model)


def on_one_rank(rank):
    import os

    os.environ["LOCAL_RANK"], os.environ["NODE_RANK"] = str(rank), "0"
    layers = net()
    _, regularizer = with_fabric(layers, 3, share=slice(rank, None, 2), strategy="ddp", devices=2)
    return layers.state_dict(), regularizer._engine.ranks.is_replicated


def test_fabric_on_two_ranks_equals_one_process():
    theirs = net()
    by_hand(theirs, 3)
    for state, is_replicated in ranks.on_two_ranks(on_one_rank):
        assert is_replicated, "the wrapper within Fabric's is known, and gradients are averaged once a pass"
        torch.testing.assert_close(list(state.values()), list(theirs.state_dict().values()), rtol=0, atol=1e-13)


# Manual optimization: the module steps by itself.


class Manual(Module):
    def __init__(self, layers, accumulate=1):
        super().__init__(layers)
        self.automatic_optimization = False
        self.accumulate, self.window = accumulate, []

    def on_fit_start(self):
        self.regularizer = gradreg.GradientRegularizer(self.layers, GAMMA, EPSILON)

    def loss(self, batch):
        seed, (x, y) = batch
        torch.manual_seed(seed)
        return F.cross_entropy(self.layers(x), y) / self.accumulate

    def training_step(self, batch, batch_idx):
        self.window.append((batch_idx, batch))
        if len(self.window) < self.accumulate and not self.trainer.is_last_batch:
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.log("loss", self.regularizer.backward(self.loss, self.window, backward=self.manual_backward))
        optimizer.step()
        self.window.clear()


@pytest.mark.parametrize("kind", ["smooth", "dropout", "batchnorm"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("ignore:.*automatic optimization.*")
def test_manual_optimization_equals_a_loop_by_hand(kind, accumulate):
    module, theirs = Manual(net(kind), accumulate), net(kind)
    trainer = fit(module)
    by_hand(theirs, accumulate)
    assert_same(module.layers, theirs)
    assert trainer.global_step == (10 if accumulate == 1 else 4)


class Adversaries(LightningModule):
    """A generator and a discriminator, each with its optimizer and its regularizer, in turns."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def on_fit_start(self):
        self.regularizers = [
            gradreg.GradientRegularizer(part, GAMMA, EPSILON) for part in (self.generator, self.discriminator)
        ]

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.2) for part in (self.generator, self.discriminator)]

    def losses(self, x):
        generator, discriminator = self.generator, self.discriminator
        noise = x[:, :3].sin()

        def of_generator():
            return F.softplus(-discriminator(generator(noise))).mean()

        def of_discriminator():
            made = generator(noise).detach()
            return (F.softplus(-discriminator(x)) + F.softplus(discriminator(made))).mean()

        return of_generator, of_discriminator

    def training_step(self, batch, batch_idx):
        turns = zip(self.losses(batch[0]), self.optimizers(), self.regularizers, (self.generator, self.discriminator))
        for loss_fn, optimizer, regularizer, part in turns:
            self.toggle_optimizer(optimizer)
            part.zero_grad()
            regularizer.backward(loss_fn, backward=self.manual_backward)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def adversaries_by_hand():
    """The same turns with nothing but autograd: the other network stands still, in both passes."""
    model = Adversaries()
    for _ in range(2):
        for x, _ in loader():
            for loss_fn, part in zip(model.losses(x), (model.generator, model.discriminator)):
                parameters = list(part.parameters())
                first = torch.autograd.grad(loss_fn(), parameters)
                with torch.no_grad():
                    weights = [p.clone() for p in parameters]
                    for p, g in zip(parameters, first):
                        p += EPSILON * g
                second = torch.autograd.grad(loss_fn(), parameters)
                with torch.no_grad():
                    for p, w, g1, g2 in zip(parameters, weights, first, second):
                        p.copy_(w - 0.2 * (g1 + GAMMA / EPSILON * (g2 - g1)))
    return model


@pytest.mark.filterwarnings("ignore:.*automatic optimization.*")
def test_a_gan_equals_turns_by_hand():
    module = Adversaries()
    fit(module)
    assert_same(module, adversaries_by_hand())
    assert all(r.diagnostics()["active_steps"] == 10 for r in module.regularizers)
    plain = Adversaries()
    assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters()))
