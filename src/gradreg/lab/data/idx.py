"""MNIST and its kin (Fashion-MNIST, KMNIST, EMNIST) from their IDX files, gzipped or not.

A file is a magic number (two zeros, the type of a number, how many dimensions), the sizes, then the numbers. Four
files make a data set: images and labels to train on, images and labels to test. Nothing is written to disk, and a file
is used only if it is as long as its sizes say.

A twelfth of the training rows, the last of a fixed shuffled order, are validation rows (5,000 of 60,000). Pixels are
standardized by mean and deviation over the training rows. Labels are counted from 0 in their order: those of EMNIST's
letters begin at 1.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from gradreg.lab.data.parts import Part, Split, from_bytes, moments, shuffled
from gradreg.lab.folder import BadInput, shown

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the four files."""
FASHION_MNIST = {
    "train images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "test images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "test labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of what the files hold when they are not compressed, since those who hand them on compress them anew."""

_HOW_TO_GET = (
    "on Debian and Ubuntu: apt install dataset-fashion-mnist (30 MB); anywhere: put the four files of "
    "https://github.com/zalandoresearch/fashion-mnist into a folder and name it by --path"
)
_NAME = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
_UNSIGNED_BYTE = 8
_LARGEST = 2**32  # bytes of a file


def fashion_mnist(path: str | None) -> Split:
    """Fashion-MNIST (Xiao et al., 2017), from a folder or from Debian's package.

    Raises:
        BadInput: it is not there, or is another data set.
    """
    if path is None and not DEBIAN.is_dir():
        raise BadInput(f"data fashion-mnist was not found. Two ways to get it: {_HOW_TO_GET}.")
    try:
        files = _files(DEBIAN if path is None else Path(path))
    except BadInput as error:
        raise BadInput(f"{str(error).rstrip('.')}. Two ways to get Fashion-MNIST: {_HOW_TO_GET}.") from None
    return _read(*files, is_fashion=True)


def from_folder(path: str) -> Split:
    """The data set of the four IDX files in a folder.

    Raises:
        BadInput: a file that is missing, or not what its name says.
    """
    return _read(*_files(Path(path)), is_fashion=False)


def _files(folder: Path) -> tuple[tuple[str, Path, int], ...]:
    """Which file is what, with the time of its last change."""
    try:
        places = sorted(folder.iterdir())
    except OSError as error:
        raise BadInput(f"path must be a folder with IDX files, got {shown(folder)}: {error.strerror}.") from error
    found: dict[str, Path] = {}
    sets: set[str] = set()
    for place in places:
        match = _NAME.fullmatch(place.name)
        if match is None or not place.is_file():
            continue
        key = f"{'train' if match['part'] == 'train' else 'test'} {match['what']}"
        sets.add(match["set"])
        if key in found and len(sets) == 1 and found[key].suffix == ".gz":
            continue  # the same file, compressed and not
        found[key] = place
    if len(sets) > 1:
        names = ", ".join(sorted(name.strip("-_. ") or "without a name" for name in sets))
        raise BadInput(f"path must hold one data set, got {str(folder)!a} with {names}: give each a folder of its own.")
    missing = [name for name in FASHION_MNIST if name not in found]
    if missing:
        raise BadInput(
            "path must hold the four files of MNIST or its kin (train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz "
            f"and the same of t10k or test), got {str(folder)!a} without {', '.join(missing)}."
        )
    return tuple((name, found[name], found[name].stat().st_mtime_ns) for name in FASHION_MNIST)


@lru_cache(maxsize=1)
def _read(*files: tuple[str, Path, int], is_fashion: bool) -> Split:
    arrays = {name: _array(name, file, is_fashion) for name, file, _ in files}
    places = {name: file for name, file, _ in files}
    for half in ("train", "test"):
        images, labels = arrays[f"{half} images"], arrays[f"{half} labels"]
        if len(images) != len(labels):
            raise _refused(places[f"{half} labels"], f"it has {len(labels):,} labels for {len(images):,} images")
    if arrays["train images"].shape[1:] != arrays["test images"].shape[1:]:
        raise _refused(places["test images"], "its images are of another size than those to train on")
    classes = np.unique(arrays["train labels"])
    unknown = np.setdiff1d(arrays["test labels"], classes)
    if len(classes) < 2 or len(unknown):
        why = f"it has the label {unknown[0]}, which no training row has" if len(unknown) else "there is one class"
        raise _refused(places["test labels"], why)
    order = shuffled(len(arrays["train labels"]))
    num_validation = len(order) // 12
    if not num_validation or not len(arrays["test labels"]):
        raise _refused(places["train labels"], f"{len(order)} training rows are too few for three parts")
    train, validation = order[:-num_validation], order[-num_validation:]
    mean, std = moments(arrays["train images"][train][:, None])

    def part(images: np.ndarray, labels: np.ndarray) -> Part:
        y = np.searchsorted(classes, labels).astype(np.int64)
        return Part(from_bytes(images[:, None], mean, std), torch.from_numpy(y))

    images, labels = arrays["train images"], arrays["train labels"]
    return Split(
        part(images[train], labels[train]),
        part(images[validation], labels[validation]),
        part(arrays["test images"], arrays["test labels"]),
        len(classes),
    )


def _array(name: str, file: Path, is_fashion: bool) -> np.ndarray:
    """What a file holds: images (n, H, W) or labels (n,), as bytes."""
    num_dimensions = 3 if name.endswith("images") else 1
    magic = bytes((0, 0, _UNSIGNED_BYTE, num_dimensions))
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as source:
            head = source.read(4 + 4 * num_dimensions)
            if head[:4] != magic or len(head) < 4 + 4 * num_dimensions:
                raise _refused(file, f"it begins with {head[:4].hex(' ') or 'nothing'} and not with {magic.hex(' ')}")
            sizes = struct.unpack(f">{num_dimensions}I", head[4:])
            length = math.prod(sizes)
            content = source.read(min(length, _LARGEST) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _refused(file, " ".join(str(error).split()) or type(error).__name__) from error
    if len(content) != length:
        what = "truncated" if len(content) < length else "longer than that"
        raise _refused(file, f"its sizes {' × '.join(map(str, sizes))} are {length:,} bytes, and it is {what}")
    if is_fashion and hashlib.sha256(head + content).hexdigest() != FASHION_MNIST[name]:
        raise _refused(file, f"what it holds is not that of Fashion-MNIST, by its SHA-256. To get it, {_HOW_TO_GET}")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes).copy()  # torch wants to write


def _refused(file: Path, why: str) -> BadInput:
    return BadInput(f"path must hold whole IDX files of one data set, got {str(file)!a}: {why}.")
