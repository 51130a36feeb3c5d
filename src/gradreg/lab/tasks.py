"""Where tasks come from: the built-in ones by the fields of a configuration, the user's by a file or from Python.

A configuration names a task of the user's by a *reference*, such as `mine.py:task`. What it stands for is made known to
a process by the command line, or by the call that had the task in hand: no file of results ever loads code. Workers are
told by `sources()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import gradreg
from gradreg.lab import attach, objective
from gradreg.lab.config import FIELDS, RunConfig
from gradreg.lab.data import load
from gradreg.lab.data.augment import augmented
from gradreg.lab.data.parts import Split
from gradreg.lab.folder import BadInput
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.models import MODELS
from gradreg.lab.processes import resolve
from gradreg.lab.randomness import seeded
from gradreg.lab.task import Loop, Task, as_task


@dataclass(frozen=True)
class Source:
    """How a process gets at a task of the user's; can be sent to another process."""

    reference: str
    digest: str
    """SHA-256 of the file, or of the pickled task."""
    path: Path | None = None
    name: str = "task"
    pickled: bytes | None = None


_SOURCES: dict[str, Source] = {}


def sources() -> tuple[Source, ...]:
    """All that this process knows."""
    return tuple(_SOURCES.values())


def know(known: tuple[Source, ...]) -> None:
    """Take over what another process knows."""
    for source in known:
        if _SOURCES.get(source.reference) != source:
            _SOURCES[source.reference] = source
            _made.cache_clear()


def from_file(given: str) -> Source:
    """Make a task of the command line known: `FILE.py`, which holds a function `task`, or `FILE.py:NAME`.

    Raises:
        BadInput: no such file.
    """
    file, _, name = given.partition(".py:")
    path = Path(f"{file}.py" if name else given).expanduser()
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"TASK must be a Python file that can be read, got {_short(str(path))}: {reason}.") from None
    name = name or "task"
    source = Source(f"{path.name}:{name}", hashlib.sha256(content).hexdigest(), path.resolve(), name)
    know((source,))
    return source


def from_object(found: Any) -> Source:
    """Make a task in hand known.

    Raises:
        BadInput: it is no task.
    """
    import cloudpickle

    task = as_task(found, "task")
    try:
        pickled = cloudpickle.dumps(task)
    except Exception as error:  # whatever the user's objects raise
        raise BadInput(
            f"task must be one that can be sent to other processes: {last_line(error)}; pass workers=1, or give Task "
            "functions that make what cannot be pickled."
        ) from error
    digest = hashlib.sha256(pickled).hexdigest()
    source = Source(task.name or "task", digest, pickled=pickled)
    know((source,))
    return source


def check(config: RunConfig) -> None:
    """One batch of training rows through the loss and all validation rows through the score of a user's task, at the
    weights of the run's seed, before anything is made.

    Raises:
        BadInput: what `Task.check` refuses; a score that is no number, or NaN.
    """
    task, device = trained(config), resolve(config.device)
    with seeded(config.seed):
        model = task.build(config.seed).to(device)
        try:
            task.check(model, device, config.batch_size)
            _check_optimizer(config, task, model)
            found = objective.evaluate(model, task.validation, of=task.objective)
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{config.file} must be a task that runs, and raised {last_line(error)}.") from error
    if math.isnan(found.score):
        raise BadInput(f"score must be a number, got NaN from {task.metric.name} of the untrained model.")


