"""The displacement: weights moved to θ + εd for the second pass, and put back bitwise.

Adding and subtracting is not bitwise neutral, so one extra copy of the selected weights is kept between steps.
There are two ways to use it. On the host the copy receives the displaced weights and each parameter points at it
during the second pass: the true weights are never written. Elsewhere, and where a parameter is a view into a
larger storage, others may hold its address (captured graphs, flat buffers, shards), so the copy receives the true
weights and the parameter is displaced in place.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradreg import _vectors as vectors
from gradreg.training.shards import reshard

_GUARD = "gradreg"
LARGE = 2**18
"""Numbers (1 MB of float32) from which on one parameter of a large model is worth a hook."""


def _may_point_elsewhere(p: Tensor) -> bool:
    plain = type(p.data) is Tensor and p.device.type == "cpu" and p.layout is torch.strided
    return plain and p.untyped_storage().nbytes() == p.numel() * p.element_size()


class _Guarded(OrderedDict):
    """The state dict hooks of a module whose weights are displaced: one more, which a copy of the module is without."""

    def __init__(self, hooks: dict[Any, Any], displacement: Displacement) -> None:
        super().__init__(hooks)
        self[_GUARD] = displacement.refuse_saving
        self._hooks = hooks
        self._displacement = displacement

    def without(self) -> dict[Any, Any]:
        """The module's own, and what was registered meanwhile."""
        if len(self) != len(self._hooks) + 1:
            self._hooks.update((key, hook) for key, hook in self.items() if key != _GUARD)
        return self._hooks

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._hooks, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._displacement.refuse_saving()
        return self._hooks.__reduce_ex__(protocol)


