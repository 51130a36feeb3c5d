"""The engine trains the diagonal network: gradient descent approaches the flow, an independent code, to first order."""

import math

import pytest
import torch

from gradreg import GradientRegularizer
from gradreg.theory import DiagonalNetwork, flow, sparse_regression

DATA = sparse_regression(5, 10, 2, shift=0.5, seed=1)
ALPHA, GAMMA, EPSILON, TIME = 0.4, 0.2, 0.2, 1.0
METHODS = ["forward", "backward", "central", "exact"]


def trained(scheme, rate, per_sample):
    """w₊ and w₋ after the time TIME, by gradient descent of step `rate` through the engine."""
    network = DiagonalNetwork(10, ALPHA)
    regularizer = GradientRegularizer(network, GAMMA, EPSILON, scheme=scheme)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    rows = [slice(i, i + 1) for i in range(5)] if per_sample else [slice(None)]
    for _ in range(round(TIME / rate)):
        optimizer.zero_grad()
        for group in rows:  # called once for each group: ĝ of each is added
            regularizer.backward(lambda group=group: network.loss(DATA.X[group], DATA.y[group]))
        for p in network.parameters():
            p.grad /= len(rows)
        optimizer.step()
    return torch.cat([network.w_plus, network.w_minus]).detach()


@pytest.mark.parametrize("per_sample", [False, True], ids=["full-batch", "per-sample"])
@pytest.mark.parametrize("scheme", METHODS)
def test_gradient_descent_approaches_the_flow_to_first_order(scheme, per_sample):
    there = flow(
        DATA.X, DATA.y, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON, scheme=scheme, per_sample=per_sample, max_time=TIME
    )
    assert there.time == TIME
    expected = torch.cat([there.w_plus, there.w_minus])
    coarse, fine = ((trained(scheme, rate, per_sample) - expected).norm().item() for rate in (0.01, 0.005))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.1)
    assert fine < 2e-2 * (expected - ALPHA).norm()


def test_each_scheme_has_a_flow_of_its_own():
    """The order above would not tell schemes apart if their flows were one: they differ by more than its error."""
    ends = {
        s: flow(DATA.X, DATA.y, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON, scheme=s, max_time=TIME).beta
        for s in METHODS
    }
    for a in METHODS:
        mine = trained(a, 0.005, False)
        beta = mine[:10] ** 2 - mine[10:] ** 2
        nearest = min(METHODS, key=lambda s: (ends[s] - beta).norm())
        assert nearest == a or (ends[nearest] - ends[a]).norm() < 1e-3
