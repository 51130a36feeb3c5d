"""Gradient regularization for any PyTorch training loop: minimize L(θ) + (γ/2)‖∇L(θ)‖²."""

from gradreg import functional
from gradreg.functional import Flooding
from gradreg.training import (
    GradientRegularizer,
    RegularizedOptimizer,
    asam,
    every,
    gnp,
    late,
    sam,
    warmup,
)

__version__ = "0.1.0"

__all__ = [
    "Flooding",
    "GradientRegularizer",
    "RegularizedOptimizer",
    "asam",
    "every",
    "functional",
    "gnp",
    "late",
    "sam",
    "warmup",
]
