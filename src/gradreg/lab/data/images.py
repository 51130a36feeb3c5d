"""Images of the user: a folder with a subfolder for each class, or an image data set of the hub.

A folder with `train/` and `test/` keeps its test rows; otherwise a fifth of a fixed shuffled order becomes test rows.
A tenth of what is then left, by a fixed shuffle, becomes validation rows. Images are read as RGB, must have one size,
and are standardized by the mean and deviation of each color over the training rows. All of them are held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradreg.lab.data.parts import Part, Split, from_bytes, shuffled
from gradreg.lab.folder import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_INSTALL = "install it with: pip install 'gradreg[hub]'"

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
    if not root.is_dir():
        raise BadInput(f"path must be a folder with one subfolder of images for each class, got {path!a}.")
    parts = [root / "train", root / "test"] if {"train", "test"} <= set(_subfolders(root)) else [root]
    classes = _subfolders(parts[0])
    if len(classes) < 2:
        raise BadInput(
            f"path must be a folder with a subfolder for each of two or more classes, got {str(parts[0])!a}."
        )
    if _subfolders(parts[-1]) != classes:
        raise BadInput(f"path must have the same classes in train/ and test/, got {path!a}.")
    size: list[tuple[int, int]] = []
    arrays = [_stack(_files(part, classes), size) for part in parts]
    return _split(path, arrays[0], arrays[1] if len(arrays) == 2 else None, len(classes))


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


def _subfolders(root: Path) -> list[str]:
    return sorted(place.name for place in root.iterdir() if place.is_dir() and not place.name.startswith("."))


def _files(root: Path, classes: Sequence[str]) -> Iterable[tuple[str, Callable[[], Image], int]]:
    from PIL import Image

    for label, name in enumerate(classes):
        for file in sorted(place for place in (root / name).iterdir() if place.suffix.lower() in _ENDINGS):
            yield str(file), lambda file=file: Image.open(file), label


def _stack(rows: Iterable[tuple[str, Callable[[], Image], int]], size: list[tuple[int, int]]) -> tuple[Pixels, Labels]:
    """Bytes and labels of rows (name in messages, how to open the image, label); the first image sets the size."""
    pixels, labels = [], []
    for where, open_image, label in rows:
        try:
            with open_image() as image:
                array = np.asarray(image.convert("RGB"))
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


def _reason(error: Exception) -> str:
    """On one line, since these messages come from other libraries."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _split(path: str, train: tuple[Pixels, Labels], test: tuple[Pixels, Labels] | None, num_classes: int) -> Split:
    pixels, labels = train
    order = shuffled(len(labels))
    if test is None:
        num_test = len(order) // 5
        order, last = order[num_test:], order[:num_test]
        test = pixels[last], labels[last]
    num_validation = len(order) // 10
    order, chosen = order[num_validation:], order[:num_validation]
    if not num_validation or not len(test[1]):
        raise BadInput(f"path must hold images enough for three parts, at least 13, got {len(labels)} in {path!a}.")
    mean, std = _moments(pixels[order])

    def part(images: Pixels, y: Labels) -> Part:
        return Part(from_bytes(images, mean, std), torch.from_numpy(y))

    return Split(part(pixels[order], labels[order]), part(pixels[chosen], labels[chosen]), part(*test), num_classes)


def _moments(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Mean and deviation of each color, of values in [0, 1]; a color that is constant keeps its scale."""
    counts = np.stack([np.bincount(pixels[:, color].ravel(), minlength=256) for color in range(3)])
    values = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    return mean.tolist(), np.where(std > 1e-4, std, 1.0).tolist()
