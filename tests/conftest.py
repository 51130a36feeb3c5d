"""Seeds and fixtures of all tests."""

import gc
import signal

import pytest
import torch
from problems import PROBLEMS, Trial

from gradreg import _vectors

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so, and tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _a_cache_of_their_own(tmp_path_factory):
    """Never the user's; shared with the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADREG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _few_objects(request):
    """A first step looks through all living objects; those of the test runner are not among them here."""
    is_drawn = hasattr(request.function, "hypothesis")  # which looks for objects itself
    if not is_drawn:
        gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.name)
def trial(request):
    """A fresh copy of every problem in turn."""
    return Trial(request.param)


@pytest.fixture
def masked(monkeypatch):
    """The path of an accelerator, which the host may not read: masks instead of `if`."""
    monkeypatch.setattr(_vectors, "is_readable", lambda t: False)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
