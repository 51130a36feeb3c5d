"""The mathematics of gradient regularization as pure functions: parameters in, tensors out."""

from gradreg.functional.ascents import Adaptive, Ascent, Gradient, Normalized
from gradreg.functional.flooding import Flooding, flooded
from gradreg.functional.penalty import (
    directional_derivative,
    penalty,
    penalty_gradient,
    regularized_gradient,
)
from gradreg.functional.schemes import Scheme

__all__ = [
    "Adaptive",
    "Ascent",
    "Flooding",
    "Gradient",
    "Normalized",
    "Scheme",
    "directional_derivative",
    "flooded",
    "penalty",
    "penalty_gradient",
    "regularized_gradient",
]
