"""The direction of the displacement: an ascent of this step's gradient, or one that is known before any pass.

What is known beforehand needs no first gradient, so with γ = ε a step is one pass, ∇L(θ + εd).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.functional.ascents import ASCENTS, Ascent, Gradient, Normalized, Scale, resolve_ascent
from gradreg.training.schedule import Schedule, check_number, value_at

BUFFERS = ("momentum_buffer", "exp_avg")
"""Where optimizers of torch keep their momentum."""


@dataclass(frozen=True, repr=False)
class Momentum:
    r"""$d = \pm v/\|v\|$ with the base optimizer's momentum v: MSAM, one pass.

    The displaced weights are given back as the gradients arrive, so they take memory only beside activations.
    The sign is explicit: −1, the authors' choice, looks ahead, along the way that the next step will go, and is
    Nesterov's point with a length of its own; +1 looks back uphill. Only with γ = ε, or with a `Split` or `Fraction`
    of the batch. v is that of all selected parameters, before this step's update; without one (the first step) the
    step is plain. BatchNorm statistics and the returned loss are those at the displaced point, and parameters outside
    the selection receive their gradient there too.

    Args:
        optimizer: holds a momentum for the selected parameters: SGD or RMSprop with momentum, Adam and its relatives;
            or a list of several that share them, such as Muon for matrices and AdamW for the rest. v is then made of
            all their momenta, each as its optimizer keeps it: a running mean in Adam and Muon, and in SGD a sum, which
            is longer.
        sign: −1 or +1.

    Raises:
        ValueError: another sign.
        TypeError: not an optimizer, or an empty list.

    References:
        Becker et al., [Momentum-SAM](https://arxiv.org/abs/2401.12033), 2024.

    Example:
        >>> Momentum(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9))
        Momentum(SGD, sign=-1)
    """

    optimizer: Any
    sign: int = -1

    def __post_init__(self) -> None:
        _check_sign(self.sign)
        optimizers = self._optimizers
        if not optimizers or not all(hasattr(o, "param_groups") and hasattr(o, "state") for o in optimizers):
            raise TypeError(
                f"optimizer must be a built torch.optim.Optimizer, or a list of them, got {self.optimizer!r}."
            )

    @property
    def _optimizers(self) -> Sequence[Any]:
        return self.optimizer if isinstance(self.optimizer, (list, tuple)) else (self.optimizer,)

    def __repr__(self) -> str:
        kinds = " and ".join(type(o).__name__ for o in self._optimizers)
        return f"Momentum({kinds}, sign={self.sign})"

    def check(self, named: Mapping[str, nn.Parameter]) -> None:
        """Refuse optimizers that hold no momentum for one of the parameters."""
        groups = {p: (o, group) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        if any(type(o).__name__ == "ZeroRedundancyOptimizer" for o in self._optimizers):
            raise ValueError(
                "ascent=Momentum(optimizer) needs the whole momentum on every rank, which ZeroRedundancyOptimizer "
                "spreads: use ascent=Previous()."
            )
        for name, p in named.items():
            if p not in groups:
                raise ValueError(
                    f"ascent=Momentum(optimizer): the optimizer does not hold the selected parameter {name!r}; give it "
                    "all of them, name every optimizer (a list), or select those that it holds (include, exclude)."
                )
            owner, group = groups[p]
            if not _has_momentum(group):
                raise ValueError(
                    f"ascent=Momentum(optimizer) needs an optimizer with momentum, got {type(owner).__name__} without: "
                    "use SGD(..., momentum=0.9), an Adam, or ascent=Previous()."
                )

    def vector(self, p: nn.Parameter) -> Tensor | None:
        """v of a parameter; None before the optimizer has stepped.

        Raises:
            ValueError: an optimizer that keeps no momentum by a known name.
        """
        found = ((o, state) for o in self._optimizers if (state := o.state.get(p)))
        owner, state = next(found, (None, None))
        if state is None:
            return None
        for key in BUFFERS:
            if key in state:
                return state[key]
        raise ValueError(
            f"ascent=Momentum(optimizer): {type(owner).__name__} keeps {sorted(map(str, state))} for a "
            f"parameter, and no momentum by the name {' or '.join(BUFFERS)}: use ascent=Previous(), or an optimizer of "
            "torch.optim."
        )


@dataclass(frozen=True)
class Previous:
    r"""$d = \pm g/\|g\|$ with g the gradient of the step before, as it stood in `.grad`: one pass.

    SAM with an ascent that is a batch and a step old. Holds a copy of the gradients from step to step, which
    `state_dict()` saves. The rest is as for `Momentum`.

    Args:
        sign: +1 goes uphill, as SAM does; −1 looks ahead.

    Raises:
        ValueError: another sign.

    References:
        The gradient of another batch as ascent: Xie et al., [SAMPa](https://arxiv.org/abs/2410.10683), NeurIPS 2024,
        which takes it on a second device.

    Example:
        >>> Previous()
        Previous(sign=1)
    """

    sign: int = 1

    def __post_init__(self) -> None:
        _check_sign(self.sign)


@dataclass(frozen=True)
class Ahead:
    r"""All gradients of a step at $\tilde\theta = \theta + \rho d$ instead of θ, with d known beforehand.

    $$\hat g = g_1 + \tfrac\gamma\epsilon (g_2 - g_1), \;
    g_1 = \nabla L(\tilde\theta), g_2 = \nabla L(\tilde\theta + \epsilon d_1)$$

    MSAM and a penalty in one step, at the price of the penalty: with `Fraction(q)` 1 + q passes. With γ = 0 it is MSAM
    alone. Still one extra copy of the parameters. The loss, BatchNorm statistics and gradients outside the selection
    are those at $\tilde\theta$. For `backward` and `step(closure)`; `perturbed()` begins when the first pass is over.

    Args:
        direction: `Momentum(optimizer)` or `Previous()`.
        rho: ρ ≥ 0 in the units of the weights, a number or a function of the step.

    Raises:
        ValueError: ρ < 0 or not finite.
        TypeError: another direction.

    References:
        Measured in docs/frontier.md; we know of no publication.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> Ahead(Momentum(optimizer), rho=1.0)
        Ahead(direction=Momentum(SGD, sign=-1), rho=1.0)
    """

    direction: Momentum | Previous
    rho: Schedule

    def __post_init__(self) -> None:
        if not isinstance(self.direction, (Momentum, Previous)):
            raise TypeError(f"direction must be gradreg.Momentum(optimizer) or Previous(), got {self.direction!r}.")
        if not callable(self.rho):
            check_number("rho", self.rho, 0, math.inf)

    def radius(self, step: int) -> float:
        """ρ at a step.

        Raises:
            ValueError: a schedule that gave a number < 0 or not finite.
        """
        radius = value_at(self.rho, step)
        check_number("rho", radius, 0, math.inf)
        return radius


Choice = str | Ascent | Momentum | Previous


def resolve(ascent: Choice) -> Ascent | Momentum | Previous:
    """The ascent of that name, or the value itself."""
    if isinstance(ascent, (Momentum, Previous)):
        return ascent
    if ascent in ("momentum", "previous"):
        made = "Momentum(optimizer)" if ascent == "momentum" else "Previous()"
        raise ValueError(f"ascent must be one of {sorted(ASCENTS)} or a value, got {ascent!r}: pass gradreg.{made}.")
    return resolve_ascent(ascent)


class Directions:
    """Finds d; remembers the gradients of the step before where that is what d is made of.

    Args:
        ascent: what d is made of.
        moves_all: where d is known, parameters without a vector take part with 0.
    """

    def __init__(self, ascent: Ascent | Momentum | Previous, moves_all: bool = False) -> None:
        self._ascent = ascent
        self._moves_all = moves_all
        self._previous: dict[str, Tensor] = {}

    @property
    def are_known(self) -> bool:
        """Whether d is there before any pass."""
        return isinstance(self._ascent, (Momentum, Previous))

    @property
    def remembers(self) -> bool:
        return isinstance(self._ascent, Previous)

    def find(
        self,
        named: Mapping[str, nn.Parameter],
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        grad_scale: Scale,
        norm: vectors.Scalar | None = None,
    ) -> tuple[Sequence[nn.Parameter], Sequence[Tensor], Scale]:
        """The parameters that move, and d = scale · vectors.

        `gradients` holds `grad_scale` · ∇L of `parameters`, of length `norm` if that was taken; neither is looked at
        where d is known, which is then made of the vectors of `named`.
        """
        ascent = self._ascent
        if isinstance(ascent, (Momentum, Previous)):
            found = {p: v for name, p in named.items() if (v := self._known(ascent, name, p)) is not None}
            if not found:
                return [], [], 0.0
            length = vectors.read(vectors.norm(list(found.values())))
            if self._moves_all:
                found = {p: found[p] if p in found else torch.zeros_like(p) for p in named.values()}
            scale = ascent.sign * vectors.reciprocal(length)
            return list(found), list(found.values()), scale
        if not gradients:
            return [], [], 0.0
        if type(ascent) is Gradient:
            return parameters, gradients, 1.0 / grad_scale
        if type(ascent) is Normalized and norm is not None:  # taken once, and among ranks communicated once
            return parameters, gradients, vectors.safe_reciprocal(norm)
        direction, scale = ascent([p.data for p in parameters], gradients, grad_scale)
        if type(ascent) not in _OURS:
            _check_direction(ascent, parameters, direction)
        return parameters, direction, scale

    def _known(self, ascent: Momentum | Previous, name: str, p: nn.Parameter) -> Tensor | None:
        return ascent.vector(p) if isinstance(ascent, Momentum) else self._previous.get(name)

    def remember(self, named: Mapping[str, nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """The step is done: its gradients are the previous ones now. What is not finite is forgotten."""
        if not self.remembers:
            return
        kept = {
            name: vectors.laid_out(g.to_dense() if g.is_sparse else g, p)
            for (name, p), g in zip(named.items(), gradients)
            if g is not None
        }
        with torch.no_grad():
            room = {
                name: self._previous[name]
                if name in self._previous and self._previous[name].shape == g.shape
                else torch.empty_like(g)
                for name, g in kept.items()
            }
            vectors.copy_(list(room.values()), list(kept.values()))
            for g in room.values():
                if not vectors.is_readable(g):
                    vectors.local(g).nan_to_num_(0.0, 0.0, 0.0)
        self._previous = room

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._previous)

    def load_state_dict(self, state: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        """
        Raises:
            ValueError: gradients of other parameters or shapes than those that are selected; nothing is changed.
        """
        for name, g in state.items():
            if name not in named or named[name].shape != g.shape:
                raise ValueError(
                    f"state_dict['previous'] holds {name!r} of shape {tuple(g.shape)}, which is no selected parameter: "
                    "load it into the model and selection that it was saved from."
                )
        with torch.no_grad():
            self._previous = {name: g.to(named[name].device, copy=True) for name, g in state.items()}


_OURS = {type(ascent) for ascent in ASCENTS.values()}


def _check_direction(ascent: Any, parameters: Sequence[Tensor], direction: Any) -> None:
    """Refuse what an ascent of the user's own returned, if it is no vector for each parameter."""
    expected = [tuple(p.shape) for p in parameters]
    found = [tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__ for d in direction]
    if found != expected:
        raise ValueError(
            f"ascent must return one vector for each parameter and a scale, and {ascent!r} returned {len(found)} for "
            f"{len(expected)} parameters, of shapes {found[:3]} where {expected[:3]} were expected."
        )


def _check_sign(sign: int) -> None:
    if sign not in (-1, 1):
        raise ValueError(f"sign must be −1 (ahead) or +1 (uphill), got {sign!r}.")


def _has_momentum(group: Mapping[str, Any]) -> bool:
    betas = group.get("betas")
    return bool(group.get("momentum")) or (betas is not None and float(betas[0]) > 0)
