"""Checkpoints: a folder of safetensors and JSON that is whole or does not count, and holds no code.

    epoch-000010/model.safetensors   weights and buffers, under the names of the model
                 state.safetensors   all other tensors
                 state.json          the structure around them
                 manifest.json       size and SHA-256 of these three, written last

A checkpoint is made beside its place, synchronized to the disk and renamed, so that a kill at any moment leaves the
earlier ones and at most a hidden partial one. A reader trusts a folder only if every file is as the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gradreg.lab.folder import BadInput

MODEL, TENSORS, STATE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FORMAT = 1

State = dict[str, Any]


class Damaged(BadInput):
    """A checkpoint that is not what was written; the message names the file."""


def name_of(epoch: int, position: int = 0) -> str:
    """The folder's name after so many whole epochs and further steps; names sort by time."""
    return f"epoch-{epoch:06d}" + (f"-step-{position:09d}" if position else "")


def write(place: Path, state: State) -> None:
    """Write a state of nested dicts, lists, tuples, numbers, texts and tensors; `state["model"]` holds the weights.

    Raises:
        OSError: the disk is full, say; nothing of the checkpoint is left, and earlier ones are as they were.
    """
    if place.exists():
        if is_whole(place):
            return  # the same moment of the same run
        shutil.rmtree(place)
    tensors: dict[str, Tensor] = {}
    tree = _to_json({key: value for key, value in state.items() if key != "model"}, tensors, "state")
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        manifest = {
            name: _write_file(partial / name, content())
            for name, content in (
                (MODEL, lambda: save(_separate(state["model"]))),
                (TENSORS, lambda: save(_separate(tensors))),
                (STATE, lambda: _json({"format": FORMAT, "state": tree})),
            )
        }
        _write_file(partial / MANIFEST, _json({"format": FORMAT, "files": manifest}))
        _sync(partial)
        partial.rename(place)
        _sync(place.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(place: Path) -> State:
    """What `write` was given, after every file was found to be what the manifest says.

    Raises:
        Damaged: a file is missing, cut short, altered or not of this format.
    """
    content = _verified(place)
    try:
        tree = json.loads(content[STATE])
        if tree["format"] != FORMAT:
            raise Damaged(f"{_shown(place / STATE)} has format {tree['format']!a}, this version reads {FORMAT}.")
        return {**_from_json(tree["state"], load(content[TENSORS])), "model": load(content[MODEL])}
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise Damaged(f"{_shown(place)} does not hold a state: {error}.") from error


def read_model(place: Path) -> dict[str, Tensor]:
    """The weights and buffers alone."""
    return load(_verified(place)[MODEL])


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the earliest first; whether they are whole is not looked at."""
    return sorted(path for path in folder.glob("epoch-*") if path.is_dir())


def last_good(folder: Path, say: Callable[[str], None]) -> Path:
    """The latest checkpoint that is whole; `say` is told of each later one that is not.

    Raises:
        BadInput: there is none.
    """
    damaged = []
    for place in reversed(all_in(folder)):
        try:
            _verified(place)
        except Damaged as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            say(f"{message} Falling back to {_shown(place)}.")
        return place
    raise BadInput(f"{_shown(folder)} has no checkpoint that can be used. {' '.join(damaged)}".strip())


def rotate(newest: Path, keep: int) -> None:
    """After `newest` was written: remove earlier ones but for the last `keep - 1`, and what was left half-made."""
    folder = newest.parent
    earlier = [place for place in all_in(folder) if place.name < newest.name]
    for place in earlier[: max(0, len(earlier) - (keep - 1))]:
        doomed = place.with_name(f".{place.name}.removed")  # a kill in the midst leaves no half one under its name
        shutil.rmtree(doomed, ignore_errors=True)
        place.rename(doomed)
    for leftover in [*folder.glob(".epoch-*.partial"), *folder.glob(".epoch-*.removed")]:
        shutil.rmtree(leftover, ignore_errors=True)


def is_whole(place: Path) -> bool:
    """Whether every file is what the manifest says."""
    try:
        _verified(place)
    except Damaged:
        return False
    return True


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """In words: parameters and buffers that one of two models lacks, or that have another shape or type."""
    lines = [f"{name} is missing" for name in expected if name not in found]
    lines += [f"{name} is not in the model" for name in found if name not in expected]
    for name, tensor in expected.items():
        other = found.get(name)
        if other is not None and (other.shape != tensor.shape or other.dtype != tensor.dtype):
            lines.append(f"{name} is {_kind(other)} instead of {_kind(tensor)}")
    return lines


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _verified(place: Path) -> dict[str, bytes]:
    """The content of each file, read once: what was verified is what is used."""
    try:
        files = json.loads((place / MANIFEST).read_bytes())["files"]
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in (MODEL, TENSORS, STATE)}
    except OSError as error:
        raise Damaged(f"{_shown(place / MANIFEST)} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{_shown(place / MANIFEST)} is not the manifest of a checkpoint.") from error
    content = {}
    for name, (size, digest) in expected.items():
        try:
            content[name] = (place / name).read_bytes()
        except OSError as error:
            raise Damaged(f"{_shown(place / name)} cannot be read: {error.strerror}.") from error
        if len(content[name]) != size:
            raise Damaged(f"{_shown(place / name)} is damaged: {len(content[name])} bytes instead of {size}.")
        if hashlib.sha256(content[name]).hexdigest() != digest:
            raise Damaged(f"{_shown(place / name)} is damaged: its SHA-256 is not that of the manifest.")
    return content


def _write_file(path: Path, content: bytes) -> dict[str, Any]:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _shown(path: Path) -> str:
    return ascii(str(path))


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, contiguous, and no two in one storage (tied weights), as the format wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        host = tensor.detach().cpu().contiguous()
        address = host.untyped_storage().data_ptr()
        result[name] = host.clone() if address in seen else host
        seen.add(address)
    return result


def _to_json(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Tensors go to `tensors` under their place in the tree; JSON has no tuples, keys that are numbers, or NaN."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"$tensor": where}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _to_json(item, tensors, f"{where}.{key}") for key, item in value.items()}
        return {"$items": [[key, _to_json(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_to_json(item, tensors, f"{where}.{k}") for k, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float):
        return value if abs(value) < float("inf") else {"$float": str(value)}
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} ({where}).")


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$items" in value:
        return {key: _from_json(item, tensors) for key, item in value["$items"]}
    if "$tuple" in value:
        return tuple(_from_json(item, tensors) for item in value["$tuple"])
    if "$float" in value:
        return float(value["$float"])
    return {key: _from_json(item, tensors) for key, item in value.items()}
