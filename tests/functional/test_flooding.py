"""Flooding performs gradient regularization: two steps around the level are one step of the penalty."""

import pytest
import torch
from torch.func import grad

from gradreg import Flooding
from gradreg.functional import flooded, penalty_gradient


@pytest.mark.parametrize(("loss", "expected"), [(0.5, 0.5), (0.1, 0.1), (0.0, 0.2)])
def test_above_the_level_nothing_changes_and_below_it_mirrors(loss, expected):
    # |0 − 0.1| + 0.1 = 0.2
    torch.testing.assert_close(Flooding(0.1)(torch.tensor(loss)), torch.tensor(expected))
    torch.testing.assert_close(flooded(torch.tensor(loss), 0.1), torch.tensor(expected))


def loss(p):
    return (p**2 / 2 + p**4 / 4).sum()


def two_steps(p, level, rate):
    for _ in range(2):
        p = p - rate * grad(lambda q: Flooding(level)(loss(q)))(p)
    return p


start = torch.tensor([0.6, -0.4], dtype=torch.float64)
RATE = 0.05


def test_below_then_above_is_a_step_of_the_forward_penalty():
    """Ascent to θ + η∇L, then descent by its gradient: θ − η² [∇L(θ + η∇L) − ∇L(θ)]/η."""
    there = start + RATE * grad(loss)(start)
    level = ((loss(start) + loss(there)) / 2).item()
    assert loss(start) < level < loss(there)
    expected = start - RATE**2 * penalty_gradient(loss, start, scheme="forward", epsilon=RATE)
    torch.testing.assert_close(two_steps(start, level, RATE), expected, rtol=1e-14, atol=1e-15)


def test_above_then_below_is_a_step_of_the_backward_penalty():
    """Descent to θ − η∇L, then ascent by its gradient: θ − η² [∇L(θ) − ∇L(θ − η∇L)]/η."""
    there = start - RATE * grad(loss)(start)
    level = ((loss(start) + loss(there)) / 2).item()
    assert loss(there) < level < loss(start)
    expected = start - RATE**2 * penalty_gradient(loss, start, scheme="backward", epsilon=RATE)
    torch.testing.assert_close(two_steps(start, level, RATE), expected, rtol=1e-14, atol=1e-15)
