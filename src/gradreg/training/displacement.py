"""The displacement: weights moved to θ + εd for the second pass, and put back bitwise.

Adding and subtracting is not bitwise neutral, so there is one extra copy of the selected weights; it is kept between
steps, unless they are few and making it anew is the quicker. There are two ways to use it. On the host the copy
receives the displaced weights and each parameter points at it during the second pass: the true weights are never
written. Elsewhere, and where a parameter is a view into a larger storage, others may hold its address (captured graphs,
flat buffers, shards), so the copy receives the true weights and the parameter is displaced in place.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle

from gradreg import _vectors as vectors
from gradreg.training.anatomy import Anatomy
from gradreg.training.shards import reshard

_GUARD, _HOOKS = "gradreg", "_state_dict_pre_hooks"
_SHAPE = attrgetter("shape")
LARGE = 2**18
"""Numbers (1 MB of float32) from which on one parameter of a large model is worth a hook."""


def _may_point_elsewhere(p: Tensor) -> bool:
    plain = type(p.data) is Tensor and p.device.type == "cpu" and p.layout is torch.strided
    return plain and p.untyped_storage().nbytes() == p.numel() * p.element_size()


class _Guard(OrderedDict):
    """The state dict hooks of a module whose weights are displaced: one more, which a copy of the module is without."""

    def __init__(self, displacement: Displacement, own: Mapping[Any, Any]) -> None:
        super().__init__(own)
        self[_GUARD] = displacement.refuse_saving
        self._own = own
        self._displacement = displacement

    def take_registered(self) -> dict[Any, Any]:
        """What was registered meanwhile."""
        return {key: self.pop(key) for key in [*self] if key != _GUARD and key not in self._own}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(OrderedDict(self._own), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._displacement.refuse_saving()
        return OrderedDict(self._own).__reduce_ex__(protocol)


class Displacement:
    """Moves parameters and puts them back; owns the one extra copy.

    Between `open` and `close` every `state_dict()` of the model raises, and so does every step of an optimizer that
    would move what is displaced. Opened once more, it moves on from where the weights stand, in the same memory; the
    next `close` goes back there, by the same sum as before and thus bitwise. `close` may be interrupted and run again.

    Args:
        anatomy: of the model.
        keeps_room: keep the copy from step to step; else it is given back with each parameter that is put back.
    """

    def __init__(self, anatomy: Anatomy, keeps_room: bool = True) -> None:
        self._anatomy = anatomy
        self.keeps_room = keeps_room
        self._parameters: Sequence[nn.Parameter] = ()
        self._addresses: list[int] = []  # of their memory
        self._shapes: list[torch.Size] = []
        self._copies: list[Tensor] = []
        self._keeps_copies = True  # from step to step; few that are pointed at are made anew by one operation
        self._pointing: list[bool] = []
        self._true: list[Tensor] = []
        self._modules: Sequence[nn.Module] = ()
        self._owners: list[dict[str, Any]] = []  # modules that hold parameters
        self._guards: list[_Guard] = []  # of those that have no state dict hooks of their own
        self._hooks: list[Any] = []  # theirs
        self._standing: list[_Guard] = []  # in the places of those, while weights are displaced
        self._is_guarded = False
        self._base: tuple[vectors.Scalar, Sequence[Tensor]] | None = None  # the step and direction that led to a base
        self._moved_on: list[int] = []  # the parameters of a second move

    @property
    def has_base(self) -> bool:
        """Whether the first move led to a point from which others go on."""
        return self._base is not None

    @property
    def memory(self) -> list[Tensor]:
        """The extra copy."""
        return self._copies

    @property
    def displaced(self) -> Sequence[nn.Parameter]:
        """The parameters that do not stand at θ."""
        return self._parameters if self._true else ()

    def open(
        self,
        parameters: Sequence[nn.Parameter],
        step: vectors.Scalar,
        direction: Sequence[Tensor],
        is_base: bool = False,
    ) -> None:
        """θ ← θ + step · direction. Call `close` whatever happens, also if this raises.

        `is_base`: the weights may move on from there, so `direction` is held until they are back.
        """
        reshard(self._anatomy.sharded)
        if self._true:
            self._move_on(parameters, step, direction)
            return
        true = [p.data for p in parameters]
        self._make_room(parameters, true)
        if not all(self._pointing):
            in_place = [i for i, pointing in enumerate(self._pointing) if not pointing]
            vectors.copy_([self._copies[i] for i in in_place], [true[i] for i in in_place])
        self._base = (step, direction) if is_base else None
        if self._modules is not self._anatomy.modules:
            self._modules = self._anatomy.modules
            self._owners = [m.__dict__ for m in self._modules if m._parameters]
            self._hooks = [owner[_HOOKS] for owner in self._owners]
            self._guards = [_Guard(self, {}) for _ in self._owners]
        self._standing = self._guards
        if any(self._hooks):
            self._standing = [_Guard(self, own) if own else guard for own, guard in zip(self._hooks, self._guards)]
        self._is_guarded = True
        self._true = true  # from here on `close` has something to put back
        # Hooks without their handles, which take longer: this runs in every step.
        for owner, guard in zip(self._owners, self._standing):
            owner[_HOOKS] = guard
        _global_optimizer_pre_hooks[self] = self._refuse_step  # type: ignore[index]
        self._displace(step, direction)

    def _displace(self, step: vectors.Scalar, direction: Sequence[Tensor]) -> None:
        """The displaced weights, from the true ones; bitwise the same whenever it is asked."""
        if self._keeps_copies:
            vectors.add_scaled(self._sources(), step, direction, out=self._targets())
        else:
            self._copies = vectors.moved(self._true, step, direction)
        for p, displaced, pointing in zip(self._parameters, self._copies, self._pointing):
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

    def _refuse_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        del args, kwargs
        displaced = set(map(id, self.displaced))
        if any(id(p) in displaced for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called while the weights are displaced, and would be undone: "
                "call it after the perturbed() block (mind the indentation), and not in the loss or closure."
            )

    def _sources(self) -> list[Tensor]:
        """The true weights."""
        return [t if pointing else c for c, t, pointing in zip(self._copies, self._true, self._pointing)]

    def _targets(self) -> list[Tensor]:
        """The displaced weights."""
        return [c if pointing else t for c, t, pointing in zip(self._copies, self._true, self._pointing)]

    def _move_on(self, parameters: Sequence[nn.Parameter], step: vectors.Scalar, direction: Sequence[Tensor]) -> None:
        places = {p: i for i, p in enumerate(self._parameters)}
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
        places = zip(self._parameters, self._sources(), self._targets())
        return any(p.data_ptr() != t.data_ptr() or not (t.is_meta or torch.equal(t, s)) for p, s, t in places)

    def put_back(self, i: int) -> None:
        """Put one parameter back before the others, and give its copy back; only without `keeps_room`."""
        if not self._true:
            return
        p, true = self._parameters[i], self._true[i]
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
                self._displace(*self._base)
                self._moved_on = []
                reshard(self._anatomy.sharded, after_error)
            return
        if self._true:
            if not all(self._pointing):
                kept = zip(self._true, self._copies, self._pointing)
                pairs = [(t, c) for t, c, pointing in kept if not pointing and t is not c]
                vectors.copy_([t for t, _ in pairs], [c for _, c in pairs])
            for p, address, true, pointing in zip(self._parameters, self._addresses, self._true, self._pointing):
                if pointing or p.data_ptr() != address:  # a forward may have given it other memory
                    p.data = true
        if self._is_guarded:
            if sum(map(len, self._standing)) != len(self._standing) + sum(map(len, self._hooks)):
                for hooks, guard in zip(self._hooks, self._standing):
                    hooks.update(guard.take_registered())
            for owner, hooks in zip(self._owners, self._hooks):
                owner[_HOOKS] = hooks
            self._is_guarded = False
        _global_optimizer_pre_hooks.pop(self, None)  # type: ignore[call-overload]
        if self._true:
            reshard(self._anatomy.sharded, after_error)
            torch.clear_autocast_cache()
        self._moved_on, self._base = [], None
        if self._true and not self._keeps_copies:
            self._copies = []
        elif self._true and not self.keeps_room:
            self._parameters, self._copies = (), []
        self._true = []

    def _make_room(self, parameters: Sequence[nn.Parameter], true: Sequence[Tensor]) -> None:
        addresses, shapes = [*map(Tensor.data_ptr, true)], [*map(_SHAPE, true)]
        are_known = parameters is self._parameters or [*map(id, parameters)] == [*map(id, self._parameters)]
        if are_known and addresses == self._addresses and shapes == self._shapes:
            return
        self._parameters, self._copies = (), []  # what was there is given back first
        self._pointing = [_may_point_elsewhere(p) for p in parameters]
        self._keeps_copies = not (all(self._pointing) and vectors.are_together(true))
        if self._keeps_copies:
            self._copies = [torch.empty_like(t) for t in true]  # may fail for want of memory
        self._parameters, self._addresses, self._shapes = parameters, addresses, shapes


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
