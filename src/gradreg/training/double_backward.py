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
from gradreg.training.combination import Gradients
from gradreg.training.directions import Momentum, Previous
from gradreg.training.watch import compiled_call

Choice = Ascent | Momentum | Previous


def check_supported(model: nn.Module) -> None:
    """Refuse a model that double backpropagation cannot go through."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "OptimizedModule" or compiled_call(module) is not None:
            raise ValueError(
                f'scheme="exact" cannot differentiate twice through a module compiled by torch.compile ({kind}): '
                'train the uncompiled module, or use scheme="forward".'
            )
        if kind == "DistributedDataParallel" or "FSDP" in kind or "FullySharded" in kind:
            raise ValueError(
                f'scheme="exact" cannot be reduced over ranks by {kind}, whose hooks see the first derivative only: '
                'use scheme="forward".'
            )


def in_one_pass(
    loss: Tensor, selected: Sequence[nn.Parameter], others: Sequence[Tensor], ascent: Choice
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """g1 of the selected parameters and of the others, and H d, from one loss that is differentiated on the spot."""
    parameters = [*selected, *(p for p in others if p.requires_grad)]
    first = _differentiable_gradient(loss, parameters)
    mine = first[: len(selected)]
    product = _curvature_product(mine, selected, _direction(ascent, selected, mine, 1.0))
    for p, g in zip(parameters, first):
        if g is not None:
            p.grad = g.detach() if p.grad is None else p.grad + g.detach()
    return [None if g is None else g.detach() for g in mine], product


def of_window(
    calls: Sequence[Callable[[], Tensor]],
    selected: Sequence[nn.Parameter],
    first: Gradients,
    ascent: Choice,
    factors: Sequence[Tensor],
    scale: float | Tensor,
) -> list[Tensor | None]:
    """Σ H_i d over the losses of a window, where d is known only after all of its first pass."""
    along = _direction(ascent, selected, first, scale)
    total: list[Tensor | None] = [None] * len(selected)
    for k, call in enumerate(calls):
        gradient = _differentiable_gradient(call(), selected)
        for i, product in enumerate(_curvature_product(gradient, selected, along)):
            if product is not None:
                scaled = factors[k] * product if factors else product
                before = total[i]
                total[i] = scaled if before is None else before + scaled
    return total


def _differentiable_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """∇ loss with its own graph; None where the loss does not depend on an input."""
    return list(torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True))


def _direction(
    ascent: Choice, parameters: Sequence[Tensor], gradients: Gradients, grad_scale: float | Tensor
) -> list[Tensor | None]:
    """d, detached; None where there is no gradient."""
    assert not isinstance(ascent, (Momentum, Previous)), "refused by check_together"
    present = [(i, vectors.laid_out(g.detach(), parameters[i])) for i, g in enumerate(gradients) if g is not None]
    if not present:
        return [None] * len(gradients)
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
