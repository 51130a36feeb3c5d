"""What the laboratory says and keeps by itself, kept out of the tests."""

import math

import pytest

from gradreg.lab import progress


@pytest.fixture(autouse=True)
def _quiet_however_slow_the_machine(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", math.inf)
    progress._of_this_process.cache_clear()
