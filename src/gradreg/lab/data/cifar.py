"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) from their official binary archives.

An archive is read into memory, compared with the official SHA-256, and only then opened. Nothing is unpickled or
written to disk, and of the members only those named here are read. A member is a row of records: one byte for the
label (two for CIFAR-100, coarse and fine), then 3×32×32 bytes, the red, green and blue planes.

Of the 50,000 training rows in a fixed shuffled order the last 5,000 are validation rows; the 10,000 test rows are the
official ones. Each color is standardized by the mean and deviation of the training pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from gradreg.lab.data.parts import Part, Split, from_bytes, shuffled
from gradreg.lab.folder import BadInput, shown

HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Archive:
    """What is known of an official archive."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    records: dict[str, int]
    """Records in each member."""
    label_bytes: int
    """The last of them is the label."""
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_validation: int = 5000

    def __hash__(self) -> int:
        return hash(self.sha256)


_BATCHES = tuple(f"cifar-10-batches-bin/data_batch_{k}.bin" for k in range(1, 6))

# The home page gives MD5 only (c32a1d4ab5d03f1284b67883e8d87530 and 03b5dce01913d631647c71ecec9e9cb8). Sizes and
# SHA-256 are those of TensorFlow Datasets, tensorflow_datasets/url_checksums/cifar10.txt and cifar100.txt;
# torchvision-ruby and gomlx check the same digests.
CIFAR10 = Archive(
    name="cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    train=_BATCHES,
    test=("cifar-10-batches-bin/test_batch.bin",),
    records=dict.fromkeys((*_BATCHES, "cifar-10-batches-bin/test_batch.bin"), 10_000),
    label_bytes=1,
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Archive(
    name="cifar-100-binary.tar.gz",
    size=168_513_733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    train=("cifar-100-binary/train.bin",),
    test=("cifar-100-binary/test.bin",),
    records={"cifar-100-binary/train.bin": 50_000, "cifar-100-binary/test.bin": 10_000},
    label_bytes=2,
    num_classes=100,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def read(archive: Archive, path: str) -> Split:
    """The split in the archive at `path`, or in the folder `path`.

    Raises:
        BadInput: no such file, or one that is not the official archive, byte for byte.
    """
    place = Path(path)
    file = place / archive.name if os.path.isdir(place) else place
    try:
        found = file.stat()
    except OSError as error:
        raise BadInput(
            f"path must be {archive.name} or the folder that holds it (get it from {HOME}), got {shown(path)}: "
            f"{error.strerror}."
        ) from error
    return _read(archive, file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(archive: Archive, file: Path, size: int, changed: int) -> Split:
    del changed  # part of the key
    if size != archive.size:
        raise _refused(archive, file, f"{size:,} bytes instead of {archive.size:,}, truncated or another file")
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != archive.sha256:
            raise _refused(archive, file, f"its SHA-256 is not {archive.sha256}")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
            images, labels = _records(archive, file, tar, archive.train)
            test = _part(archive, *_records(archive, file, tar, archive.test))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise _refused(archive, file, str(error)) from error
    order = shuffled(len(labels))
    train, validation = order[: -archive.num_validation], order[-archive.num_validation :]
    return Split(
        _part(archive, images[train], labels[train]),
        _part(archive, images[validation], labels[validation]),
        test,
        archive.num_classes,
    )


def _records(
    archive: Archive, file: Path, tar: tarfile.TarFile, members: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) and labels (n,), as bytes."""
    rows = []
    for name in members:
        length = archive.label_bytes + _PIXELS
        expected = archive.records[name] * length
        try:
            member = tar.getmember(name)
        except KeyError as error:
            raise _refused(archive, file, f"it lacks {name}") from error
        source = tar.extractfile(member) if member.isreg() else None
        if source is None or member.size != expected:
            raise _refused(archive, file, f"{name} is not a file of {expected:,} bytes")
        content = source.read(expected)
        if len(content) != expected:
            raise _refused(archive, file, f"{name} is truncated")
        rows.append(np.frombuffer(content, dtype=np.uint8).reshape(-1, length))
    table = np.concatenate(rows)
    labels = table[:, archive.label_bytes - 1]
    if int(labels.max()) >= archive.num_classes:
        raise _refused(archive, file, f"it has the label {labels.max()}, above {archive.num_classes - 1}")
    return table[:, archive.label_bytes :].reshape(-1, 3, 32, 32), labels


def _part(archive: Archive, images: np.ndarray, labels: np.ndarray) -> Part:
    return Part(from_bytes(images, archive.mean, archive.std), torch.from_numpy(labels.astype(np.int64)))


def _refused(archive: Archive, file: Path, why: str) -> BadInput:
    return BadInput(f"path must be the official {archive.name}, got {str(file)!a}: {why}. Get it again from {HOME}.")
