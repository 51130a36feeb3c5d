"""The engine around a real model: three doors, selection, schedules, presets."""

from gradreg.training.optimizer import RegularizedOptimizer
from gradreg.training.presets import asam, gnp, sam
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import every, late, warmup

__all__ = ["GradientRegularizer", "RegularizedOptimizer", "asam", "every", "gnp", "late", "sam", "warmup"]
