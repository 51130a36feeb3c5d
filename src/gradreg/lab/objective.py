"""The loss that a run minimizes and the score that it is judged by, and how both are measured on whole data sets.

L is the mean over rows of the plain loss: no penalty, no flooding. By default it is cross-entropy, over all tokens of
all rows for language, and the score is the share of rows (tokens) whose largest logit is the label. Measurements are in
evaluation mode, so that BatchNorm uses its running statistics and dropout is off, go through the rows in chunks, on the
device of the model, and leave no trace, in the random state neither.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg.lab.data.parts import Part
from gradreg.lab.folder import BadInput
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.randomness import undisturbed
from gradreg.lab.rows import Batch, Rows, TensorRows, moved

_CHUNK = 2**20
"""Input numbers in a chunk by default: 341 images of 3×32×32."""
_CHUNK_WITH_GRADIENT = 2**18
"""The same where all activations are kept: 85 images, and 4,000 rows of the demo in one."""

Loss = Callable[[nn.Module, Batch], Tensor]
Score = Callable[..., Any]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over rows of (x, y): logits (n, C) with labels (n,), or logits (n, T, C) with labels (n, T)."""
    x, y = _pair(batch)
    return _cross_entropy(model(x), y)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of rows whose largest logit is the label."""
    return _share((outputs.argmax(-1) == targets).sum(), targets.numel())


@dataclass(frozen=True)
class Objective:
    """What a task minimizes, and what it is judged by.

    `score` is a function of (outputs, targets), of all rows, or, if its first parameter is called `model`, of
    (model, loader); None is the loss itself.
    """

    loss: Loss = cross_entropy
    score: Score | None = accuracy
    metric: Metric = ACCURACY


PLAIN = Objective()


@dataclass(frozen=True)
class Evaluation:
    """Mean loss, and the score."""

    loss: float
    score: float
    count: int | None = None
    """Labels of which an accuracy is a share."""


def loss(model: nn.Module, batch: Batch, of: Objective = PLAIN) -> Tensor:
    """The mean over the rows of a batch that is on the model's device."""
    return of.loss(model, batch)


def evaluate(model: nn.Module, part: Rows, rows: int | None = None, *, of: Objective = PLAIN) -> Evaluation:
    """Loss and score on all rows, `rows` at a time; by default so many that a chunk stays small.

    Raises:
        BadInput: a score that is no number, or that cannot be made of these batches.
    """
    device = device_of(model)
    score = of.score
    of_model = score is not None and _takes_model(score)
    total = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    num_targets = 0
    kept: list[tuple[Tensor, Tensor]] = []
    with _evaluation_mode(model), torch.no_grad(), _undrawn(part):
        for chunk, share in _chunks(part, rows, _CHUNK, device):
            if of.loss is cross_entropy or (score is not None and not of_model):
                x, y = _pair(chunk)
                outputs = model(x)
                is_plain = of.loss is cross_entropy
                mean = _cross_entropy(outputs, y) if is_plain else of.loss(model, chunk)
                if score is accuracy:
                    correct += (outputs.argmax(-1) == y).sum()
                    num_targets += y.numel()
                elif score is not None and not of_model:
                    kept.append((outputs.cpu(), y.cpu()))
            else:
                mean = of.loss(model, chunk)
            total += mean.double() * share
        if score is accuracy:
            found = _share(correct, num_targets)
        elif score is None:
            found = total.item()
        elif of_model:
            found = _number(score, model, [chunk for chunk, _ in _chunks(part, rows, _CHUNK, device)])
        else:
            found = _number(score, *(torch.cat(column) for column in zip(*kept)))
    return Evaluation(total.item(), found, num_targets or None)


def gradient_norm(
    model: nn.Module, part: Rows, rows: int | None = None, *, of: Objective = PLAIN, most: float = math.inf
) -> tuple[float, float]:
    """L and ‖∇L‖₂ over all parameters that train, for the mean loss over all rows, `rows` at a time.

    Leaves `.grad`, buffers and the mode of the model as they were. `most`: about so many rows, the first ones.
    """
    device = device_of(model)
    params = [param for param in model.parameters() if param.requires_grad]
    total = torch.zeros((), dtype=torch.float64, device=device)
    sums = [torch.zeros_like(param) for param in params]
    with _evaluation_mode(model), torch.enable_grad(), _undrawn(part):
        for chunk, share in _chunks(part, rows, _CHUNK_WITH_GRADIENT, device, most):
            mean = of.loss(model, chunk)
            total += mean.detach().double() * share
            gradients = torch.autograd.grad(mean, params, allow_unused=True)
            for running, gradient in zip(sums, gradients):
                if gradient is not None:
                    running.add_(gradient, alpha=share)
    norm = torch.stack([running.square().sum() for running in sums]).sum().sqrt()
    return total.item(), norm.item()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _takes_model(score: Score) -> bool:
    try:
        first = next(iter(inspect.signature(score).parameters), "")
    except (TypeError, ValueError):
        return False
    return first == "model"


def _number(score: Score, *arguments: Any) -> float:
    value = score(*arguments)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"score must return a number, got {type(value).__name__} from {_name(score)}.") from None
    return number


def _name(score: Score) -> str:
    return getattr(score, "__name__", type(score).__name__)


def _pair(batch: Batch) -> tuple[Any, Tensor]:
    if isinstance(batch, Part):
        return batch.x, batch.y
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    raise BadInput(
        f"batches must be pairs (x, y) for cross-entropy, or a score of (outputs, targets), got {_kind(batch)}; "
        "give Task a loss of (model, batch) and a score of (model, loader)."
    )


def _kind(batch: Batch) -> str:
    return f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def _share(correct: Tensor, count: int) -> float:
    return (correct.double() / count).float().item()  # rounded to float32 as the mean of a float32 tensor is


def _chunks(
    part: Rows, rows: int | None, numbers: int, device: torch.device, most: float = math.inf
) -> Iterator[tuple[Batch, float]]:
    """Chunks on the device, each with its share of all rows that are looked at."""
    whole = len(part)
    if whole > most:
        part = part[: int(most)] if hasattr(part, "__getitem__") else part  # type: ignore[index]
        whole = min(whole, int(most))
    left = whole
    for batch, count in part.chunks(rows, numbers):
        yield moved(batch, device), min(count, left) / whole
        left -= count
        if left <= 0:
            return


def _undrawn(part: Rows) -> AbstractContextManager[None]:
    """Data that draws random numbers draws the same ones in each measurement, and the run sees nothing of it."""
    return nullcontext() if isinstance(part, Part | TensorRows) else undisturbed()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
