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

    Between `open` and `close` every `state_dict()` of the model raises. Opened once more, it moves on from where the
    weights stand, in the same memory; the next `close` goes back there, by the same sum as before and thus bitwise.

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
        self._stand: tuple[Tensor, Sequence[Tensor]] | None = None  # the step and direction that led to a base
        self._moved_on: list[int] = []  # the parameters of a second move

    @property
    def level(self) -> int:
        """How many moves there are to be taken back."""
        return bool(self._true) + bool(self._moved_on)

    def open(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        step: Tensor,
        direction: Sequence[Tensor],
        is_base: bool = False,
    ) -> None:
        """θ ← θ + step · direction. Call `close` whatever happens, also if this raises.

        `is_base`: the weights may move on from there, so `direction` is held until they are back.
        """
        if self._true:
            self._move_on(parameters, step, direction)
            return
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
        self._stand = (step, direction) if is_base else None
        vectors.add_scaled(self._sources(), step, direction, out=self._targets())
        for p, copy, pointing in zip(parameters, self._copies, self._pointing):
            if pointing:
                p.data = copy
        torch.clear_autocast_cache()  # or autocast would serve low-precision copies of the weights of pass 1

    def _sources(self) -> list[Tensor]:
        """The true weights."""
        return [t if pointing else c for c, t, pointing in zip(self._copies, self._true, self._pointing)]

    def _targets(self) -> list[Tensor]:
        """The displaced weights."""
        return [c if pointing else t for c, t, pointing in zip(self._copies, self._true, self._pointing)]

    def _move_on(self, parameters: Sequence[nn.Parameter], step: Tensor, direction: Sequence[Tensor]) -> None:
        places = {p: i for i, (p, _, _) in enumerate(self._places)}
        self._moved_on = [places[p] for p in parameters]
        targets = self._targets()
        moving = [targets[i] for i in self._moved_on]
        vectors.add_scaled(moving, step, direction, out=moving)
        torch.clear_autocast_cache()

    def applied(self) -> Iterator[Tensor]:
        """What the last move really added to each of its parameters, after rounding."""
        sources, targets = self._sources(), self._targets()
        if not self._moved_on:
            yield from (target - source for source, target in zip(sources, targets))
            return
        assert self._stand is not None
        step, direction = self._stand
        for i in self._moved_on:
            stood = torch.empty_like(targets[i])
            vectors.add_scaled([sources[i]], step, [direction[i]], out=[stood])
            yield targets[i] - stood

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
        """Put the weights back to where the last move began, bitwise and in their own storage."""
        if self._moved_on:
            assert self._stand is not None
            vectors.add_scaled(self._sources(), *self._stand, out=self._targets())
            self._moved_on = []
            torch.clear_autocast_cache()
            return
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
        self._true, self._stand = [], None
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
