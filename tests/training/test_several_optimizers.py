"""Several optimizers: Muon beside AdamW for one model, and one for each side of a GAN, in the modes that ask them."""

import copy

import pytest
import torch
from modes import RHO, Problem, norm, scaled
from problems import assert_close, assert_same
from torch import nn
from torch.nn import functional as F

import gradreg

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
KEYS = {"Muon": "momentum_buffer", "AdamW": "exp_avg", "SGD": "momentum_buffer"}


def muon_and_adamw(problem):
    """Matrices with the one, the rest with the other, as Muon is used."""
    matrices = [p for p in problem.parameters if p.ndim == 2]
    rest = [p for p in problem.parameters if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


def train(problem, regularizer, optimizers, steps):
    for _ in range(steps):
        problem.model.zero_grad()
        regularizer.backward(problem.loss, [problem.batch])
        for optimizer in optimizers:
            optimizer.step()


def momenta(parameters, optimizers):
    """What each optimizer keeps for its own parameters, in the order of the model."""
    states = [(o.state[p], KEYS[type(o).__name__]) for p in parameters for o in optimizers if p in o.state]
    return [state[key].clone() for state, key in states]


@pytest.mark.parametrize("sign", [-1, 1])
def test_msam_looks_along_the_momenta_of_all(sign):
    problem = Problem()
    optimizers = muon_and_adamw(problem)
    regularizer = gradreg.msam(problem.model, optimizers, RHO, sign=sign)
    train(problem, regularizer, optimizers, steps=3)
    v = momenta(problem.parameters, optimizers)
    assert len(v) == len(problem.parameters) == 4
    expected = problem.gradient(displaced_by=scaled(v, sign * RHO / norm(v)))
    before = copy.deepcopy(problem.model.state_dict())
    problem.model.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, expected, rtol=1e-12, atol=1e-14)
    assert_same(problem.model.state_dict(), before)
    plain = problem.gradient()
    assert max((g - p).abs().max() for g, p in zip(expected, plain)) > 1e-4, "the displacement is seen"


def split_ahead(model, optimizers, rho):
    """Half of the batch at θ, half of it ahead along the momentum."""
    ascent = gradreg.Momentum(optimizers)
    return gradreg.GradientRegularizer(model, rho / 2, rho, ascent=ascent, batch=gradreg.Split())


def test_a_split_batch_looks_ahead_along_the_momenta_of_all():
    rho = 0.04
    problem = Problem()
    optimizers = muon_and_adamw(problem)
    regularizer = split_ahead(problem.model, optimizers, rho)
    train(problem, regularizer, optimizers, steps=2)
    v = momenta(problem.parameters, optimizers)
    first = problem.gradient(problem.rows(0, 5))
    second = problem.gradient(problem.rows(5, 10), scaled(v, -rho / norm(v)))
    expected = [(g1 + g2) / 2 for g1, g2 in zip(first, second)]
    problem.model.zero_grad()
    regularizer.backward(problem.loss, [problem.batch])
    assert_close(problem.gradients, expected, rtol=1e-10, atol=1e-13)


def test_f_gr_asks_no_optimizer():
    problem = Problem()
    optimizers = muon_and_adamw(problem)
    regularizer = gradreg.GradientRegularizer(problem.model, 0.1, 0.05)
    train(problem, regularizer, optimizers, steps=2)
    first = problem.gradient()
    second = problem.gradient(displaced_by=scaled(first, 0.05))
    problem.model.zero_grad()
    regularizer.backward(problem.loss)
    assert_close(problem.gradients, [g1 + 2 * (g2 - g1) for g1, g2 in zip(first, second)], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [gradreg.msam, split_ahead])
def test_one_of_two_optimizers_is_not_enough(make):
    problem = Problem()
    muon, _ = muon_and_adamw(problem)
    with pytest.raises(ValueError, match=r"'0\.bias'; give it all of them, name every optimizer \(a list\)"):
        make(problem.model, muon, RHO)
    make(problem.model, [muon, torch.optim.AdamW([p for p in problem.parameters if p.ndim == 1])], RHO)


