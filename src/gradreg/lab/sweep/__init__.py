"""Grids and searches: a plan, the order of its runs, and what is concluded from them."""
