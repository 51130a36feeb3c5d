"""The recorder: a forward pre-hook that sees every call of the model.

It serves two ends. The caller of `perturbed()` runs the first pass before we are asked, so the moments (random state
and buffers) that the second pass must start from can only be known by recording each forward. And both passes must
see the same batch: a closure that draws the next one is silently wrong, so the inputs of the two passes are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradreg._vectors import is_traced
from gradreg.training.anatomy import Anatomy
from gradreg.training.replay import Moment


class Inputs:
    """The tensors that one forward was given, but for those computed by the model; when asked, their values too."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], with_values: bool) -> None:
        leaves = tree_leaves((args, kwargs)) if kwargs or len(args) != 1 else tree_leaves(args[0])
        tensors = [x for x in leaves if isinstance(x, Tensor) and not x.requires_grad]
        self._shapes = [(tuple(x.shape), x.dtype) for x in tensors]
        plain = [x for x in tensors if x.is_cpu and x.layout is torch.strided and not is_traced(x)]
        self._values = [x.clone() for x in plain] if with_values else []
        self.identity = [id(x) for x in tensors]

    def check_same(self, other: Inputs) -> None:
        same = self._shapes == other._shapes and all(
            torch.equal(x, y) or bool(((x == y) | (x.isnan() & y.isnan())).all())
            for x, y in zip(self._values, other._values)
        )
        if not same:
            raise ValueError(
                "the displaced pass gave the model another batch than the first pass: both must see the same data, or "
                "the penalty is that of no loss. Draw the batch once, outside the closure, the loss function or the "
                "perturbed() block."
            )


class Recorder:
    """Remembers the forwards of a first pass, and holds those of a displaced pass against them.

    For `perturbed()`, a window begins with the first forward after gradients were cleared or weights changed, and ends
    when a door closes. Evaluation under `no_grad` and the recomputing of activation checkpoints are not recorded. The
    inputs of a pass's first forward are compared, their values in the first step only.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        model = anatomy.model
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, Recorder) and hook.is_blank:  # came with a copy of another model
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
        self._anatomy: Anatomy | None = anatomy
        self._is_paused = False
        self._is_ours = False  # the first pass is run by the engine, which knows the moment it starts from
        self._moments: list[Moment | None] = []
        self._inputs: list[Inputs] = []
        self._versions: list[int] = []  # of the parameters, at the last forward
        self._had_gradient = False  # likewise
        self._position: int | None = None  # of the next forward, in a displaced pass
        self._compares_values = True
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    # A copied or unpickled model takes no recorder along: the copy belongs to no regularizer.
    def __reduce__(self) -> tuple[Any, ...]:
        return (_blank_recorder, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        del memo
        return _blank_recorder()

    def __copy__(self) -> Recorder:
        return _blank_recorder()

    @property
    def is_blank(self) -> bool:
        return self._anatomy is None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        # A compiled model leaves its graph here. As a decorator, `disable` would slow every call and load Dynamo.
        if torch.compiler.is_compiling():
            torch.compiler.disable(self._observe)(args, kwargs)  # pyright: ignore[reportCallIssue]
        else:
            self._observe(args, kwargs)

    def _observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recomputed = torch._C._current_graph_task_id() != -1  # by activation checkpointing, inside a backward pass
        if self._anatomy is None or self._is_paused or recomputed or not torch.is_grad_enabled():
            return
        if self._position is not None:
            self._replay(self._position, Inputs(args, kwargs, self._compares_values))
            return
        if not self._is_ours:
            self._notice_step(self._anatomy.parameters)
        self._moments.append(None if self._is_ours and not self._moments else Moment(self._anatomy))
        self._inputs.append(Inputs(args, kwargs, self._compares_values))

    def _notice_step(self, parameters: Sequence[Tensor]) -> None:
        """Weights that changed or gradients that went since the last forward begin a new window."""
        versions = [p._version for p in parameters]
        has_gradient = any(p.grad is not None for p in parameters)
        if versions != self._versions or (self._had_gradient and not has_gradient):
            self.forget()
        self._versions, self._had_gradient = versions, has_gradient

    def _replay(self, position: int, inputs: Inputs) -> None:
        if position == 0:
            # A forward that no backward followed may stand before the first of the window: begin with the same tensors.
            alike = (k for k, recorded in enumerate(self._inputs) if recorded.identity == inputs.identity)
            position = next(alike, 0)
            if self._inputs:
                self._inputs[position].check_same(inputs)
        moment = self._moments[position] if position < len(self._moments) else None
        if moment is not None:
            moment.restore()
        self._position = position + 1

    @property
    def num_forwards(self) -> int:
        """Calls of the model in the first pass."""
        return len(self._inputs)

    def forget(self) -> None:
        self._moments.clear()
        self._inputs.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards that no displaced pass follows."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @contextmanager
    def first_pass(self) -> Iterator[None]:
        """The engine runs the first pass itself: the window begins here."""
        self.forget()
        self._is_ours = True
        try:
            yield
        finally:
            self._is_ours = False

    @contextmanager
    def displaced_pass(self) -> Iterator[None]:
        """Compare the inputs, and start each forward from its recorded moment, if any was kept."""
        self._position = 0
        if self._moments and self._moments[0] is not None:
            self._moments[0].restore()  # already here: an activation checkpoint around the model looks before we do
        try:
            yield
            if self._moments and self._moments[0] is not None and self._position != len(self._moments):
                warnings.warn(
                    f"perturbed(): the first pass called the model {len(self._moments)} times and the block "
                    f"{self._position} times. Both passes must see the same batches, in the same order; otherwise "
                    "the penalty is that of another loss.",
                    UserWarning,
                    stacklevel=5,
                )
            self._compares_values = False
        finally:
            self._position = None


def _blank_recorder() -> Recorder:
    recorder = object.__new__(Recorder)
    recorder._anatomy = None
    return recorder