def test_the_one_without_momentum_is_named():
    problem = Problem()
    muon, _ = muon_and_adamw(problem)
    rest = torch.optim.SGD([p for p in problem.parameters if p.ndim == 1], lr=0.1)
    with pytest.raises(ValueError, match="needs an optimizer with momentum, got SGD without"):
        gradreg.msam(problem.model, [muon, rest], RHO)


@pytest.mark.parametrize("optimizers", [[], ["muon"], [None]], ids=str)
def test_what_is_no_optimizer_is_refused(optimizers):
    with pytest.raises(TypeError, match=r"^optimizer must be a built torch.optim.Optimizer, or a list of them"):
        gradreg.msam(Problem().model, optimizers, RHO)


def test_they_are_named():
    assert repr(gradreg.Momentum(muon_and_adamw(Problem()))) == "Momentum(Muon and AdamW, sign=-1)"


# A GAN: each side has its optimizer and its regularizer.


class Adversaries:
    def __init__(self):
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.noise, self.real = torch.randn(10, 3).double(), torch.randn(10, 4).double()
        self.sides = [self.generator, self.discriminator]
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in self.sides]

    def losses(self):
        generator, discriminator = self.sides

        def of_generator(batch=None):
            noise = self.noise if batch is None else batch[0]
            return F.softplus(-discriminator(generator(noise))).mean()

        def of_discriminator(batch=None):
            noise, real = (self.noise, self.real) if batch is None else batch
            made = generator(noise).detach()
            return (F.softplus(-discriminator(real)) + F.softplus(discriminator(made))).mean()

        return of_generator, of_discriminator

    def turn(self, regularizers, steps):
        for _ in range(steps):
            for loss_fn, optimizer, regularizer in zip(self.losses(), self.optimizers, regularizers):
                optimizer.zero_grad()
                regularizer.backward(loss_fn, [(self.noise, self.real)])
                optimizer.step()


def at(loss_fn, side, displaced_by, batch=None):
    """The gradient of one side, displaced and put back."""
    parameters = list(side.parameters())
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, displaced_by):
            p += d
    found = torch.autograd.grad(loss_fn(batch), parameters)
    with torch.no_grad():
        for p, w in zip(parameters, kept):
            p.copy_(w)
    return found


def test_a_gan_with_msam_on_one_side_and_a_split_batch_on_the_other():
    rho = 0.04
    gan = Adversaries()
    generator, discriminator = gan.sides
    regularizers = [
        gradreg.msam(generator, gan.optimizers[0], RHO),
        split_ahead(discriminator, gan.optimizers[1], rho),
    ]
    gan.turn(regularizers, steps=3)
    of_generator, of_discriminator = gan.losses()

    v = [gan.optimizers[0].state[p]["momentum_buffer"] for p in generator.parameters()]
    expected = at(of_generator, generator, scaled(v, -RHO / norm(v)))
    gan.optimizers[0].zero_grad()
    regularizers[0].backward(of_generator)
    assert_close([p.grad for p in generator.parameters()], list(expected), rtol=1e-10, atol=1e-13)

    v = [gan.optimizers[1].state[p]["momentum_buffer"] for p in discriminator.parameters()]
    half = len(gan.real) // 2
    first = at(of_discriminator, discriminator, scaled(v, 0), (gan.noise[:half], gan.real[:half]))
    second = at(of_discriminator, discriminator, scaled(v, -rho / norm(v)), (gan.noise[half:], gan.real[half:]))
    expected = [(g1 + g2) / 2 for g1, g2 in zip(first, second)]
    gan.optimizers[1].zero_grad()
    regularizers[1].backward(of_discriminator, [(gan.noise, gan.real)])
    assert_close([p.grad for p in discriminator.parameters()], expected, rtol=1e-10, atol=1e-13)
