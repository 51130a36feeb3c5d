"""The displacement: weights moved to θ + εd for the second pass, and put back bitwise.

Adding and subtracting is not bitwise neutral, so one extra copy of the selected weights is kept between steps.
There are two ways to use it. On the host the copy receives the displaced weights and each parameter points at it
during the second pass: the true weights are never written. Elsewhere, and where a parameter is a view into a
larger storage, others may hold its address (captured graphs, flat buffers, shards), so the copy receives the true
weights and the parameter is displaced in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

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
    """

    def __init__(self) -> None:
        self._places: list[tuple[nn.Parameter, int, torch.Size]] = []
        self._copies: list[Tensor] = []
        self._pointing: list[bool] = []
        self._true: list[Tensor] = []
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
        self._true = true
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

    def close(self) -> None:
        """Put the weights back, bitwise and in their own storage."""
        for module in self._guarded:
            module._state_dict_pre_hooks.pop(_GUARD, None)  # type: ignore[arg-type]
        self._guarded = []
        if not self._true:
            return
        kept = []
        for (p, _, _), copy, true, pointing in zip(self._places, self._copies, self._true, self._pointing):
            if pointing:
                p.data = true
            else:
                kept.append((true, copy))
        if kept:
            vectors.copy_([true for true, _ in kept], [copy for _, copy in kept])
        self._true = []
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
