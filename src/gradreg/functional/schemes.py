r"""The scheme: how the derivative of the gradient along the ascent is taken.

A finite-difference scheme is a stencil: nodes $s_k$ and weights $w_k$, with

$$H d \approx \frac1\epsilon \sum_k w_k \, [\nabla L(\theta + s_k \epsilon d) - \nabla L(\theta)].$$

`exact` has no nodes: it is $Hd$ itself, by double backpropagation, and the reference for all the others.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """A stencil: pairs (node, weight) with Σ node · weight = 1. No nodes at all means double backpropagation."""

    name: str
    stencil: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        slope = sum(node * weight for node, weight in self.stencil)
        if self.stencil and abs(slope - 1) > 1e-12:
            raise ValueError(f"stencil must have Σ node · weight = 1, got {slope} from {self.stencil}.")

    @property
    def is_exact(self) -> bool:
        return not self.stencil


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("forward", ((1.0, 1.0),)),  # F-GR: error O(ε), one gradient more
        Scheme("backward", ((-1.0, -1.0),)),  # B-GR: F-GR with ε → −ε
        Scheme("central", ((1.0, 0.5), (-1.0, -0.5))),  # error O(ε²), two gradients more
        Scheme("exact", ()),  # DB
    )
}


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of that name, or the scheme itself."""
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {list(SCHEMES)} or a Scheme, got {scheme!r}.")
    return SCHEMES[scheme]
