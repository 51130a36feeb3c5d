r"""Communication hooks of DistributedDataParallel: what a hook does to the average, it does to each pass by itself.

$\hat g - g_1 = \tfrac\gamma\epsilon (g_2 - g_1)$ is the difference of two averages that are nearly equal. A hook that
changes them differently (PowerSGD, whose error feedback hands on to one pass what it left out of the other) makes a
penalty of its own; one that rounds leaves its rounding, times γ/ε. A step that communicates once has no such
difference. Hooks of the user's own are taken to average.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel

_TORCHS = "torch.distributed.algorithms.ddp_comm_hooks."
_AVERAGING = ("allreduce_hook", "noop_hook")  # the latter does not average at all, which is the user's own wish
_ROUNDING = ("fp16_compress_hook", "bf16_compress_hook", "FP16_COMPRESS")
_AROUND = ("fp16_compress_wrapper_hook", "bf16_compress_wrapper_hook")
_COMPRESSING = (
    "powerSGD_hook",
    "batched_powerSGD_hook",
    "quantization_pertensor_hook",
    "quantization_perchannel_hook",
    "post_localSGD_hook",
)


def check_hook(model: DistributedDataParallel, communicates_twice: bool) -> bool:
    """Refuse a hook under which the two passes differ by more than their weights; whether it rounds, with a warning.

    Args:
        model: the wrapper; hooks may be registered at any time before its first backward pass, and after that.
        communicates_twice: whether both passes of a step average gradients.

    Raises:
        ValueError: PowerSGD, quantization or post-local SGD where both passes average gradients; a hook that steps the
            optimizer or casts the weights inside the backward pass.
    """
    names = _names(model)
    for name in names:
        if name not in (*_AVERAGING, *_ROUNDING, *_COMPRESSING):
            raise ValueError(
                f"model has the communication hook {name}, which moves or casts the weights inside the backward pass "
                "of each pass, while they are displaced: use DistributedDataParallel without it, and step the "
                "optimizer after the door has closed."
            )
        if communicates_twice and name in _COMPRESSING:
            raise ValueError(
                f"model has the communication hook {name}, which changes the average of each pass in another way, so "
                "that g2 − g1 is mostly its error: use allreduce_hook or none, or "
                'GradientRegularizer(..., ascent_sync="local"), which communicates once a step.'
            )
    rounds = communicates_twice and any(name in _ROUNDING for name in names)
    if rounds:
        warnings.warn(
            f"The communication hook {names[-1]} rounds the gradients of both passes, and ĝ receives that rounding "
            'times γ/ε: use a larger epsilon, ascent_sync="local", which communicates once a step, or allreduce_hook.',
            UserWarning,
            stacklevel=6,
        )
    return rounds


def _names(model: DistributedDataParallel) -> list[str]:
    """The hooks of torch's own that a model has, by name; a wrapper and what it wraps are two."""
    names: list[str] = []
    for hook, state in model._comm_hooks:
        names += _names_of(hook)
        if type(state).__name__ == "PowerSGDState" and not names:  # handed on by a function of the user's
            names.append("powerSGD_hook")
    if names or model._comm_hooks:
        return names
    # One of those written in C++ is known by the log only; both of them average.
    name = getattr(model, "_get_ddp_logging_data", dict)().get("comm_hook") or ""
    return ["FP16_COMPRESS"] if "FP16" in name else []


def _names_of(hook: Callable[..., Any]) -> list[str]:
    hook = getattr(hook, "func", hook)
    if not (getattr(hook, "__module__", None) or "").startswith(_TORCHS):
        return []
    name = hook.__name__
    if name in _AROUND:
        return [*_names_of(inspect.getclosurevars(hook).nonlocals["hook"]), name.replace("_wrapper", "")]
    return [name]
