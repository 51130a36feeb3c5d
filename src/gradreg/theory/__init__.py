"""Diagonal linear networks: where gradient regularization ends, by integration and by theory."""

from gradreg.theory.data import SparseRegression, sparse_regression
from gradreg.theory.flow import Flow, flow
from gradreg.theory.model import DiagonalNetwork
from gradreg.theory.potential import minimize_potential, potential
from gradreg.theory.reduced import Flows, flows, moments

__all__ = [
    "DiagonalNetwork",
    "Flow",
    "Flows",
    "SparseRegression",
    "flow",
    "flows",
    "minimize_potential",
    "moments",
    "potential",
    "sparse_regression",
]
