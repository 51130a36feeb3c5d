"""Interrupts at any line: Ctrl-C, a signal, a full memory. The weights are θ, in place, and the next step is right.

An exception is raised at the k-th line that runs inside the engine, for many k: a tracer counts lines of
`gradreg/training`. What holds afterwards is the same wherever it struck.
"""

import random
import signal
import sys
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


class AtLine:
    """A context that raises `Interrupt` when the k-th line of the engine is about to run; counts them without k."""

    def __init__(self, k=None):
        self.k, self.lines = k, 0
        self._tracers = self._enter, self._line  # kept: the interpreter was once seen to call one that was gone

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._tracers[0])
        return self

    def __exit__(self, *exception):
        sys.settrace(self._before)

    def _enter(self, frame, event, argument):
        is_loop = frame.f_code.co_name.startswith("<")  # a comprehension, whose lines are as many as its items
        return self._tracers[1] if frame.f_code.co_filename.startswith(ENGINE) and not is_loop else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.k:
                sys.settrace(None)
                raise Interrupt
        return self._tracers[1]


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


def interrupted(one, context):
    """What the step left, and whether it was cut short."""
    try:
        with context:
            one.run()
    except (Interrupt, KeyboardInterrupt):
        return True
    return False


def check(one, before, after_one_pass, by_hand):
    """All that holds after an interrupt, wherever it struck."""
    places, moment, old_gradients, hooks = before
    assert_same(one.places(), places)
    assert list(one.model.state_dict()) == NAMES
    assert one.hooks() == hooks
    assert torch.is_grad_enabled()
    left = gradients(one.model)
    if one.regularizer.step == 1:
        assert_close(left, by_hand)
        assert_same(one.moment(), after_one_pass)
        return
    assert one.regularizer.step == 0
    allowed = [old_gradients] if one.door == "backward" else [old_gradients, [None] * len(left)]
    assert any(same(left, some) for some in allowed), "a half-made gradient"
    assert any(same(one.moment(), some) for some in (moment, after_one_pass)), "half-made buffers or random state"


def same(tree, other):
    try:
        assert_same(tree, other)
    except AssertionError:
        return False
    return True


def fresh_step(one):
    """The next step of the same regularizer gives what a fresh one gives."""
    reset(one.model)
    one.prepare()
    one.run()
    return gradients(one.model)


def run_with(one, context, by_hand):
    one.prepare()
    before = one.places(), one.moment(), gradients(one.model), one.hooks()
    plain = net()
    torch.manual_seed(SEED)
    loss_of(plain).backward()
    after_one_pass = [[b.clone() for b in plain.buffers()], torch.get_rng_state()]
    if one.door != "perturbed":
        torch.manual_seed(SEED)
    was_cut = interrupted(one, context)
    try:
        check(one, before, after_one_pass, by_hand)
        assert_close(fresh_step(one), by_hand)
    finally:
        torch.set_grad_enabled(True)  # or one failure would be that of all tests
    return was_cut


def lines_of(one):
    """How many lines a step runs."""
    one.prepare()
    with AtLine() as counting:
        one.run()
    return counting.lines


def sample(total, stride):
    """Every `stride`-th line, and all of the first and last."""
    return sorted({*range(1, total + 1, stride), *range(1, min(12, total)), *range(max(1, total - 25), total + 1)})


@pytest.fixture(params=["pointing", "in place"])
def branch(request, monkeypatch):
    if request.param == "in place":
        monkeypatch.setattr(displacement, "_may_point_elsewhere", lambda p: False)


DOORS = ["backward", "perturbed", "closure"]


@pytest.mark.parametrize("door", DOORS)
def test_without_an_interrupt_all_of_this_holds(door, branch):
    assert not run_with(Step(door), AtLine(), expected(net(), loss_of))


