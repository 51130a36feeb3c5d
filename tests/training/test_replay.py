"""What is replayed: the global generators, of which two are looked at in memory, and buffers."""

import random

import numpy as np
import pytest
import torch
from by_hand import each_door, expected, net, regularizer_of, step
from problems import assert_close, gradients

from gradreg.training import replay
from gradreg.training.replay import RandomState

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "NumPy": np.random.rand,
    "NumPy's normal": np.random.randn,
    "a whole round of words": lambda: [random.getrandbits(32) for _ in range(624)][-1],
    "of NumPy": lambda: np.random.randint(0, 2**32, 624, dtype=np.uint32)[-1],
}


@pytest.fixture(autouse=True)
def seeded():
    np.random.set_bit_generator(np.random.MT19937())  # type: ignore[attr-defined]
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)


@pytest.mark.parametrize("num_before", [0, 1, 2, 623, 624, 625])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_is_drawn_is_noticed_and_taken_back(draw, num_before):
    for _ in range(num_before):
        draw()
    before = RandomState(())
    assert before.is_same(RandomState(()))
    numbers = [draw() for _ in range(3)]
    after = RandomState(())
    assert not before.is_same(after)
    before.restore()
    assert before.is_same(RandomState(()))
    assert [draw() for _ in range(3)] == numbers
    following = draw()
    after.restore()
    assert draw() == following


@pytest.mark.parametrize("change", [random.seed, np.random.seed, torch.manual_seed])
def test_a_new_seed_is_noticed(change):
    before = RandomState(())
    change(1)
    assert not before.is_same(RandomState(()))


def test_another_generator_of_numpy_is_followed():
    RandomState(())
    np.random.set_bit_generator(np.random.PCG64(3))  # type: ignore[attr-defined]
    before = RandomState(())
    assert before.is_same(RandomState(()))
    numbers = np.random.rand(5)
    assert not before.is_same(RandomState(()))
    before.restore()
    np.testing.assert_array_equal(np.random.rand(5), numbers)


def test_a_python_that_keeps_its_state_elsewhere_is_asked(monkeypatch):
    asked = replay.Twister(lambda: (random.getstate(), False), random.setstate, None, 0)
    monkeypatch.setattr(replay, "_PYTHON", asked)
    test_what_is_drawn_is_noticed_and_taken_back(random.random, 2)


@each_door
@pytest.mark.parametrize("draw", [DRAWS["gauss"], DRAWS["NumPy's normal"]], ids=["gauss", "NumPy's normal"])
def test_a_normal_number_in_advance_is_replayed_too(draw, door):
    def loss(model):
        out = model(torch.linspace(-1, 1, 12).double().view(3, 4))
        return out.square().mean() * (1 + draw() ** 2)

    model = net()
    draw()  # the generator holds the second of a pair now
    state = random.getstate(), np.random.get_state()
    by_hand = expected(model, once(loss, state))
    random.setstate(state[0])
    np.random.set_state(state[1])
    step(door, regularizer_of(model), loss)
    assert_close(gradients(model), by_hand)


def once(loss, state):
    """The loss with the numbers that follow a state, whenever it is asked."""

    def again(model):
        random.setstate(state[0])
        np.random.set_state(state[1])
        return loss(model)

    return again
