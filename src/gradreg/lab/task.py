"""A task: what is trained, on what, with which loss, how it is scored. Built-in ones and the user's are of one kind."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradreg.lab.folder import BadInput
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.objective import Loss, Objective, Score, accuracy, cross_entropy
from gradreg.lab.randomness import seeded
from gradreg.lab.rows import Batch, Collate, moved, rows_of

MakeOptimizer = Callable[..., Optimizer]
Transform = Callable[[Batch, torch.Generator], Batch]

_BATCH_SIZE = 100
_SPLIT = (
    "split some of the training rows off, for example: train, validation = torch.utils.data.random_split(rows, "
    "[0.8, 0.2], torch.Generator().manual_seed(0))"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    r"""A model, its data, and what is minimized: $\theta^* = \arg\min_\theta \frac1n \sum_i \ell(\theta; z_i)$.

    Attributes:
        model: makes a model with fresh weights; called under the seed of the run.
        train: training rows: a map-style Dataset, a DataLoader (its batch size and order are kept), or a tuple of
            tensors with one first dimension.
        validation: rows by which hyper-parameters are chosen.
        test: rows that are read once, at the end.
        loss: of (model, batch): the scalar mean over the rows of a batch. By default cross-entropy of batches (x, y).
        score: a number of (outputs, targets) over all rows, or, if its first parameter is called `model`, of (model,
            loader). By default accuracy, if the loss is cross-entropy; else the loss itself is the score.
        higher_is_better: of the score.
        optimizer: makes the optimizer from `(parameters, lr=…, weight_decay=…)`: `torch.optim.AdamW` will do. By
            default the one that options name, SGD with momentum 0.9.
        epochs: passes over the training rows; as the next three a default that options and searches may change.
        batch_size: rows in a step; 100, or all where there are fewer.
        learning_rate: the first, and highest, of a cosine schedule.
        weight_decay: as the optimizer applies it.
        collate: makes a batch of a list of examples (`collate_fn`), for Datasets.
        num_workers: processes that read a Dataset.
        transform: of (batch, generator): augments a whole training batch on the host.
        methods: methods of your own by name: functions of the model and of any of `gamma`, `epsilon`, `rho`, `level`,
            `optimizer` that return a `gradreg.GradientRegularizer`.
        name: in tables; by default that of the file.

    Raises:
        BadInput: data that is missing, empty or of another kind, a number out of its range, something that cannot be
            called.

    Example:
        >>> x = torch.randn(120, 5)
        >>> y = x.sum(1, keepdim=True)
        >>> task = Task(
        ...     model=lambda: nn.Linear(5, 1),
        ...     train=(x[:80], y[:80]), validation=(x[80:100], y[80:100]), test=(x[100:], y[100:]),
        ...     loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        ...     epochs=5, batch_size=20,
        ... )
        >>> len(task.train), task.metric.name
        (80, 'loss')
    """

    model: Callable[[], nn.Module]
    train: Any
    validation: Any = None
    test: Any = None
    loss: Loss | None = None
    score: Score | None = None
    higher_is_better: bool | None = None
    optimizer: MakeOptimizer | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    collate: Collate | None = None
    num_workers: int = 0
    transform: Transform | None = None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            data = getattr(self, part)
            if data is None:
                raise BadInput(f"{part} must be given: {_SPLIT}.")
            rows = rows_of(part, data, self.batch_size or _BATCH_SIZE, self.collate, self.num_workers)
            object.__setattr__(self, part, rows)
        for name in ("model", "loss", "score", "optimizer", "collate", "transform"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise BadInput(f"{name} must be a function, got {type(value).__name__}.")
        if isinstance(self.model, nn.Module):
            raise BadInput(
                "model must be a function that makes a model with fresh weights, such as lambda: Net(), got one model."
            )
        if self.score is None and self.higher_is_better:
            raise BadInput("higher_is_better must be left out without a score: of a loss lower is better.")

    @cached_property
    def objective(self) -> Objective:
        """What is minimized and what is judged."""
        loss = self.loss or cross_entropy
        if self.score is None and loss is cross_entropy:
            return Objective()
        if self.score is None:
            return Objective(loss, None, Metric("loss", higher_is_better=False))
        if self.score is accuracy and self.higher_is_better is not False:
            return Objective(loss, accuracy, ACCURACY)
        name = getattr(self.score, "__name__", type(self.score).__name__)
        name = "score" if name == "<lambda>" else name
        return Objective(loss, self.score, Metric(name, self.higher_is_better is not False))

    @property
    def metric(self) -> Metric:
        return self.objective.metric

    @property
    def defaults(self) -> dict[str, Any]:
        """The fields of a configuration that the task has a number for."""
        numbers = {name: getattr(self, name) for name in ("epochs", "batch_size", "learning_rate", "weight_decay")}
        if self.batch_size is None and self.train.num_batches(_BATCH_SIZE) < 1:
            numbers["batch_size"] = len(self.train)
        return {name: value for name, value in numbers.items() if value is not None}

    def build(self, seed: int) -> nn.Module:
        """The model of a run, initialized by its seed; the global random state stays what it was.

        Raises:
            BadInput: what is made is no module, or has nothing that trains.
        """
        with seeded(seed):
            model = self.model()
        if not isinstance(model, nn.Module):
            raise BadInput(f"model must make a torch.nn.Module, got {type(model).__name__}.")
        if not any(p.requires_grad for p in model.parameters()):
            raise BadInput("model must have parameters that train (requires_grad), got none.")
        return model

    def check(self, model: nn.Module, device: torch.device, batch_size: int) -> None:
        """One batch through loss and score, with nothing changed, before a run or a search begins.

        Raises:
            BadInput: a loss that is no scalar tensor, is not finite or does not depend on what trains; fewer rows
                than a batch.
        """
        own = {id(p) for p in model.parameters()}
        if any(id(p) in own for p in self.build(0).parameters()):
            raise BadInput("model must make a model with weights of its own each time, and gave the same twice.")
        if self.train.num_batches(batch_size) < 1:
            most = f"{len(self.train)} (the training rows)"
            raise BadInput(f"batch_size must be a whole number from 1 to {most}, got '{batch_size}'.")
        with seeded(0), _as_it_was(model):
            batch, _ = next(iter(self.train.chunks(min(batch_size, len(self.train)), 2**20)))
            found = self.objective.loss(model.train(), moved(batch, device))
            if not isinstance(found, Tensor) or found.numel() != 1:
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise BadInput(f"loss must return a scalar tensor, the mean over the rows of a batch, got {what}.")
            if not found.requires_grad:
                raise BadInput("loss must depend on the parameters of the model that train, and does not.")


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers and mode are put back."""
    kept, mode = {name: b.detach().clone() for name, b in model.named_buffers()}, model.training
    try:
        yield
    finally:
        model.train(mode)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept and buffer.shape == kept[name].shape:
                    buffer.copy_(kept[name])


