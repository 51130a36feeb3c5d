"""The displacement: weights moved to θ + εd for the second pass, and put back bitwise.

Adding and subtracting is not bitwise neutral, so one extra copy of the selected weights is kept between steps.
There are two ways to use it. On the host the copy receives the displaced weights and each parameter points at it
during the second pass: the true weights are never written. Elsewhere, and where a parameter is a view into a
larger storage, others may hold its address (captured graphs, flat buffers, shards), so the copy receives the true
weights and the parameter is displaced in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradreg import _vectors as vectors

_GUARD = "gradreg"


def _may_point_elsewhere(p: Tensor) -> bool:
    plain = type(p.data) is Tensor and p.device.type == "cpu" and p.layout is torch.strided
    return plain and p.untyped_storage().nbytes() == p.numel() * p.element_size()


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    del prefix, keep_vars
    raise RuntimeError(
        f"state_dict() of {type(module).__name__} while its weights are displaced for the second pass would save "
        "θ + εd instead of θ. Save after backward(), step() or the perturbed() block has ended."
    )


class Displacement:
    """Moves parameters and puts them back; owns the one extra copy.

    Between `open` and `close` every `state_dict()` of the model raises.

    Args:
        keeps_room: keep the copy from step to step; else it is given back with each parameter that is put back.
    """

    def __init__(self, keeps_room: bool = True) -> None:
        self._keeps_room = keeps_room
        self._places: list[tuple[nn.Parameter, int, torch.Size]] = []
        self._copies: list[Tensor] = []
        self._pointing: list[bool] = []
        self._true: list[Tensor] = []
        self._is_back: list[bool] = []
        self._guarded: list[nn.Module] = []

    @property
    def is_open(self) -> bool:
        return bool(self._true)

    def open(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        step: Tensor,
        direction: Sequence[Tensor],
    ) -> None:
        """θ ← θ + step · direction. Call `close` whatever happens, also if this raises."""
        self._make_room(parameters)
        # The list below is what makes close() put back; it is set before the first weight moves.
        true = [p.data for p in parameters]
        in_place = [i for i, pointing in enumerate(self._pointing) if not pointing]
        if in_place:
            vectors.copy_([self._copies[i] for i in in_place], [true[i] for i in in_place])
        self._true, self._is_back = true, [False] * len(true)
        # register_state_dict_pre_hook, without a handle for each module: this runs in every step.
        self._guarded = [m for m in modules if m._parameters]
        for module in self._guarded:
            module._state_dict_pre_hooks[_GUARD] = _refuse_state_dict  # type: ignore[index]
        targets = [c if pointing else t for c, t, pointing in zip(self._copies, true, self._pointing)]
        sources = [t if pointing else c for c, t, pointing in zip(self._copies, true, self._pointing)]
        vectors.add_scaled(sources, step, direction, out=targets)
        for p, copy, pointing in zip(parameters, self._copies, self._pointing):
            if pointing:
                p.data = copy
        torch.clear_autocast_cache()  # or autocast would serve low-precision copies of the weights of pass 1

    def applied(self) -> Iterator[Tensor]:
        """What was really added to each parameter, displaced − true, after rounding."""
        for (p, _, _), copy, true, pointing in zip(self._places, self._copies, self._true, self._pointing):
            yield copy - true if pointing else p.data - copy

    def put_back(self, i: int) -> None:
        """Put one parameter back before the others, and give its copy back; only without `keeps_room`."""
        if self._true and not self._is_back[i]:
            if self._pointing[i]:
                self._places[i][0].data = self._true[i]
            else:
                vectors.copy_([self._true[i]], [self._copies[i]])
            self._is_back[i] = True
            self._copies[i] = self._true[i]

    def close(self) -> None:
        """Put the weights back, bitwise and in their own storage."""
        for module in self._guarded:
            module._state_dict_pre_hooks.pop(_GUARD, None)  # type: ignore[arg-type]
        self._guarded = []
        if not self._true:
            return
        kept = []
        for i, ((p, _, _), true) in enumerate(zip(self._places, self._true)):
            if self._pointing[i]:
                p.data = true
            elif not self._is_back[i]:
                kept.append((true, self._copies[i]))
        if kept:
            vectors.copy_([true for true, _ in kept], [copy for _, copy in kept])
        self._true = []
        if not self._keeps_room:
            self._places, self._copies = [], []
        torch.clear_autocast_cache()

    def _make_room(self, parameters: Sequence[nn.Parameter]) -> None:
        places = [(p, p.data_ptr(), p.shape) for p in parameters]
        same = len(places) == len(self._places) and all(
            p is q and address == old_address and shape == old_shape
            for (p, address, shape), (q, old_address, old_shape) in zip(places, self._places)
        )
        if not same:
            self._places = places
            self._copies = [torch.empty_like(p.data) for p in parameters]
            self._pointing = [_may_point_elsewhere(p) for p in parameters]


class EarlyReturn:
    """Puts each parameter back once its gradient is complete: displaced weights make room for gradients.

    By then every operation that read the parameter has run backward. Where a gradient arrives in a backward pass
    within the backward pass (reentrant activation checkpoints), more of it may come, and the parameter stays.

    Args:
        displacement: open, and without `keeps_room`.
        moving: the parameters that it moved.
    """

    def __init__(self, displacement: Displacement, moving: Sequence[nn.Parameter]) -> None:
        self._displacement = displacement
        self._moving = moving
        self._pass: int | None = None
        self._hooks: list[RemovableHandle] = []

    def watch(self, loss: Tensor) -> None:
        """The loss whose one backward pass completes all gradients."""
        loss.register_hook(self._begin)

    def _begin(self, gradient: Tensor) -> None:
        del gradient
        self._pass = torch._C._current_graph_task_id()

    def _arrive(self, i: int, p: Tensor) -> None:
        del p
        if self._pass == torch._C._current_graph_task_id():
            self._displacement.put_back(i)

    def __enter__(self) -> EarlyReturn:
        for i, p in enumerate(self._moving):
            self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._arrive, i)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
