"""The watch: sees each call of the model, for the second door, whose first pass is over before we are asked.

The second pass must start each forward from the random state and the buffers that its counterpart started from; they
can only be known by noting them at each call. A note is a few kilobytes; it holds no input, no output and no graph.

Calls are seen in the place where torch puts a module's compiled call: it belongs to the instance, and torch leaves it
out of pickles and copies. Tracing (compile, export, script) goes past it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gradreg._vectors import is_traced
from gradreg.training import pipeline
from gradreg.training.anatomy import Anatomy
from gradreg.training.check import is_same
from gradreg.training.notices import warn
from gradreg.training.replay import Moment, Rewind

_ANOTHER_BATCH = (
    "the displaced pass gave the model another batch than the first pass: both must see the same data, or the penalty "
    "is that of no loss. Draw the batch once, outside the closure, the loss function or the perturbed() block."
)


class Note:
    """One call of the model in the first pass."""

    def __init__(self, number: int, moment: Moment, tensors: list[Tensor], shapes: list[Any], is_own: bool) -> None:
        self.number = number
        self.shapes = shapes
        self.moment = moment
        # By reference: an address that a tensor had may be that of the next one.
        self._tensors = [(weakref.ref(x), _version(x)) for x in tensors]
        self.is_own = is_own  # at the model's own weights, and not at others that torch.func has put in their place
        self.call: tuple[Any, Any, Any] | None = None  # arguments and outputs, until the replay was checked

    def was_given(self, tensors: list[Tensor]) -> bool:
        """Whether the call had these very tensors, unchanged since."""
        if len(self._tensors) != len(tensors):
            return False
        return all(ref() is x and version == _version(x) for (ref, version), x in zip(self._tensors, tensors))


class Watch:
    """The calls of a model since weights last moved or a door was last closed, of those that had a backward pass.

    Evaluation under `no_grad` and the recomputing of activation checkpoints are not noted. The note of a call lives
    with its graph until the backward pass comes. In a displaced pass each call starts from the moment of its
    counterpart: the next note of the same tensors, else the next one.
    """

    def __init__(self, anatomy: Anatomy, rewind: Rewind) -> None:
        self._anatomy = anatomy
        self._rewind = rewind
        self.is_paused = False
        self.is_in_pipeline = False  # a stage of a pipeline has called the model
        self.keeps_calls = True  # until the replay was checked
        self.notes: list[Note] = []
        self._last: Note | None = None  # of a call that had no backward pass yet
        self._count = 0
        self._versions: list[int] = []  # of the parameters, at the last call
        self._has_gradient = False
        self._cleared = 0  # calls there were when gradients were last cleared; an attack in the loss clears them too
        self._position: int | None = None  # of the next call, in a displaced pass
        self._num_replayed = 0
        self._shapes: list[list[Any]] = []  # of what the model was called with, in a first pass of our own
        self._call_in_pass: int | None = None  # the number of the next call in a displaced pass of our own
        self._start: Moment | None = None  # of the displaced pass, if its random numbers are to be compared
        self._call: Any = None
        self.attach()

    def attach(self) -> bool:
        """See the calls of the model; whether it was so already."""
        model = self._anatomy.model
        call: Any = model._compiled_call_impl
        while call is not None:
            if call is self._call:
                return True
            call = getattr(call, "beneath", None)
        self._call = _seeing(model, self)
        object.__setattr__(model, "_compiled_call_impl", self._call)  # Fabric's wrapper sets it on the model within too
        return False

    # In the first pass.

    def begins(self, args: Any, kwargs: Any) -> Note | None:
        stage = pipeline.caller()
        self.is_in_pipeline |= stage is not None
        if stage is not None and not stage.startswith("forward_"):
            return None  # it infers shapes
        recomputed = torch._C._current_graph_task_id() != -1  # by activation checkpointing, inside a backward pass
        if recomputed or not torch.is_grad_enabled():
            return None
        if self.is_paused:
            self._compare_shapes(args, kwargs)
            return None
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.requires_grad]
        if any(map(is_traced, tensors)):
            return None
        if self._position is not None:
            self._replay(self._position, tensors, args, kwargs)
            return None
        self._notice_step()
        self._count += 1
        is_own = self.keeps_calls and self._anatomy.is_whole()
        self._last = Note(self._count, Moment(self._anatomy), tensors, _shapes((args, kwargs)), is_own)
        return self._last

    def _notice_step(self) -> None:
        """Weights that changed since the last call begin a new window."""
        versions = [p._version for p in self._anatomy.parameters]
        has_gradient = any(p.grad is not None for p in self._anatomy.parameters)
        if versions != self._versions:
            self.notes.clear()
        if self._has_gradient and not has_gradient:
            self._cleared = self._count
        self._versions, self._has_gradient = versions, has_gradient

    def ends(self, note: Note, args: Any, kwargs: Any, output: Any) -> None:
        """Wait for the backward pass of what a call returned; what it needs lives as long as the graph, not longer."""
        # Copies without a graph: an output that hung on its own graph would never be freed.
        call = (args, kwargs, tree_map(_copy, output)) if self.keeps_calls and note.is_own else None
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.grad_fn is not None]
        me = weakref.ref(self)

        def ran(gradient: Tensor) -> None:
            del gradient
            watch = me()
            if watch is not None and note not in watch.notes:
                note.call = call if watch.keeps_calls else None
                watch.keep(note)
                # When this backward pass is over: one by torch.autograd.grad leaves no gradient to be cleared.
                torch.autograd.Variable._execution_engine.queue_callback(watch._notice_gradient)

        for x in outputs:
            x.register_hook(ran)
        if not outputs:  # it tells nothing; hosts announce a step by such a call
            note.call = (tree_map(_copy, args), tree_map(_copy, kwargs), None) if self.keeps_calls else None
            self.keep(note)

    def keep(self, note: Note) -> None:
        if self._last is note:
            self._last = None
        self.notes.append(note)
        self.notes.sort(key=lambda n: n.number)

    def begin_with_last(self) -> None:
        """A host has cleared gradients between a call and its backward pass: that call is the first of a window."""
        self.notes[:] = self.notes[-1:] if self._last is None else []
        self._cleared = self._count - 1

    def _notice_gradient(self) -> None:
        self._has_gradient = any(p.grad is not None for p in self._anatomy.parameters)

    # In passes of our own.

    def starts_again(self) -> None:
        """A displaced pass of our own begins; its calls are held against those of the first."""
        self._call_in_pass = 0

    def stops_again(self) -> None:
        self._call_in_pass = None

    def _compare_shapes(self, args: Any, kwargs: Any) -> None:
        shapes = _shapes((args, kwargs))
        if self._call_in_pass is None:
            self._shapes.append(shapes)
        elif self._call_in_pass < len(self._shapes) and shapes != self._shapes[self._call_in_pass]:
            raise ValueError(_ANOTHER_BATCH)
        if self._call_in_pass is not None:
            self._call_in_pass += 1

    @property
    def has_seen(self) -> bool:
        """Whether there was a call since the last step."""
        return bool(self.notes) or self._last is not None

    def forget(self) -> None:
        self.notes.clear()
        self._shapes.clear()
        self._last = self._position = self._start = self._call_in_pass = None
        self._cleared = self._count
        self.is_paused = False

    # In the displaced pass.

    def start_replay(self, compares_random_numbers: bool) -> None:
        self._position, self._num_replayed = 0, 0
        if not self.notes and self._last is not None:
            self.keep(self._last)  # gradients were made without a backward pass (torch.func)
        first = next((n for n in self.notes if n.number > self._cleared), None)
        if first is not None:  # already here: an activation checkpoint around the model looks before we do
            self._rewind.to(first.moment)
            self._start = first.moment if compares_random_numbers else None

    def _replay(self, position: int, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        if self._start is not None:
            if not Moment(self._anatomy).random.is_same(self._start.random):
                raise ValueError(
                    "the block drew random numbers before it called the model, and perturbed() cannot know those of "
                    "the first pass, which was over when it opened: draw them once, before the first pass, or use "
                    "backward(loss_fn), which replays them."
                )
            self._start = None
        rest = self.notes[position:]
        alike = [n for n in rest if n.was_given(tensors)]
        following = [n for n in rest if position or n.number > self._cleared]
        found = next(iter(alike or following), None)
        if found is not None:
            # Later inputs may come out of the weights, as those of an attack do; they are compared in shape.
            is_other = position == 0 and not _are_values(found.call, args, kwargs)
            if is_other or found.shapes != _shapes((args, kwargs)):
                raise ValueError(_ANOTHER_BATCH)
            if position == 0:
                self._rewind.to(found.moment)
            else:  # buffers go on from where this pass has brought them, as in one that is replayed whole
                found.moment.random.restore()
            self._position = self.notes.index(found) + 1
        self._num_replayed += 1

    def finish_replay(self) -> None:
        expected = sum(n.number > self._cleared for n in self.notes)
        if expected != self._num_replayed != len(self.notes):
            warn(
                f"perturbed(): the first pass called the model {expected} times and the block {self._num_replayed} "
                "times. Both passes must see the same batches, in the same order; otherwise the penalty is that of "
                "another loss."
            )


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _shapes(inputs: tuple[Any, Any]) -> list[Any]:
    args, kwargs = inputs
    if len(args) == 1 and not kwargs and type(args[0]) is Tensor:
        return [] if args[0].is_nested else [(tuple(args[0].shape), args[0].dtype)]
    return [(tuple(x.shape), x.dtype) for x in tree_leaves(inputs) if isinstance(x, Tensor) and not x.is_nested]


def _are_values(call: tuple[Any, Any, Any] | None, args: Any, kwargs: Any) -> bool:
    """Whether inputs hold what those of a first pass held, where that is known; of inputs that are data."""
    if call is None:
        return True
    pairs = zip(tree_leaves(call[:2]), tree_leaves((args, kwargs)))
    data = [(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor) and not x.requires_grad]
    return is_same([x for x, _ in data], [y for _, y in data])


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _seeing(model: nn.Module, watch: Watch) -> Callable[..., Any]:
    """What stands in the place of the model's compiled call."""
    compiled: Any = model._compiled_call_impl
    this, watching = weakref.ref(model), weakref.ref(watch)

    def call(*args: Any, **kwargs: Any) -> Any:
        module: Any = this()
        run = module._call_impl if compiled is None else compiled
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return run(*args, **kwargs)
        watch = watching()
        note = None if watch is None else watch.begins(args, kwargs)
        output = run(*args, **kwargs)
        if watch is not None and note is not None:
            watch.ends(note, args, kwargs, output)
        return output

    def leave(_: Any) -> None:
        module: Any = this()
        if module is not None and module._compiled_call_impl is call:
            if compiled is None:
                object.__delattr__(module, "_compiled_call_impl")
            else:
                object.__setattr__(module, "_compiled_call_impl", compiled)

    call.beneath = compiled  # type: ignore[attr-defined]
    weakref.finalize(watch, leave, None).atexit = False
    return call


def compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` left, without what stands before it here."""
    call: Any = module._compiled_call_impl
    while hasattr(call, "beneath"):
        call = call.beneath
    return call
