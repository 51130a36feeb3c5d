"""Gradient regularization for any PyTorch training loop: minimize L(θ) + (γ/2)‖∇L(θ)‖²."""

from gradreg import functional
from gradreg.functional import Flooding
from gradreg.training import (
    Ahead,
    Fraction,
    GradientRegularizer,
    LargeGradients,
    Momentum,
    Previous,
    RegularizedOptimizer,
    Split,
    TargetRatio,
    asam,
    bernoulli,
    calibrated_gamma,
    cheap,
    every,
    gnp,
    late,
    msam,
    sam,
    warmup,
)

__version__ = "0.1.0"

__all__ = [
    "Ahead",
    "Flooding",
    "Fraction",
    "GradientRegularizer",
    "LargeGradients",
    "Momentum",
    "Previous",
    "RegularizedOptimizer",
    "Split",
    "TargetRatio",
    "asam",
    "bernoulli",
    "calibrated_gamma",
    "cheap",
    "every",
    "functional",
    "gnp",
    "late",
    "msam",
    "sam",
    "warmup",
]
