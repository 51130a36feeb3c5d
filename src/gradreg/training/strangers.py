"""What lives outside the model and takes part all the same: trainable tensors of the loss, gradient scalers, averages.

Nobody hands them to us. They are looked for among all living objects, once, in the first step.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves

from gradreg.training.notices import warn

SCALER_MODULES = ("torch.amp.grad_scaler", "torch.cuda.amp.grad_scaler")


class Census:
    """All living tensors, optimizers and gradient scalers. Taking it reads every object once, so it is taken once."""

    def __init__(self) -> None:
        objects = gc.get_objects()
        kinds = set(map(type, objects))  # their own type is asked, since proxies answer for others
        scalers = tuple(sys.modules[name].GradScaler for name in SCALER_MODULES if name in sys.modules)
        wanted = {k for k in kinds if issubclass(k, (Tensor, torch.optim.Optimizer, *scalers))}
        wanted -= {k for k in kinds if issubclass(k, UninitializedTensorMixin)}
        found = [x for x in objects if type(x) in wanted]
        self.tensors = [x for x in found if isinstance(x, Tensor)]
        self.optimizers = [x for x in found if isinstance(x, torch.optim.Optimizer)]
        self.scalers: list[Any] = [
            x for x in found if isinstance(x, scalers) and x.is_enabled() and x._scale is not None
        ]

    def scales(self) -> set[int]:
        """Where the factors of the scalers lie."""
        scales: list[Any] = [scaler._scale for scaler in self.scalers]
        return {scale.data_ptr() for scale in scales}  # pyright: ignore


class Strangers:
    """Trainable tensors that the loss uses and the model does not own. They keep g1, as what is not selected does."""

    def __init__(self) -> None:
        self._found: list[weakref.ref[Tensor]] = []
        self._versions: dict[int, int] = {}
        self.has_looked = False

    @property
    def tensors(self) -> list[Tensor]:
        return [t for ref in self._found if (t := ref()) is not None]

    def look(self, known: Sequence[Tensor], among: Sequence[Tensor]) -> list[Tensor]:
        """Before the displaced pass: every leaf outside of `known` that could receive a gradient in it.

        `among`: the leaves of the graph, where it was in our hands, else all tensors.
        """
        ours = set(map(id, known))
        leaves = [t for t in among if t.is_leaf and t.requires_grad and id(t) not in ours]
        self._found = [weakref.ref(t) for t in leaves]
        self._versions = {id(t): t._version for t in leaves}
        return leaves

    def keep_met(self) -> None:
        """After it: those that did, where this has not been found out before."""
        if self.has_looked:
            return
        self.has_looked = True
        # One that has moved meanwhile is trained by an optimizer of its own, in the loss.
        met = [t for t in self.tensors if t.grad is not None and t._version == self._versions[id(t)]]
        self._found = [weakref.ref(t) for t in met]
        if met:
            shapes = [tuple(t.shape) for t in met][:3]
            warn(
                f"the loss depends on {len(met)} trainable tensors outside the model (shapes {shapes}): they keep the "
                "gradient of the first pass, without the penalty. To regularize them too, give the regularizer a model "
                "that owns them, such as nn.ModuleList([...])."
            )


class Averages:
    """Finds an average of the weights that was updated while the weights were displaced.

    Args:
        parameters: of the model.
        known: addresses of other tensors that are looked after: gradients, buffers.
        census: of what lives.
    """

    def __init__(self, parameters: Sequence[Tensor], known: Sequence[int], census: Census) -> None:
        states = [tree_leaves(dict(optimizer.state)) for optimizer in census.optimizers]
        ours = {*map(id, parameters), *known, *(id(x) for state in states for x in state)}
        shapes = {p.shape for p in parameters if p.numel() > 1}
        alike = (t for t in census.tensors if t.is_leaf and id(t) not in ours and not t.is_inference())
        self._versions = [(weakref.ref(t), t._version) for t in alike if t.is_floating_point() and t.shape in shapes]

    def warn_if_moved(self) -> None:
        # What has a gradient is trained in the block, by an optimizer of its own.
        alive = [(t, version) for ref, version in self._versions if (t := ref()) is not None and t.grad is None]
        moved = [t for t, version in alive if t._version != version]
        if moved:
            warn(
                f"{len(moved)} tensors of the shapes of weights changed inside the perturbed() block (the first: "
                f"{tuple(moved[0].shape)}), where the weights are displaced. If they are an average of the weights, "
                "update it after the block."
            )


def refuse_scaled_loss(loss: Tensor) -> None:
    """Refuse a loss that a scaler has multiplied: the penalty would be that of another loss.

    Raises:
        ValueError: with the recipe.
    """
    other = getattr(loss.grad_fn, "_saved_other", None)
    if not isinstance(other, Tensor) or other.ndim or other.dtype is not torch.float32:
        return
    if other.data_ptr() in Census().scales():
        raise ValueError(
            "loss_fn returned scaler.scale(loss), whose penalty grows with the scale: return the loss itself, and pass "
            "backward=lambda loss: scaler.scale(loss).backward() to regularizer.backward()."
        )


def warn_of_scaler(grad_scale: float | Tensor, census: Census) -> None:
    """Warn where a scaler is in use, its gradients were not unscaled, and nobody said by what they are multiplied."""
    if isinstance(grad_scale, Tensor) or grad_scale != 1:
        return
    for scaler in census.scalers:
        stages = [state["stage"].name for state in scaler._per_optimizer_states.values()]
        if scaler.get_scale() != 1 and "UNSCALED" not in stages:
            warn(
                f"a GradScaler with scale {scaler.get_scale():g} is in use, and perturbed() was not told of it: if "
                ".grad carries the scale, the displacement is so many times too long. Call scaler.unscale_(optimizer) "
                "before the block and do not scale in it, or pass perturbed(grad_scale=scaler.get_scale()) and do."
            )
            return
