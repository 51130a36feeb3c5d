"""Interrupts by real signals at random moments: the weights are θ, in place, and the next step is right."""

import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from by_hand import SEED, Idle, expected, loss_of, net, regularizer_of
from problems import assert_close, assert_same, gradients

import gradreg
from gradreg.training import displacement

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a __del__

ENGINE = str(Path(gradreg.training.__file__).parent)
NAMES = list(net().state_dict())


class Interrupt(BaseException):
    """As KeyboardInterrupt: no `except Exception` stops it."""


# One step of each door. The first pass of door 2 is the caller's, before the interrupts begin.


class Step:
    def __init__(self, door, **options):
        self.door = door
        self.model = net()
        self.regularizer = regularizer_of(self.model, **options)
        self.optimizer = gradreg.RegularizedOptimizer(Idle(self.model.parameters()), self.regularizer)

    def prepare(self):
        self.model.zero_grad()
        torch.manual_seed(SEED)
        if self.door == "perturbed":
            loss_of(self.model).backward()

    def run(self):
        if self.door == "backward":
            self.regularizer.backward(lambda: loss_of(self.model))
        elif self.door == "closure":
            self.optimizer.step(self._closure)
        else:
            with self.regularizer.perturbed():
                loss_of(self.model).backward()

    def _closure(self):
        self.optimizer.zero_grad()
        loss = loss_of(self.model)
        loss.backward()
        return loss

    def places(self):
        return [(id(p), p.data_ptr(), p.detach().clone()) for p in self.model.parameters()]

    def hooks(self):
        """How many hooks there are, of any kind, on modules and parameters."""
        on_modules = [len(v) for m in self.model.modules() for name, v in sorted(vars(m).items()) if "hooks" in name]
        kinds = "_backward_hooks", "_post_accumulate_grad_hooks"
        return on_modules, [len(getattr(p, kind) or ()) for p in self.model.parameters() for kind in kinds]

    def moment(self):
        return [[b.clone() for b in self.model.buffers()], torch.get_rng_state()]


def reset(model):
    """Buffers of a fresh model."""
    with torch.no_grad():
        for b, fresh in zip(model.buffers(), net().buffers()):
            b.copy_(fresh)


def interrupted(take, context):
    """What the step left, and whether it was cut short."""
    try:
        with context:
            take.run()
    except (Interrupt, KeyboardInterrupt):
        return True
    return False


def check(take, before, after_one_pass, by_hand):
    """All that holds after an interrupt, wherever it struck."""
    places, moment, old_gradients, hooks = before
    assert_same(take.places(), places)
    assert list(take.model.state_dict()) == NAMES
    assert take.hooks() == hooks
    assert torch.is_grad_enabled()
    left = gradients(take.model)
    if take.regularizer.step == 1:
        assert_close(left, by_hand)
        assert_same(take.moment(), after_one_pass)
        return
    assert take.regularizer.step == 0
    allowed = [old_gradients] if take.door == "backward" else [old_gradients, [None] * len(left)]
    assert any(same(left, some) for some in allowed), "a half-made gradient"
    assert any(same(take.moment(), some) for some in (moment, after_one_pass)), "half-made buffers or random state"


def same(tree, other):
    try:
        assert_same(tree, other)
    except AssertionError:
        return False
    return True


def fresh_step(take):
    """The next step of the same regularizer gives what a fresh one gives."""
    reset(take.model)
    take.prepare()
    take.run()
    return gradients(take.model)


def run_with(take, context, by_hand):
    take.prepare()
    before = take.places(), take.moment(), gradients(take.model), take.hooks()
    plain = net()
    torch.manual_seed(SEED)
    loss_of(plain).backward()
    after_one_pass = [[b.clone() for b in plain.buffers()], torch.get_rng_state()]
    if take.door != "perturbed":
        torch.manual_seed(SEED)
    was_cut = interrupted(take, context)
    try:
        check(take, before, after_one_pass, by_hand)
        assert_close(fresh_step(take), by_hand)
    finally:
        torch.set_grad_enabled(True)  # or one failure would be that of all tests
    return was_cut


@pytest.fixture(params=["pointing", "in place"])
def branch(request, monkeypatch):
    if request.param == "in place":
        monkeypatch.setattr(displacement, "_may_point_elsewhere", lambda p: False)


DOORS = ["backward", "perturbed", "closure"]


# Real signals, at moments that no line of ours chooses.


@pytest.fixture
def alarm():
    """A handler that interrupts a step and nothing else. The timer may be a time limit's: it is set back."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        pytest.skip("needs interval timers, and the main thread")

    def interrupt(number, frame):
        while frame is not None:
            if frame.f_code is Step.run.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    rest = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, *rest)


class After:
    """A context in which a signal comes after a delay."""

    def __init__(self, delay):
        self.delay = delay

    def __enter__(self):
        signal.setitimer(signal.ITIMER_REAL, self.delay)

    def __exit__(self, *exception):
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("door", DOORS)
def test_a_signal_at_any_moment(door, branch, seed):
    by_hand, dice, take = expected(net(), loss_of), random.Random(seed), Step(door)
    for _ in range(40):
        reset(take.model)
        take.regularizer.step = 0
        run_with(take, After(10 ** dice.uniform(-4.5, -1.8)), by_hand)