def _check_optimizer(config: RunConfig, task: Task, model: nn.Module) -> None:
    if task.optimizer is None:
        return
    for name in ("optimizer", "momentum"):
        if getattr(config, name) != FIELDS[name].default:
            raise BadInput(f"{name} must be left out: the task makes an optimizer of its own.")
    try:
        made = task.optimizer(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    except Exception as error:
        called = "(parameters, lr=…, weight_decay=…)"
        raise BadInput(f"optimizer must be a function of {called}, and raised {last_line(error)}.") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise BadInput(f"optimizer must make a torch.optim.Optimizer, got {type(made).__name__}.")


def digest_of(reference: str | None) -> str | None:
    """Of the file or the object that a reference stands for."""
    return None if reference is None else _source(reference).digest


def word_of(reference: str) -> str:
    """The word of a command line that names it, from here."""
    source = _source(reference)
    if source.path is None:
        return reference
    path = os.path.relpath(source.path)
    return path if source.name == "task" else f"{path}:{source.name}"


def task_of(config: RunConfig) -> Task | Loop:
    """The task of a configuration.

    Raises:
        BadInput: data that is not there, a model that does not fit; a reference that was not made known, a file that
            raises or holds something else.
    """
    return builtin(config) if config.file is None else find(config.file)


def metric_of(config: RunConfig) -> Metric:
    """What runs of a configuration are judged by; of a built-in task without making it."""
    return ACCURACY if config.file is None else find(config.file).metric


def trained(config: RunConfig) -> Task:
    """The task of a configuration, for what needs its model and data.

    Raises:
        BadInput: it is a loop of the user's own, whose model nobody sees.
    """
    task = task_of(config)
    if isinstance(task, Loop):
        raise BadInput(f"{config.file} must be a Task here: a function of a run has a loop of its own; use compare.")
    return task


def find(reference: str) -> Task | Loop:
    """The task that a reference stands for, made once in a process, always from the same random state.

    Raises:
        BadInput: as `task_of`.
    """
    return _made(_source(reference))


def _source(reference: str) -> Source:
    source = _SOURCES.get(reference)
    if source is None:
        file = reference.split(":")[0]
        way_out = f"add {file}, as TASK or --task"
        raise BadInput(f"file must be a task that the command line names too, got {_short(reference)}: {way_out}.")
    return source


@lru_cache(maxsize=8)
def _made(source: Source) -> Task | Loop:
    if source.pickled is not None:
        import cloudpickle

        task = cloudpickle.loads(source.pickled)
    else:
        task = _from_module(source)
    attach.make_known(task.methods)
    return task


def _from_module(source: Source) -> Task | Loop:
    assert source.path is not None
    shown = f"{source.path.name}:{source.name}"
    module = _module(source)
    if not hasattr(module, source.name):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        has = f"it has {', '.join(functions)}" if functions else "it has no function"
        raise BadInput(f"TASK must name a function of {source.path.name}, got {source.name!a}; {has}.")
    found = getattr(module, source.name)
    if inspect.isfunction(found) and not _needs_a_run(found):
        found = _called(found, shown)
    return as_task(found, shown)


def _module(source: Source) -> ModuleType:
    assert source.path is not None
    name = f"gradreg_task_{source.digest[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for what pickles its classes
    folder = str(source.path.parent)
    if folder not in sys.path:  # as Python does for a script: it may import its neighbors
        sys.path.insert(0, folder)
    try:
        with seeded(0):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise BadInput(
            f"TASK must be a file that can be imported, got {source.path.name}: {last_line(error)}."
        ) from error
    return module


def _needs_a_run(function: Any) -> bool:
    """Whether it is a loop rather than a maker of a task."""
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(function).parameters.values()
    )


def _called(function: Any, shown: str) -> Any:
    try:
        with seeded(0):  # splits that are drawn are the same in every process and for every seed
            return function()
    except BadInput as error:
        raise BadInput(f"{shown}: {error}") from error
    except Exception as error:
        raise BadInput(f"{shown} must return a task, and raised {last_line(error)}.") from error


def last_line(error: BaseException) -> str:
    """`ValueError: no rows (mine.py, line 12)`: where the user's own code was, not that of a library."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, SyntaxError):  # which says where
        return text
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<")) and "site-packages" not in f.filename]
    was_sent = any(frame.filename.startswith("<") for frame in frames)  # such code has no line
    where = own[-1:] or ([] if was_sent else frames[-1:])
    return text + "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in where)


_LIBRARIES = (str(Path(gradreg.__file__).parent), str(Path(os.__file__).parent))


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 200 else f"{shown[:200]}…'"


def builtin(config: RunConfig, split: Split | None = None) -> Task:
    """A data set and a model of the laboratory; `split` in the place of the data that the configuration names.

    Raises:
        BadInput: data that is not there, or a model that does not fit.
    """
    data = load(config) if split is None else split
    return Task(
        model=lambda: MODELS[config.model].make(config, data),
        train=data.train,
        validation=data.validation,
        test=data.test,
        transform=augmented if config.augment else None,
        name=config.task,
    )
