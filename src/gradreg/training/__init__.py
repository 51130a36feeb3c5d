"""The engine around a real model: three doors, selection, schedules, presets."""

from gradreg.training.batch import Fraction, Split
from gradreg.training.calibration import calibrated_gamma
from gradreg.training.directions import Ahead, Momentum, Previous
from gradreg.training.optimizer import RegularizedOptimizer
from gradreg.training.presets import asam, cheap, gnp, msam, sam
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import LargeGradients, bernoulli, every, late, warmup
from gradreg.training.target import TargetRatio

__all__ = [
    "Ahead",
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
    "gnp",
    "late",
    "msam",
    "sam",
    "warmup",
]
