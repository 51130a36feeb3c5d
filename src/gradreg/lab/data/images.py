"""Images of the user: a folder with a subfolder for each class, or an image data set of the hub.

A folder with `train/` keeps its test rows in `test/`, and those in `val/` or `validation/` as validation rows, or as
test rows where there are no others. Otherwise a fifth of a fixed shuffled order becomes test rows, and a tenth of what
is then left, by a fixed shuffle, validation rows. Images are read as RGB of 8 bits, upright, must have one size, and
are standardized by the mean and deviation of each color over the training rows. All of them are held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradreg._install import how
from gradreg.lab.data.parts import Part, Split, from_bytes, moments, shuffled
from gradreg.lab.folder import BadInput, shown

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDINGS = {".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".ppm", ".pgm"}
_BESIDE = {"", ".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".html", ".ini", ".db", ".log", ".url"}
"""Endings of what lies beside images and is none."""
_VALIDATION = ("val", "valid", "validation")
_INSTALL = f"to install it: {how('hub')}"

Pixels = np.ndarray  # (n, 3, H, W), bytes
Labels = np.ndarray  # (n,)


@lru_cache(maxsize=1)
def from_folder(path: str) -> Split:
    """The split of the images in a folder.

    Raises:
        BadInput: no folder of that kind, a file that is not an image, or images of different sizes.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise BadInput(f"data images needs Pillow; {_INSTALL}.") from error
    root = Path(path)
    if not os.path.isdir(root):
        raise BadInput(f"path must be a folder with one subfolder of images for each class, got {shown(path)}.")
    parts = _parts(root)
    classes = _classes(parts["train"])
    if len(classes) < 2:
        raise BadInput(
            "path must be a folder with a subfolder of images for each of two or more classes, got "
            f"{str(parts['train'])!a}."
        )
    for part in parts.values():
        if _classes(part) != classes:
            raise BadInput(f"path must have the same classes in train/ and {part.name}/, got {path!a}.")
    size: list[tuple[int, int]] = []
    arrays = {name: _stack(_files(part, classes), size) for name, part in parts.items()}
    return _split(path, arrays["train"], arrays.get("test"), len(classes), arrays.get("validation"))


