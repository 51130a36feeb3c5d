"""The replay check: both passes must see one loss, so in the first step it is asked twice at θ.

What the engine replays itself (random state, registered buffers) is the same both times. What else a loss depends on
and changes, such as a key encoder, a queue, a generator of its own or the next batch, makes the second answer another,
and g2 − g1 would be that of no loss.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradreg.training.anatomy import Anatomy

_TOLERANCE = 1e-3  # relative, on accelerators, whose sums may come in another order
_DEPTH = 4  # a closure that calls a loss function that calls a method of an object with tensors


def is_same(one: Any, other: Any, is_bitwise: bool = True) -> bool:
    """Whether two answers agree: bitwise on the host, to rounding on an accelerator."""
    return all(_agree(x, y, is_bitwise) for x, y in zip(tree_leaves(one), tree_leaves(other)))


def _agree(x: Any, y: Any, is_bitwise: bool) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.is_meta or x.layout is not torch.strided:
        return True
    if x.is_nested or y.is_nested:
        return True
    if x.shape != y.shape:
        return False
    x, y = x.detach(), y.detach()
    if x.is_cpu and not is_bitwise and x.is_floating_point():
        rounding = 100 * torch.finfo(x.dtype).eps
        return torch.allclose(x, y, rtol=rounding, atol=rounding, equal_nan=True)
    if x.is_cpu:
        return torch.equal(x, y) or bool(((x == y) | ((x != x) & (y != y))).all())
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    return torch.allclose(x.double(), y.double(), rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)


class State:
    """What a loss can reach besides what is replayed: versions of tensors, generators and numbers, by name.

    Args:
        roots: the loss function or closure, and the batches.
        anatomy: of the model.
    """

    def __init__(self, roots: Sequence[Any], anatomy: Anatomy) -> None:
        self._roots, self._anatomy = roots, anatomy
        trained = {id(p) for p in anatomy.parameters if p.requires_grad}
        replayed = {id(b) for _, _, b in anatomy.buffers()[0]} | trained
        self._found: dict[str, Any] = {}
        self._kept: list[Any] = []  # an address that is given back may be used again
        seen: set[int] = set()
        with contextlib.suppress(Exception):  # objects of the user's may do anything; this only helps to name a cause
            for root in roots:
                for name, value in _reached(root, "", seen, _DEPTH + 1):
                    if id(value) not in replayed:
                        self._found.setdefault(name, _fingerprint(value))
                        self._kept.append(value)

    def changed(self) -> list[str]:
        """The names of what has changed since."""
        now = State(self._roots, self._anatomy)._found
        return [name for name, value in self._found.items() if name in now and now[name] != value]


def _fingerprint(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist()) if value.device.type == "cpu" else None
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    return value


def _reached(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """Tensors, generators and numbers within reach of a value, with names a reader of the code knows."""
    if isinstance(value, (bool, int, float)):
        yield name, value
        return
    if value is None or id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, torch.Generator)):
        yield name, value
    elif isinstance(value, nn.Module):
        for path, module in value.named_modules():
            inner = ".".join(part for part in (name, path) if part)
            own = {**module._parameters, **module._buffers}
            own |= {k: v for k, v in vars(module).items() if not k.startswith("_") and not isinstance(v, nn.Module)}
            for key, x in own.items():
                yield from _reached(x, f"{inner}.{key}" if inner else key, seen, min(depth - 1, 1))
    else:
        for key, x in _parts(value):
            yield from _reached(x, f"{name}.{key}" if name and not key.startswith("[") else name + key, seen, depth - 1)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, functools.partial):
        return [("", value.func), *((f"[{i}]", x) for i, x in enumerate(value.args)), *value.keywords.items()]
    if isinstance(value, types.FunctionType):
        code = value.__code__
        cells = zip(code.co_freevars, value.__closure__ or ())
        enclosed = [(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
        used = [(name, value.__globals__[name]) for name in code.co_names if name in value.__globals__]
        kinds = (Tensor, torch.Generator, nn.Module, Mapping, list, tuple)
        return [*enclosed, *((name, x) for name, x in used if isinstance(x, kinds) or callable(x))]
    if isinstance(value, types.MethodType):
        return [("", value.__self__), ("", value.__func__)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", x) for key, x in list(value.items())[:100]]
    if isinstance(value, (list, tuple)):
        return [(f"[{i}]", x) for i, x in enumerate(value[:100])]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return []
    is_ours = type(value).__module__.startswith("gradreg.")  # what we count and keep says nothing to the user
    return [(key, x) for key, x in vars(value).items() if not (is_ours and key.startswith("_"))]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def check_same(first: Any, again: Any, before: State, what: str, is_bitwise: bool = True) -> None:
    """Refuse a loss that is another when it is asked again.

    Args:
        first: the answers of the first pass.
        again: those of the second call at the same weights.
        before: what the loss could reach before the first pass.
        what: was compared.
        is_bitwise: False where the pass itself has moved the weights, so that rounding may differ.

    Raises:
        ValueError: naming what changed, where it can be told.
    """
    if is_same(first, again, is_bitwise):
        return
    changed = before.changed()
    numbers = [x for x in tree_leaves((first, again)) if isinstance(x, Tensor) and x.numel() == 1]
    values = f"{numbers[0].item():.9g}, then {numbers[-1].item():.9g}" if numbers else "other values"
    told = " It may have drawn another batch."
    if changed:
        told = f" Changed in place or replaced in between: {', '.join(changed[:5])}."
    raise ValueError(
        f"{what} was asked for twice at the same weights, random state and buffers, and was {values}: both passes must "
        f"see the same loss, or the penalty is that of no loss.{told} Draw the batch once, outside; do not change "
        "inputs in place; keep what the forward changes in registered buffers of the model, which are replayed, or "
        "change it after the step. If the difference is meant, pass replay_check=False."
    )
