"""skorch through the third door: `train_step` hands its closure to the optimizer, against a loop by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradreg

pytest.importorskip("skorch")

import numpy as np
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback

GAMMA, EPSILON, BATCH, EPOCHS = 0.3, 0.1, 5, 3


class Regularized(Callback):
    """The recipe of docs/hosts.md: once the net is made, and before the first step, the optimizer is wrapped."""

    def on_train_begin(self, net, X=None, y=None, **kwargs):
        if not isinstance(net.optimizer_, gradreg.RegularizedOptimizer):
            regularizer = gradreg.GradientRegularizer(net.module_, GAMMA, EPSILON)
            net.optimizer_ = gradreg.RegularizedOptimizer(net.optimizer_, regularizer)


def module(kind="smooth"):
    torch.manual_seed(0)
    middle = {"smooth": [], "dropout": [nn.Dropout(0.5)], "batchnorm": [nn.BatchNorm1d(8)]}[kind]
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *middle, nn.Linear(8, 3)).double()


def rows():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 4, generator=generator).double(), torch.arange(20) % 3


def net(layers, *callbacks, **options):
    plain = {"lr": 0.2, "optimizer": torch.optim.SGD, "optimizer__momentum": 0.9, "criterion": nn.CrossEntropyLoss}
    plain |= {"batch_size": BATCH, "max_epochs": EPOCHS, "train_split": None, "verbose": 0}
    return NeuralNetClassifier(layers, callbacks=list(callbacks), **{**plain, **options})


def fitted(layers, *callbacks, **options):
    torch.manual_seed(7)
    x, y = rows()
    made = net(layers, *callbacks, **options)
    made.fit(x.numpy(), y.numpy())
    return made


def by_hand(layers, epochs=EPOCHS):
    """The same training with nothing but autograd; the losses at θ."""
    batches = DataLoader(TensorDataset(*rows()), BATCH)  # which draws a random number an epoch, as skorch's does
    parameters = list(layers.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    losses = []
    torch.manual_seed(7)
    layers.train()
    for _ in range(epochs):
        for batch in batches:
            random, buffers = torch.get_rng_state(), [b.clone() for b in layers.buffers()]

            def gradient(batch=batch):
                loss = F.cross_entropy(layers(batch[0]), batch[1])
                return loss.detach(), torch.autograd.grad(loss, parameters)

            loss, first = gradient()
            losses.append(loss)
            after, counted = torch.get_rng_state(), [b.clone() for b in layers.buffers()]
            torch.set_rng_state(random)
            with torch.no_grad():
                weights = [p.clone() for p in parameters]
                for p, g in zip(parameters, first):
                    p += EPSILON * g
                for b, old in zip(layers.buffers(), buffers):
                    b.copy_(old)
            _, second = gradient()
            torch.set_rng_state(after)
            with torch.no_grad():
                for p, w, g1, g2 in zip(parameters, weights, first, second):
                    p.copy_(w)
                    p.grad = g1 + GAMMA / EPSILON * (g2 - g1)
                for b, new in zip(layers.buffers(), counted):
                    b.copy_(new)
            optimizer.step()
    return torch.stack(losses)


def assert_same(ours, theirs, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(list(ours.state_dict().values()), list(theirs.state_dict().values()), **tolerance)


@pytest.mark.parametrize("kind", ["smooth", "dropout", "batchnorm"])
def test_it_equals_a_loop_by_hand(kind):
    made, theirs = fitted(module(kind), Regularized()), module(kind)
    losses = by_hand(theirs)
    assert_same(made.module_, theirs)
    found = [epoch["train_loss"] for epoch in made.history]
    assert found == pytest.approx(losses.view(EPOCHS, -1).mean(1).tolist()), "losses at θ, once"
    assert made.optimizer_.regularizer.diagnostics()["active_steps"] == 12


def test_the_penalty_is_seen():
    plain, made = fitted(module()), fitted(module(), Regularized())
    gap = max((p - q).abs().max() for p, q in zip(plain.module_.parameters(), made.module_.parameters()))
    assert gap > 1e-3


def test_fitting_on_goes_on():
    """`partial_fit` keeps the optimizer, and the callback leaves it wrapped once."""
    x, y = (t.numpy() for t in rows())
    made, theirs = fitted(module(), Regularized()), module()
    made.partial_fit(x, y, epochs=2)
    by_hand(theirs, EPOCHS + 2)
    assert_same(made.module_, theirs)


def test_saved_and_taken_up(tmp_path):
    """Parameters and optimizer: N epochs, save, load and M epochs equal N + M."""
    x, y = (t.numpy() for t in rows())
    paths = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    first = fitted(module(), Regularized())
    first.save_params(**paths)
    again = net(module(), Regularized())
    again.initialize()
    Regularized().on_train_begin(again)
    again.load_params(**paths)
    again.partial_fit(x, y, epochs=2)
    theirs = module()
    by_hand(theirs, EPOCHS + 2)
    assert_same(again.module_, theirs)
    assert again.optimizer_.regularizer.step == 20


def test_predictions_are_those_of_the_true_weights():
    x, _ = rows()
    made = fitted(module(), Regularized())
    with torch.no_grad():
        expected = made.module_.eval()(x).argmax(1)
    assert np.array_equal(made.predict(x.numpy()), expected.numpy())