@lru_cache(maxsize=1)
def from_hub(path: str) -> Split:
    """The split of an image classification data set, by its name on the hub or from a folder of `save_to_disk`.

    Its column of images and its column of class labels are found by type. Part `test`, or else `validation`, is the
    test part; without either a fifth of the rows is.

    Raises:
        BadInput: the data set cannot be had, or is not of that kind.
    """
    try:
        import datasets
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise BadInput(f"data hub needs datasets and Pillow; {_INSTALL}.") from error
    try:
        found: Any = datasets.load_from_disk(path) if Path(path).is_dir() else datasets.load_dataset(path)
    except Exception as error:  # of several libraries, and none of them ours
        raise BadInput(f"path must be an image data set that can be loaded, got {path!a}: {_reason(error)}") from error
    parts = found if isinstance(found, dict) else {"train": found}
    if "train" not in parts:
        raise BadInput(f"path must be a data set with a part train, got {path!a}, which has {', '.join(parts)}.")
    columns = parts["train"].features
    image = next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    label = next((name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise BadInput(f"path must be a data set with an Image and a ClassLabel column, got {path!a}: {list(columns)}.")
    size: list[tuple[int, int]] = []

    def arrays(name: str) -> tuple[Pixels, Labels]:
        rows = ((f"{path}, {name}[{k}]", lambda row=row: row[image], row[label]) for k, row in enumerate(parts[name]))
        return _stack(rows, size)

    test = next((name for name in ("test", "validation") if name in parts), None)
    return _split(path, arrays("train"), arrays(test) if test else None, columns[label].num_classes)


def _parts(root: Path) -> dict[str, Path]:
    """The folders of the parts that are given; `train` alone is all there is."""
    found = {name: root / name for name in ("train", "test", *_VALIDATION) if (root / name).is_dir()}
    others = [name for name in _VALIDATION if name in found]
    if "train" not in found or len(found) == 1:
        return {"train": root}
    if len(others) > 1:
        raise BadInput(f"path must have one folder of validation rows, got {str(root)!a} with {', '.join(others)}.")
    parts = {"train": found["train"]}
    if others:
        parts["validation" if "test" in found else "test"] = found[others[0]]
    return {**parts, "test": found["test"]} if "test" in found else parts


def _classes(root: Path) -> list[str]:
    """The subfolders that hold something; not what systems and archivers put beside them (.git, __MACOSX, @eaDir)."""
    folders = (place for place in root.iterdir() if place.is_dir() and not place.name.startswith((".", "__", "@")))
    return sorted(place.name for place in folders if any(place.iterdir()))


def _files(root: Path, classes: Sequence[str]) -> Iterable[tuple[str, Callable[[], Image], int]]:
    from PIL import Image

    for label, name in enumerate(classes):
        for file in sorted((root / name).iterdir()):
            ending = file.suffix.lower()
            if file.is_dir() and not file.name.startswith((".", "__", "@")):
                raise BadInput(
                    f"path must hold images in the folders of their classes, got a deeper one: {str(file)!a}."
                )
            if file.is_dir() or file.name.startswith(".") or ending in _BESIDE:
                continue
            if ending not in _ENDINGS:
                known = ", ".join(sorted(_ENDINGS))
                raise BadInput(f"path must hold images that end in {known}, got {str(file)!a}: convert it, or move it.")
            yield str(file), lambda file=file: Image.open(file), label


def _stack(rows: Iterable[tuple[str, Callable[[], Image], int]], size: list[tuple[int, int]]) -> tuple[Pixels, Labels]:
    """Bytes and labels of rows (name in messages, how to open the image, label); the first image sets the size."""
    pixels, labels = [], []
    for where, open_image, label in rows:
        try:
            with open_image() as image:
                array = _as_bytes(image)
        except Exception as error:  # Pillow raises several kinds on a damaged file
            raise BadInput(f"path must hold readable images, got {where!a}: {_reason(error)}") from error
        size[:] = size or [array.shape[:2]]
        if array.shape[:2] != size[0]:
            (height, width), (first_height, first_width) = array.shape[:2], size[0]
            raise BadInput(
                f"path must hold images of one size, got {where!a} of {width}×{height} where the first is "
                f"{first_width}×{first_height}; resize them first."
            )
        if label < 0:
            raise BadInput(f"path must hold labeled images, got {where!a} with the label {label}.")
        pixels.append(array.transpose(2, 0, 1))
        labels.append(label)
    return (np.stack(pixels) if pixels else np.empty((0, 3, 1, 1), np.uint8)), np.array(labels, dtype=np.int64)


def _as_bytes(image: Image) -> np.ndarray:
    """(H, W, 3), upright. Of 16 bits the upper eight are kept; floating point numbers go from 0 to 1."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode not in ("F", "I") and not upright.mode.startswith("I;"):
        return np.asarray(upright.convert("RGB"))
    values = np.asarray(upright)
    most = 1 if upright.mode == "F" else 2**16 - 1
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= most):
        raise ValueError(f"its numbers go from {values.min():g} to {values.max():g}, and 0 to {most} can be read")
    gray = np.round(values.astype(np.float64) * (255 / most)).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _reason(error: Exception) -> str:
    """On one line, since these messages come from other libraries."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


Rows = tuple[Pixels, Labels]


def _split(path: str, train: Rows, test: Rows | None, num_classes: int, validation: Rows | None = None) -> Split:
    pixels, labels = train
    order = shuffled(len(labels))
    if test is None:
        num_test = len(order) // 5
        order, last = order[num_test:], order[:num_test]
        test = pixels[last], labels[last]
    if validation is None:
        num_validation = len(order) // 10
        order, chosen = order[num_validation:], order[:num_validation]
        validation = pixels[chosen], labels[chosen]
    if not len(validation[1]) or not len(test[1]):
        raise BadInput(f"path must hold images enough for three parts, at least 13, got {len(labels)} in {path!a}.")
    mean, std = moments(pixels[order])

    def part(images: Pixels, y: Labels) -> Part:
        return Part(from_bytes(images, mean, std), torch.from_numpy(y))

    return Split(part(pixels[order], labels[order]), part(*validation), part(*test), num_classes)
