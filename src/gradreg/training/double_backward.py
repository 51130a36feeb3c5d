r"""The exact scheme around a real model: $H d$ by differentiating the gradient, $\hat g = g_1 + \gamma H d$.

It is the slow reference, about three times the cost of plain training on paper, and it needs a graph of the backward
pass: more memory, and no fused attention, compiled module or DistributedDataParallel. Each is refused with its way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors
from gradreg.functional.ascents import Ascent
from gradreg.training.calls import checked
from gradreg.training.combination import Gradients, Measured, add_penalty, give_gradients
from gradreg.training.diagnostics import Diagnostics
from gradreg.training.directions import Momentum, Previous
from gradreg.training.second_pass import Method


def check_supported(model: nn.Module) -> None:
    """Refuse a model that double backpropagation cannot go through."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f'scheme="exact" cannot differentiate twice through a module compiled by torch.compile ({kind}): '
                'train the uncompiled module, or use scheme="forward".'
            )
        if kind == "DistributedDataParallel" or "FSDP" in kind or "FullySharded" in kind:
            raise ValueError(
                f'scheme="exact" cannot be reduced over ranks by {kind}, whose hooks see the first derivative only: '
                'use scheme="forward".'
            )


class ExactPenalty:
    """Adds γ H d to the gradient of a step.

    Args:
        selected: the penalized parameters.
        method: its ascent, cap and policy.
        gamma: γ of this step.
        diagnostics: receives the measurements.
    """

    def __init__(
        self, selected: Sequence[nn.Parameter], method: Method, gamma: float, diagnostics: Diagnostics
    ) -> None:
        self._selected = selected
        self._method = method
        self._gamma = gamma
        self._diagnostics = diagnostics

    def in_one_pass(self, loss_fn: Callable[[], Tensor], others: Sequence[nn.Parameter]) -> Tensor:
        """From one loss, whose gradient is differentiated on the spot; `others` receive g1."""
        parameters = [*self._selected, *(p for p in others if p.requires_grad)]
        loss = checked(loss_fn())
        first = _differentiable_gradient(loss, parameters)
        mine = first[: len(self._selected)]
        along = _direction(self._method.ascent, self._selected, mine, 1.0)
        penalty = _curvature_product(mine, self._selected, along)
        give_gradients(parameters, [None if g is None else g.detach() for g in first])
        self.add(penalty, 1.0)
        return loss.detach()

    def of_window(
        self, calls: Sequence[Callable[[], Tensor]], factors: Sequence[Tensor], first: Gradients, scale: float | Tensor
    ) -> list[Tensor | None]:
        """Σ H_i d over the losses of a window, where d is known only after all of its first pass."""
        along = _direction(self._method.ascent, self._selected, first, scale)
        total: list[Tensor | None] = [None] * len(self._selected)
        for k, call in enumerate(calls):
            gradient = _differentiable_gradient(call(), self._selected)
            for i, product in enumerate(_curvature_product(gradient, self._selected, along)):
                if product is not None:
                    scaled = factors[k] * product if factors else product
                    before = total[i]
                    total[i] = scaled if before is None else before + scaled
        return total

    def add(self, penalty: Gradients, grad_scale: float | Tensor) -> None:
        """`.grad` ← g1 + γ H d."""
        first = [p.grad for p in self._selected]
        norm = vectors.norm([g for g in first if g is not None])
        measured = Measured(norm, self._gamma)
        with torch.no_grad():
            add_penalty(self._selected, first, penalty, measured, self._method.cap, self._method.fall_back)
        result = vectors.norm([p.grad for p in self._selected if p.grad is not None])
        self._diagnostics.record(norm / grad_scale, measured)
        self._diagnostics.count(vectors.has_direction(norm) & result.isfinite())


def _differentiable_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """∇ loss with its own graph; None where the loss does not depend on an input."""
    return list(torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True))


def _direction(
    ascent: Ascent | Momentum | Previous, parameters: Sequence[Tensor], gradients: Gradients, grad_scale: float | Tensor
) -> list[Tensor | None]:
    """d, detached; None where there is no gradient."""
    assert not isinstance(ascent, (Momentum, Previous)), "refused by check_together"
    present = [(i, g.detach()) for i, g in enumerate(gradients) if g is not None]
    with torch.no_grad():
        values, scale = ascent([parameters[i].detach() for i, _ in present], [g for _, g in present], grad_scale)
        chosen: list[Tensor | None] = [None] * len(gradients)
        for (i, _), value in zip(present, values):
            chosen[i] = value * scale
    return chosen


def _curvature_product(gradients: Gradients, inputs: Sequence[Tensor], along: Gradients) -> list[Tensor | None]:
    """H d, from a differentiable gradient; None where the gradient does not depend on an input."""
    pairs = [(g, d) for g, d in zip(gradients, along) if g is not None and g.requires_grad and d is not None]
    if not pairs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs)
    try:
        return list(torch.autograd.grad(outputs, inputs, grad_outputs=cotangents, allow_unused=True))
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented" not in str(error) and "double backward" not in str(error):
            raise
        raise RuntimeError(
            'scheme="exact" differentiates twice, and an operation of this model has no second derivative '
            f"({str(error).splitlines()[0]}). For fused attention use torch.nn.attention.sdpa_kernel(SDPBackend.MATH); "
            'in general use scheme="forward", which needs first derivatives only.'
        ) from error
