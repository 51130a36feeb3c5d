"""What flat minima are said to buy besides accuracy, measured on the models that a comparison has kept.

All on test rows, but L and its derivatives, of the plain loss on 1,000 training rows in evaluation mode:

- *ECE*, the expected calibration error: Σ_b (n_b/n) |accuracy_b − confidence_b| over 15 bins of equal width of the
  largest probability (Guo et al., On Calibration of Modern Neural Networks, ICML 2017); and the mean of that
  probability, how *sure* the model is;
- accuracy under *noise* (Gaussian, deviation 0.5 of that of the pixels), *blur* (means over 3×3 pixels) and low
  *contrast* (a third of it), corruptions in the manner of Hendrycks and Dietterich (ICLR 2019), made here;
- accuracy with *weights rounded* to 8 and 4 bits: matrices and kernels, each to equal steps up to its largest entry;
- accuracy on the second half of the classes after a gentle epoch of fine-tuning on the first: what is *kept*;
- L, ‖∇L‖, tr H and λ_max: with cross-entropy they all vanish together;
- ‖W‖, the length of all matrices and kernels: before a norm layer the loss does not change with it, but ‖∇L‖ goes with
  1/‖W‖ and tr H with 1/‖W‖², so that shorter weights alone make a minimum sharper (van Laarhoven, L2
  Regularization versus Batch and Weight Normalization, 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from gradreg import curvature
from gradreg.lab import objective
from gradreg.lab.config import RunConfig
from gradreg.lab.data.parts import Part, order
from gradreg.lab.randomness import seeded
from gradreg.lab.tasks import trained

BINS = 15
NOISE, CONTRAST = 0.5, 1 / 3
BITS = (8, 4)
ROWS = 1000
"""For the curvature."""
PROBES = 8
FINE_TUNING_RATE = 1e-3
"""Gentle, so that models can be told apart: at ten times this rate those of the first piece forgot all."""
MEASURES = {
    "ece": "ECE",
    "sure": "sure",
    "noise": "noise",
    "blur": "blur",
    "contrast": "contrast",
    "bits_8": "8 bits",
    "bits_4": "4 bits",
    "kept": "kept",
    "loss": "L",
    "grad_norm": "‖∇L‖",
    "trace": "tr H",
    "top": "λ_max",
    "length": "‖W‖",
}
"""What is measured, as the table heads it."""
SHARES = ("ece", "sure", "noise", "blur", "contrast", "bits_8", "bits_4", "kept")
"""Shares of the test rows, shown in percent."""


@dataclass(frozen=True)
class Kept:
    """A trained model as a file, and the run that made it."""

    config: RunConfig
    weights: Path


def measure(kept: Kept) -> dict[str, float]:
    """All of `MEASURES`."""
    task = trained(kept.config)
    test, train = task.test, task.train
    assert isinstance(test, Part)
    assert isinstance(train, Part)
    state = load_file(kept.weights)

    def model(change: Callable[[Tensor], Tensor] = lambda weight: weight) -> nn.Module:
        made = task.build(kept.config.seed)
        made.load_state_dict({name: change(value) if is_matrix(value) else value for name, value in state.items()})
        return made.eval()

    plain = model()
    confidence, right = predictions(plain, test)
    found = {"ece": calibration_error(confidence, right), "sure": confidence.mean().item()}
    with seeded(kept.config.seed):
        corrupted = {name: Part(change(test.x), test.y) for name, change in CORRUPTIONS.items()}
    found |= {name: objective.evaluate(plain, part).score for name, part in corrupted.items()}
    for bits in BITS:
        found[f"bits_{bits}"] = objective.evaluate(model(lambda w, bits=bits: rounded(w, bits)), test).score
    found["kept"] = after_fine_tuning(model(), train, test, kept.config.batch_size, kept.config.seed)
    found["length"] = math.hypot(*(value.norm().item() for value in state.values() if is_matrix(value)))
    return found | curvature_of(plain, train[:ROWS])


def is_matrix(value: Tensor) -> bool:
    """Of a linear map or a kernel: vectors of norms and biases are left as they are."""
    return value.ndim > 1


def predictions(model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
    """The largest probability of each row, and whether its class is right."""
    confidence, right = [], []
    with torch.no_grad():
        for (x, y), _ in part.chunks(None, 2**20):
            largest, guess = model(x).softmax(-1).max(-1)
            confidence.append(largest)
            right.append(guess == y)
    return torch.cat(confidence), torch.cat(right)


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """ECE, a share.

    Example:
        >>> calibration_error(torch.tensor([0.9, 0.9, 0.6]), torch.tensor([True, False, True]))  # (0.8 + 0.4)/3
        0.4
    """
    place = (confidence * bins).ceil().clamp(1, bins).long() - 1
    zeros = torch.zeros(bins, dtype=torch.float64)
    sure = zeros.scatter_add(0, place, confidence.double())
    hits = zeros.scatter_add(0, place, right.double())
    return round(((hits - sure).abs().sum() / len(confidence)).item(), 6)


CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: x + NOISE * torch.randn_like(x),
    "blur": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1),
    "contrast": lambda x: (mean := x.mean((-2, -1), keepdim=True)) + CONTRAST * (x - mean),
}
"""Of images (n, C, H, W), standardized."""


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To 2^bits − 1 values from −largest to largest, 0 among them.

    Example:
        >>> rounded(torch.tensor([-1.0, 0.2, 0.6]), bits=2)
        tensor([-1.,  0.,  1.])
    """
    steps = 2 ** (bits - 1) - 1
    largest = weight.abs().max().clamp_min(1e-12)
    return (weight / largest * steps).round() / steps * largest


def after_fine_tuning(model: nn.Module, train: Part, test: Part, batch_size: int, seed: int) -> float:
    """Accuracy on the second half of the classes after one epoch of SGD on the first."""
    half = (int(train.y.max()) + 1) // 2
    first, others = train[train.y < half], test[test.y >= half]
    optimizer = torch.optim.SGD(model.parameters(), lr=FINE_TUNING_RATE, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for rows in order(len(first), generator, min(batch_size, len(first))):
        optimizer.zero_grad()
        F.cross_entropy(model(first.x[rows]), first.y[rows]).backward()
        optimizer.step()
    return objective.evaluate(model.eval(), others).score


def curvature_of(model: nn.Module, part: Part) -> dict[str, float]:
    """The plain loss and its derivatives; NaN where the run diverged."""
    loss = objective.evaluate(model, part).loss
    if not math.isfinite(loss):
        return dict.fromkeys(("loss", "grad_norm", "trace", "top"), math.nan)
    batches: list[Any] = [batch for batch, _ in part.chunks(None, 2**17)]

    def loss_fn(batch: Any) -> Tensor:
        return objective.cross_entropy(model, batch)

    return {
        "loss": loss,
        "grad_norm": curvature.gradient_norm(loss_fn, model, batches),
        "trace": curvature.hessian_trace(loss_fn, model, batches, num_probes=PROBES).mean,
        "top": curvature.top_eigenvalues(loss_fn, model, batches, by="value", tolerance=0.01).values[0],
    }