@pytest.mark.parametrize("door", DOORS)
def test_an_interrupt_at_any_line_of_the_first_step(door):
    """As many as a test run bears; once all of them were onen."""
    by_hand = expected(net(), loss_of)
    for k in sample(lines_of(Step(door)), 37):
        run_with(Step(door), AtLine(k), by_hand)


@pytest.mark.parametrize("door", DOORS)
def test_an_interrupt_where_weights_are_displaced_in_place(door, monkeypatch):
    monkeypatch.setattr(displacement, "_may_point_elsewhere", lambda p: False)
    by_hand = expected(net(), loss_of)
    lines = lines_of(Step(door))
    for k in sample(lines, 41):
        run_with(Step(door), AtLine(k), by_hand)


@pytest.mark.parametrize("options", [{"scheme": "backward"}, {"nonfinite": "first"}, {"cap": 1e9}], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_an_interrupt_in_other_methods(door, options):
    by_hand = expected(net(), loss_of, scheme=options.get("scheme", "forward"))
    lines = lines_of(Step(door, **options))
    for k in sample(lines, 61):
        run_with(Step(door, **options), AtLine(k), by_hand)


@pytest.mark.parametrize("door", ["backward", "closure"])
def test_an_interrupt_in_the_central_scheme(door):
    by_hand = expected(net(), loss_of, scheme="central")
    lines = lines_of(Step(door, scheme="central"))
    for k in sample(lines, 61):
        run_with(Step(door, scheme="central"), AtLine(k), by_hand)


@pytest.mark.parametrize("door", DOORS)
def test_an_interrupt_in_a_later_step(door, branch):
    """With memory for the copy at hand, and nothing checked any more."""

    def second(**options):
        one = Step(door, **options)
        one.prepare()
        one.run()
        reset(one.model)
        one.regularizer.step = 0
        return one

    by_hand = expected(net(), loss_of)
    lines = lines_of(second())
    for k in sample(lines, 9):
        run_with(second(), AtLine(k), by_hand)


@pytest.mark.parametrize("door", DOORS)
def test_several_interrupts_in_a_row(door, branch):
    by_hand = expected(net(), loss_of)
    lines = lines_of(Step(door))
    one, dice = Step(door), random.Random(0)
    for _ in range(20):
        reset(one.model)
        one.regularizer.step = 0
        run_with(one, AtLine(dice.randrange(1, lines + 1)), by_hand)
        one.regularizer.step = 0


def in_a_pass(name):
    """An exception of the user's code, in the pass of that name."""

    def loss(model, weight, calls):
        calls.append(None)
        displaced = not torch.equal(model[0].weight, weight)
        if displaced == (name == "displaced") and (displaced or len(calls) == (2 if name == "check" else 1)):
            raise Interrupt
        return loss_of(model)

    return loss


@pytest.mark.parametrize("name", ["first", "check", "displaced"])
@pytest.mark.parametrize("door", ["backward", "closure"])
def test_an_interrupt_in_the_code_of_the_user(door, branch, name):
    by_hand, one, calls = expected(net(), loss_of), Step(door), []
    one.prepare()
    before = one.places(), one.moment(), gradients(one.model), one.hooks()
    weight, loss = one.model[0].weight.clone(), in_a_pass(name)

    def closure():
        one.optimizer.zero_grad()
        value = loss(one.model, weight, calls)
        value.backward()
        return value

    run = one.optimizer.step if door == "closure" else one.regularizer.backward
    with pytest.raises(Interrupt):
        run(closure if door == "closure" else lambda: loss(one.model, weight, calls))
    assert_same([one.places(), one.moment()], list(before[:2]))
    assert_same(gradients(one.model), [None] * len(before[2]))
    assert one.hooks() == before[3]
    assert one.regularizer.step == 0
    assert_close(fresh_step(one), by_hand)


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
    by_hand, dice, one = expected(net(), loss_of), random.Random(seed), Step(door)
    for _ in range(40):
        reset(one.model)
        one.regularizer.step = 0
        run_with(one, After(10 ** dice.uniform(-4.5, -1.8)), by_hand)