class Displacement:
    """Moves parameters and puts them back; owns the one extra copy.

    Between `open` and `close` every `state_dict()` of the model raises. Opened once more, it moves on from where the
    weights stand, in the same memory; the next `close` goes back there, by the same sum as before and thus bitwise.
    `close` may be interrupted and called again.

    Args:
        keeps_room: keep the copy from step to step; else it is given back with each parameter that is put back.
    """

    def __init__(self, keeps_room: bool = True) -> None:
        self._keeps_room = keeps_room
        self._places: list[tuple[nn.Parameter, int, torch.Size]] = []
        self._copies: list[Tensor] = []
        self._pointing: list[bool] = []
        self._true: list[Tensor] = []
        self._guarded: list[nn.Module] = []
        self._modules: Sequence[nn.Module] = ()
        self._base: tuple[vectors.Scalar, Sequence[Tensor]] | None = None  # the step and direction that led to a base
        self._moved_on: list[int] = []  # the parameters of a second move

    @property
    def has_base(self) -> bool:
        """Whether the first move led to a point from which others go on."""
        return self._base is not None

    @property
    def displaced(self) -> Sequence[nn.Parameter]:
        """The parameters that do not stand at θ."""
        return [p for p, _, _ in self._places] if self._true else []

    def open(
        self,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        step: vectors.Scalar,
        direction: Sequence[Tensor],
        is_base: bool = False,
    ) -> None:
        """θ ← θ + step · direction. Call `close` whatever happens, also if this raises.

        `is_base`: the weights may move on from there, so `direction` is held until they are back.
        """
        reshard(modules)
        if self._true:
            self._move_on(parameters, step, direction)
            return
        true = [p.data for p in parameters]
        self._make_room(parameters, true)
        if not all(self._pointing):
            in_place = [i for i, pointing in enumerate(self._pointing) if not pointing]
            vectors.copy_([self._copies[i] for i in in_place], [true[i] for i in in_place])
        self._base = (step, direction) if is_base else None
        self._modules = modules
        self._true = true  # from here on `close` has something to put back
        # register_state_dict_pre_hook, without a handle for each module: this runs in every step.
        self._guarded = [m for m in modules if m._parameters]
        for module in self._guarded:
            if type(module._state_dict_pre_hooks) is not _Guarded:
                module._state_dict_pre_hooks = _Guarded(module._state_dict_pre_hooks, self)
        vectors.add_scaled(self._sources(), step, direction, out=self._targets())
        for p, displaced, pointing in zip(parameters, self._copies, self._pointing):
            if pointing:
                p.data = displaced
        torch.clear_autocast_cache()  # or autocast would serve low-precision copies of the weights of pass 1

    def refuse_saving(self, *module: Any) -> None:
        if self._true:
            what = f"state_dict() of {type(module[0]).__name__}" if module else "pickling a module"
            raise RuntimeError(
                f"{what} while its weights are displaced for the second pass would save θ + εd instead of θ. Save "
                "after backward(), step() or the perturbed() block has ended."
            )

    def _sources(self) -> list[Tensor]:
        """The true weights."""
        return [t if pointing else c for c, t, pointing in zip(self._copies, self._true, self._pointing)]

    def _targets(self) -> list[Tensor]:
        """The displaced weights."""
        return [c if pointing else t for c, t, pointing in zip(self._copies, self._true, self._pointing)]

    def _move_on(self, parameters: Sequence[nn.Parameter], step: vectors.Scalar, direction: Sequence[Tensor]) -> None:
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
        assert self._base is not None
        step, direction = self._base
        for i in self._moved_on:
            stood = torch.empty_like(targets[i])
            vectors.add_scaled([sources[i]], step, [direction[i]], out=[stood])
            yield targets[i] - stood

    def was_written(self) -> bool:
        """Whether somebody else has written to the weights since they were displaced by 0. Reads them."""
        places = zip(self._places, self._sources(), self._targets())
        return any(p.data_ptr() != t.data_ptr() or not (t.is_meta or torch.equal(t, s)) for (p, _, _), s, t in places)

    def put_back(self, i: int) -> None:
        """Put one parameter back before the others, and give its copy back; only without `keeps_room`."""
        if not self._true:
            return
        p, true = self._places[i][0], self._true[i]
        if self._pointing[i]:
            p.data = true
        else:
            vectors.copy_([true], [self._copies[i]])
        self._copies[i] = true

    def close(self, to_base: bool = False, after_error: bool = False) -> None:
        """Put the weights back to θ, or to where the first move led, bitwise and in their own storage."""
        if to_base:
            if self._moved_on:
                assert self._base is not None
                vectors.add_scaled(self._sources(), *self._base, out=self._targets())
                self._moved_on = []
                reshard(self._modules, after_error)
                torch.clear_autocast_cache()
            return
        if self._true:
            if not all(self._pointing):
                kept = zip(self._true, self._copies, self._pointing)
                pairs = [(t, c) for t, c, pointing in kept if not pointing and t is not c]
                vectors.copy_([t for t, _ in pairs], [c for _, c in pairs])
            for (p, address, _), true, pointing in zip(self._places, self._true, self._pointing):
                if pointing or p.data_ptr() != address:  # a forward may have given it other memory
                    p.data = true
        for module in self._guarded:
            hooks = module._state_dict_pre_hooks
            if type(hooks) is _Guarded:
                module._state_dict_pre_hooks = hooks.without()
        if self._true:
            reshard(self._modules, after_error)
        self._moved_on, self._base, self._guarded = [], None, []
        if self._true and not self._keeps_room:
            self._places, self._copies = [], []
        self._true = []
        torch.clear_autocast_cache()

    def _make_room(self, parameters: Sequence[nn.Parameter], true: Sequence[Tensor]) -> None:
        places = [(p, t.data_ptr(), t.shape) for p, t in zip(parameters, true)]
        known = self._places
        if len(places) == len(known) and all(
            a[0] is b[0] and a[1] == b[1] and a[2] == b[2] for a, b in zip(places, known)
        ):
            return
        self._places, self._copies = [], []  # what was there is given back first
        self._copies = [torch.empty_like(t) for t in true]  # may fail for want of memory
        self._pointing = [_may_point_elsewhere(p) for p in parameters]
        self._places = places


class EarlyReturn:
    """Puts each large parameter back once its gradient is complete: displaced weights make room for gradients.

    By then every operation that read the parameter has run backward. Where a gradient arrives in a backward pass
    within the backward pass (reentrant activation checkpoints), more of it may come, and the parameter stays.

    Args:
        displacement: open, and without `keeps_room`.
    """

    def __init__(self, displacement: Displacement) -> None:
        self._displacement = displacement
        self._pass: int | None = None
        self._hooks: list[RemovableHandle] = []

    def watch(self, loss: Tensor) -> None:
        """The loss whose one backward pass completes all gradients."""
        self._hooks.append(loss.register_hook(self._begin))
        for i, p in enumerate(self._displacement.displaced):
            if p.numel() >= LARGE:
                self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._arrive, i)))

    def _begin(self, gradient: Tensor) -> None:
        del gradient
        self._pass = torch._C._current_graph_task_id()

    def _arrive(self, i: int, p: Tensor) -> None:
        del p
        if self._pass == torch._C._current_graph_task_id():
            self._displacement.put_back(i)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
