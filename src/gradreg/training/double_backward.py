r"""The exact scheme around a real model: $H d$ by differentiating the gradient, $\hat g = g_1 + \gamma H d$.

It is the slow reference, about three times the cost of plain training on paper, and it needs a graph of the backward
pass: more memory, and no fused attention, compiled module or DistributedDataParallel. Each is refused with its way out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradreg.functional.ascents import Ascent
from gradreg.training.combination import Gradients


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


def differentiable_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """∇ loss with its own graph; None where the loss does not depend on an input."""
    return list(torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True))


def direction(
    ascent: Ascent, parameters: Sequence[Tensor], gradients: Gradients, grad_scale: float | Tensor
) -> list[Tensor | None]:
    """d, detached; None where there is no gradient."""
    present = [(i, g.detach()) for i, g in enumerate(gradients) if g is not None]
    with torch.no_grad():
        values, scale = ascent([parameters[i].detach() for i, _ in present], [g for _, g in present], grad_scale)
        chosen: list[Tensor | None] = [None] * len(gradients)
        for (i, _), value in zip(present, values):
            chosen[i] = value * scale
    return chosen


def curvature_product(gradients: Gradients, inputs: Sequence[Tensor], along: Gradients) -> list[Tensor | None]:
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
