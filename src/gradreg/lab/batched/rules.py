"""A method as numbers, and the passes that it needs: runs that need the same passes can share a stack."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gradreg.lab.config import RunConfig
from gradreg.lab.methods import SIGNS

SCHEMES = {"F-GR": "forward", "B-GR": "backward", "Central": "central", "DB": "exact"}


@dataclass(frozen=True)
class Passes:
    """What a method has computed in a step, and in which steps."""

    scheme: str = "none"
    """Beside the first gradient `none`, `one-sided`, `central`, `exact`; or `known`, one displaced pass, or `split`."""
    is_adaptive: bool = False
    direction: str = "gradient"
    """What d is made of: `gradient`, or what is known before, `momentum` or `previous`."""
    share: float = 1.0
    """Of the batch: the rows of the penalty, or, where it is split, of the displaced part."""
    is_ahead: bool = False
    """Whether the whole step is taken at a point along the momentum."""
    is_tested: bool = False
    """Whether ‖∇L‖² decides which steps have a penalty."""
    period: int = 1
    start: float = 0.0
    """Share of the steps before the first penalty."""
    probability: float = 1.0
    carries: bool = False
    """Whether the last penalty is used again, in proportion to ‖∇L‖, in the steps between (LookSAM's idea)."""

    @property
    def count(self) -> float:
        """Gradients in a step on average, or as many as it costs."""
        extra = {"none": 0, "known": 0, "split": 0, "one-sided": 1, "central": 2, "exact": 2}[self.scheme]
        return 1 + extra * self.share * (1 - self.start) * self.probability / self.period


@dataclass(frozen=True)
class Rule:
    """ĝ = g1 + (γ/ε)(g2 − g1), g2 at θ + εd; ε < 0 is the backward difference.

    In one pass ĝ = ∇L(θ + γd); in a split batch ε rises with γ.
    """

    passes: Passes = Passes()
    gamma: float = 0.0
    epsilon: float = 1.0
    is_normalized: bool = False
    rising_steps: int = 0
    level: float = -float("inf")
    """Flood level."""
    sign: int = 1
    """Of a direction that is known before."""
    ahead: float = 0.0
    """ρ of the point at which the whole step is taken."""
    threshold: float = 0.0


def rule_of(config: RunConfig, num_steps: int, carries: bool = False) -> Rule:
    """The same method as `gradreg.lab.attach` attaches.

    Raises:
        KeyError: a method that has no such form.
    """
    rising = round(config.warmup * num_steps)
    if config.method == "SGD" or config.gamma == 0:
        return Rule(Passes(is_ahead=config.lookahead > 0), ahead=config.lookahead, rising_steps=rising)
    if config.method == "Flooding":
        assert config.level is not None
        return Rule(level=config.level)
    passes = Passes(
        is_ahead=config.lookahead > 0, period=config.period, start=config.start, probability=config.probability
    )
    if config.method in SIGNS:
        assert config.rho is not None
        direction = "momentum" if config.method == "MSAM" else "previous"
        known = replace(passes, scheme="known", direction=direction)
        return Rule(known, config.rho, config.rho, rising_steps=rising, sign=SIGNS[config.method])
    if config.method == "Split":
        assert config.gamma is not None
        assert config.epsilon is not None
        own = config.ascent not in ("momentum", "previous")
        split = replace(
            passes, scheme="split", direction="gradient" if own else config.ascent, share=config.gamma / config.epsilon
        )
        sign = -1 if config.ascent == "momentum" else 1
        return Rule(split, config.gamma, config.epsilon, config.ascent == "normalized", rising, sign=sign)
    passes = replace(passes, share=config.fraction, is_tested=config.threshold is not None, carries=carries)
    common = Rule(ahead=config.lookahead, threshold=config.threshold or 0.0)
    if config.method in ("SAM", "ASAM"):
        assert config.rho is not None
        is_adaptive = config.method == "ASAM"
        one_sided = replace(passes, scheme="one-sided", is_adaptive=is_adaptive)
        return replace(common, passes=one_sided, gamma=config.rho, epsilon=config.rho, is_normalized=not is_adaptive)
    scheme = SCHEMES[config.method]
    assert config.gamma is not None
    common = replace(common, gamma=config.gamma, rising_steps=rising)
    if scheme == "exact":
        return replace(common, passes=replace(passes, scheme="exact"))
    assert config.epsilon is not None
    return replace(
        common,
        passes=replace(
            passes,
            scheme="central" if scheme == "central" else "one-sided",
            is_adaptive=config.ascent == "adaptive",
        ),
        epsilon=-config.epsilon if scheme == "backward" else config.epsilon,
        is_normalized=config.ascent == "normalized",
    )
