"""Experiments with the theory: diagonal linear networks, large steps, flooding."""
