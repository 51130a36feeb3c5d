r"""The plan of a step: its passes, made from the four nouns.

$$\hat g = \sum_{\text{parts}} \Big[ g + \sum_k w_k \, (g_k - g) \Big]$$

A part of the batch has a pass at θ, with gradient $g$, and may be played again at θ + sₖεd, with gradient $g_k$ and
weight $w_k$. A part without a pass at θ adds its gradient where it is taken.

| | passes |
|---|---|
| γ = 0 | all at θ |
| forward, γ = ε | all at θ; all again at θ + εd, weight γ/ε |
| central | all at θ; again at θ + εd, weight γ/2ε; again at θ − εd, weight −γ/2ε |
| `Fraction` | A at θ; A again at θ + εd; the rest at θ |
| `Split` | A at θ; B at θ + εd |
| `Momentum`, `Previous` | all at θ + εd |

`Ahead` moves the point θ itself. `exact` differentiates once more and is no plan (double_backward.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from gradreg.functional.ascents import Ascent
from gradreg.functional.schemes import Scheme
from gradreg.training.batch import Fraction, Split
from gradreg.training.directions import Ahead, Momentum, Previous
from gradreg.training.schedule import Strength


@dataclass(frozen=True)
class Method:
    """What stays the same over the steps of a regularizer."""

    scheme: Scheme
    ascent: Ascent | Momentum | Previous
    cap: float | None  # the largest ‖ĝ − g1‖/‖g1‖
    fall_back: bool  # to g1, where the second gradient is not finite
    batch: Fraction | Split | None = None  # that the displaced pass sees
    at: Ahead | None = None  # where all gradients are taken, if not at θ

    @property
    def is_one_pass(self) -> bool:
        """Whether ĝ = ∇L(θ + εd) with a d that needs no pass: γ = ε is all that makes sense then."""
        return self.batch is None and isinstance(self.ascent, (Momentum, Previous))

    @property
    def needs_whole(self) -> bool:
        """Whether one number for all parameters decides ĝ, so that it waits for the last of them."""
        return self.cap is not None or self.fall_back


@dataclass(frozen=True)
class Pass:
    """Forward and backward of one part of the batch, from the point θ + node · εd."""

    part: int = 0
    node: float = 0.0
    weight: float | None = None  # of a pass that plays its part again


Plan = tuple[Pass, ...]


def plan_of(method: Method, strength: Strength | None) -> Plan:
    """The passes of a step, in order."""
    if strength is None:
        return (Pass(),)
    if method.is_one_pass:
        return (Pass(node=1.0),)
    if isinstance(method.batch, Split):
        return Pass(), Pass(part=1, node=1.0)
    again = tuple(Pass(node=node, weight=strength.ratio * weight) for node, weight in method.scheme.stencil)
    rest = (Pass(part=1),) if isinstance(method.batch, Fraction) else ()
    return Pass(), *again, *rest
