"""Grids and searches: a plan, a study that workers share, and what is concluded from it."""