class Loop:
    """A training loop of the user's own as a task, in the manner of an Optuna objective.

    Args:
        train: a function of a `Run` that trains, and returns `{"validation": score, "test": score}`; `test` may be
            left out where `run.scored_on` is not "test".
        learning_rate: around which a search starts.
        weight_decay: the same.
        epochs: what `run.epochs` says.
        higher_is_better: of the scores.
        score: their name, in tables.
        methods: as in `Task`.

    Example:
        >>> loop = Loop(lambda run: {"validation": run.learning_rate, "test": 0.5}, learning_rate=1e-3)
        >>> loop.defaults
        {'learning_rate': 0.001}
    """

    def __init__(
        self,
        train: Callable[[Any], Mapping[str, float]],
        *,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        epochs: int | None = None,
        higher_is_better: bool = True,
        score: str = "score",
        methods: Mapping[str, Callable[..., Any]] | None = None,
        name: str = "",
    ) -> None:
        if not callable(train):
            raise BadInput(f"train must be a function of a run, got {type(train).__name__}.")
        self.train, self.methods, self.name = train, dict(methods or {}), name
        numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay, "epochs": epochs}
        self.defaults = {name: value for name, value in numbers.items() if value is not None}
        self.metric = Metric(score, higher_is_better)

    def scores(self, run: Any) -> dict[str, float]:
        """What the function returned, checked.

        Raises:
            BadInput: no mapping, a part that is missing, a score that is no number.
        """
        found = self.train(run)
        needed = ("validation", "test") if run.scored_on == "test" else ("validation",)
        if not isinstance(found, Mapping) or any(part not in found for part in needed):
            keys = f"the keys {', '.join(map(str, found))}" if isinstance(found, Mapping) else type(found).__name__
            raise BadInput(f"the function must return {{'validation': score, 'test': score}}, got {keys}.")
        scores = {}
        for part in needed:
            try:
                scores[part] = float(found[part])
            except (TypeError, ValueError, RuntimeError):
                kind = type(found[part]).__name__
                raise BadInput(f"the function must return a number as its {part} score, got {kind}.") from None
        return {"test": math.nan, **scores}


def as_task(found: Any, where: str) -> Task | Loop:
    """What a file or a caller has given as a task: a Task, a Loop, or a plain function of a run.

    Raises:
        BadInput: something else.
    """
    if isinstance(found, Task | Loop):
        return found
    if inspect.isfunction(found) or inspect.ismethod(found):
        return Loop(found, name=getattr(found, "__name__", ""))
    raise BadInput(f"{where} must be a Task, or a function of a run, got {type(found).__name__}.")
