"""What the laboratory says and keeps by itself, kept out of the tests."""

import math

import pytest

from gradreg.lab import Loop, progress, tasks


@pytest.fixture(autouse=True)
def _quiet_however_slow_the_machine(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", math.inf)
    progress._of_this_process.cache_clear()


@pytest.fixture
def recorded(monkeypatch):
    """Loops are not sent anywhere: they are played here."""

    def make(train, **more):
        loop = Loop(train, learning_rate=0.1, weight_decay=0.0, **more)
        source = tasks.Source("loop", "0", pickled=b"")
        tasks.know((source,))
        monkeypatch.setattr(tasks, "_made", lambda source: loop)
        monkeypatch.setattr(tasks, "from_object", lambda task: source)
        return loop

    return make
