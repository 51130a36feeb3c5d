"""Shards: what FSDP2 and tensor parallelism keep beside them, which a displacement of the shards would not reach.

FSDP2 computes with gathered weights and gives them back after each backward pass, unless it was told to keep them
(`set_reshard_after_backward(False)`, `unshard()`, an evaluation before the step). Where shards move, gathered weights
would stay behind: those of θ in the displaced pass, those of θ + εd after it.

Under tensor parallelism the gradient of a weight that all ranks hold may come as parts that are still to be summed
(the norm layers of `SequenceParallel`). Sums of parts are parts, but a displacement by one part is none.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors


def _fsdp() -> Any:
    return sys.modules.get("torch.distributed.fsdp")  # not loaded: nothing is sharded by it


def refuse_flattened(modules: Iterable[nn.Module]) -> None:
    """
    Raises:
        ValueError: FSDP1, whose flat parameters have lost their shapes and whose gradients and norms are a rank's own.
    """
    fsdp = _fsdp()
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in modules):
        raise ValueError(
            "model must not be wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters, so that norms "
            "and displacements would be those of one rank's share: shard it with torch.distributed.fsdp.fully_shard "
            "(FSDP2)."
        )


def sharded(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that FSDP2 has sharded."""
    fsdp = _fsdp()
    return [] if fsdp is None else [m for m in modules if isinstance(m, fsdp.FSDPModule)]


def reshard(modules: Iterable[Any], after_error: bool = False) -> None:
    """FSDP2: give gathered weights back, so that the next forward gathers what the shards hold then.

    For moments between two passes. Costs a look at each module where nothing is gathered, and never communicates.

    Args:
        modules: those that FSDP2 has sharded.
        after_error: a pass broke off, and left FSDP2 in the middle of it.
    """
    for module in modules:
        if after_error and hasattr(module, "reset_iter_state"):  # torch 2.13; does for all below a root
            with contextlib.suppress(RuntimeError):  # not the root, or a rank that is gone
                module.reset_iter_state()
        elif _is_gathering(module):
            module.unshard()  # waits for it, and the line below gives it back
        module.reshard()


def keeps_gradients(modules: Iterable[Any]) -> bool:
    """FSDP2: whether `set_requires_gradient_sync(False)` keeps gradients of any where no optimizer sees them."""
    return any(not getattr(group, "reduce_grads", True) for m in modules for group in _groups(m))


def _is_gathering(module: Any) -> bool:
    """Whether `unshard(async_op=True)` was called, and no forward has taken what it gathers."""
    return any(getattr(group, "_all_gather_result", None) is not None for group in _groups(module))


def _groups(module: Any) -> list[Any]:
    """What torch keeps of a module's shards; two of its fields are nowhere public."""
    state = module._get_fsdp_state()
    return getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]


def lay_out_gradients(parameters: Sequence[Tensor]) -> bool:
    """`.grad` laid out as its parameter is, where it came as the parts of a sum; whether any did."""
    others = [(p, p.grad) for p in parameters if p.grad is not None and not vectors.is_laid_out(p.grad, p)]
    with torch.no_grad():
        for p, g in others:
            p.grad = vectors.laid_out(g, p)
    return bool(others)
