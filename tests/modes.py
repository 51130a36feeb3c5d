"""Modes below two passes, and a small problem to hold each against its formula."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradreg

RHO = 0.05


class Problem:
    """A small model in float64 with a batch of ten rows; counts its forwards."""

    def __init__(self, *layers, seed=0):
        torch.manual_seed(seed)
        body = layers or (nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.model = nn.Sequential(*body).double()
        self.batch = torch.randn(10, 4).double(), torch.randint(3, (10,))
        self.forwards = 0

    def loss(self, batch=None):
        self.forwards += 1
        x, y = self.batch if batch is None else batch
        return F.cross_entropy(self.model(x), y)

    def gradient(self, batch=None, displaced_by=None):
        """∇L of a batch at θ + a displacement, on a copy of the model."""
        twin = copy.deepcopy(self)
        parameters = list(twin.model.parameters())
        if displaced_by is not None:
            with torch.no_grad():
                for p, d in zip(parameters, displaced_by):
                    p.add_(d)
        return list(torch.autograd.grad(twin.loss(batch), parameters))

    def rows(self, start, stop):
        x, y = self.batch
        return x[start:stop], y[start:stop]

    @property
    def parameters(self):
        return list(self.model.parameters())

    @property
    def gradients(self):
        return [p.grad for p in self.parameters]

    def train(self, regularizer, optimizer, steps=1):
        for _ in range(steps):
            optimizer.zero_grad()
            regularizer.backward(self.loss, [self.batch])
            optimizer.step()


def norm(vectors):
    return math.sqrt(sum(float(v.square().sum()) for v in vectors))


def scaled(vectors, factor):
    return [factor * v for v in vectors]


def sgd(problem, **options):
    return torch.optim.SGD(problem.parameters, **{"lr": 0.1, "momentum": 0.9, **options})


BASES = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum_buffer"),
    "SGD, Nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "momentum_buffer"),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, momentum=0.9), "momentum_buffer"),
    "Adam": (torch.optim.Adam, "exp_avg"),
    "AdamW": (torch.optim.AdamW, "exp_avg"),
    "NAdam": (torch.optim.NAdam, "exp_avg"),
    "Adamax": (torch.optim.Adamax, "exp_avg"),
}


def by_backward(regularizer, optimizer, problem):
    optimizer.zero_grad()
    return regularizer.backward(problem.loss)


def by_window(regularizer, optimizer, problem):
    optimizer.zero_grad()
    parts = [problem.rows(0, 5), problem.rows(5, 10)]
    return regularizer.backward(lambda batch: problem.loss(batch) / 2, parts)


def by_perturbed(regularizer, optimizer, problem):
    optimizer.zero_grad()
    with regularizer.perturbed():
        problem.loss().backward()


def by_closure(regularizer, optimizer, problem):
    def closure():
        problem.model.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    regularizer.run_closure(closure)


DOORS = {
    "backward": (by_backward, 1),
    "window": (by_window, 2),
    "perturbed": (by_perturbed, 1),
    "closure": (by_closure, 1),
}

ONE_PASS = {
    "momentum": lambda problem, optimizer: gradreg.msam(problem.model, optimizer, RHO),
    "previous": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, RHO, RHO, ascent=gradreg.Previous()
    ),
    "split": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, RHO / 2, RHO, ascent=gradreg.Momentum(optimizer), batch=gradreg.Split()
    ),
    "split, own gradient": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, RHO / 2, RHO, batch=gradreg.Split()
    ),
}

CHEAP = {
    **ONE_PASS,
    "fraction": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, 0.1, RHO, batch=gradreg.Fraction(0.3)
    ),
    "large gradients": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, 0.1, RHO, when=gradreg.LargeGradients()
    ),
    "ahead": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model,
        0.1,
        RHO,
        batch=gradreg.Fraction(0.3),
        at=gradreg.Ahead(gradreg.Momentum(optimizer), rho=0.3),
    ),
    "ahead of the previous": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, 0.1, RHO, at=gradreg.Ahead(gradreg.Previous(), rho=0.3)
    ),
    "bernoulli": lambda problem, optimizer: gradreg.GradientRegularizer(
        problem.model, gradreg.bernoulli(0.1, 0.5), RHO
    ),
    "cheap": lambda problem, optimizer: gradreg.cheap(problem.model, 0.1, RHO, period=2),
}

each_mode = pytest.mark.parametrize("mode", CHEAP)


def dropping():
    torch.manual_seed(0)
    return Problem(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
