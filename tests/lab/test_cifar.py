"""The CIFAR reader, on small archives in the format of the official ones."""

import hashlib
import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradreg.lab.config import RunConfig
from gradreg.lab.data import cifar, load
from gradreg.lab.folder import BadInput

OFFICIAL = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}
EACH = pytest.mark.parametrize("name", OFFICIAL)
RECORDS = 20


@pytest.fixture(autouse=True)
def _no_cache():
    cifar._read.cache_clear()


def table(archive, member):
    """Records of random pixels: a coarse label where there is one, a label, 3 planes."""
    generator = np.random.default_rng(len(member) + sum(map(ord, member)))
    rows = generator.integers(0, 256, (RECORDS, archive.label_bytes + 3072), dtype=np.uint8)
    rows[:, : archive.label_bytes] = generator.integers(0, archive.num_classes, (RECORDS, archive.label_bytes))
    return rows


def write(archive, folder, change=lambda members: members):
    """An archive of that kind in the folder, and what is officially known of it."""
    members = {name: table(archive, name).tobytes() for name in archive.records}
    members["cifar/readme.html"] = b"<html>"
    members["cifar/data_batch_9"] = pickle.dumps({"data": 1})
    path = folder / archive.name
    with tarfile.open(path, "w:gz") as tar:
        for name, content in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = path.read_bytes()
    return path, replace(
        archive,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        records=dict.fromkeys(archive.records, RECORDS),
        num_validation=RECORDS // 4,
    )


def bytes_of(archive, x):
    """Undo the standardization."""
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (archive.mean, archive.std))
    return ((x * std + mean) * 255).round().to(torch.uint8).flatten(1).numpy()


@EACH
def test_pixels_and_labels_are_those_of_the_records(name, tmp_path):
    path, archive = write(OFFICIAL[name], tmp_path)
    split = cifar.read(archive, str(path))
    labels_at = archive.label_bytes - 1
    expected = np.concatenate([table(archive, member) for member in archive.test])
    assert (bytes_of(archive, split.test.x) == expected[:, archive.label_bytes :]).all()
    assert split.test.y.tolist() == expected[:, labels_at].tolist()
    assert split.test.x.dtype == torch.float32
    assert split.test.y.dtype == torch.int64
    assert split.num_classes == archive.num_classes

    rows = np.concatenate([table(archive, member) for member in archive.train])
    label_of = {row[archive.label_bytes :].tobytes(): row[labels_at] for row in rows}
    seen = {}
    for part in (split.train, split.validation):
        seen |= {row.tobytes(): y for row, y in zip(bytes_of(archive, part.x), part.y.tolist())}
    assert seen == label_of, "train and validation are the training records, each once"
    assert (len(split.train), len(split.validation)) == (len(rows) - RECORDS // 4, RECORDS // 4)


@EACH
def test_a_folder_that_holds_the_archive_will_do_and_load_finds_it(name, tmp_path, monkeypatch):
    _, archive = write(OFFICIAL[name], tmp_path)
    monkeypatch.setattr(cifar, name.upper(), archive)
    split = load(RunConfig(data=name, path=str(tmp_path), model="resnet18", batch_size=5, num_train=10, augment=True))
    assert split.train.x.shape == (10, 3, 32, 32)
    assert not split.is_language


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(("harm", "why"), [(flip_a_bit, "SHA-256"), (truncate, "truncated")])
def test_an_altered_archive_is_refused_by_name(harm, why, tmp_path):
    path, archive = write(cifar.CIFAR10, tmp_path)
    cifar.read(archive, str(path))
    harm(path)
    with pytest.raises(BadInput, match=why) as refusal:
        cifar.read(archive, str(path))
    assert str(path) in str(refusal.value)
    assert cifar.HOME in str(refusal.value)
    assert "\n" not in str(refusal.value)


def without_a_member(members):
    return {name: content for name, content in members.items() if "data_batch_3" not in name}


def with_a_short_member(members):
    return {name: content[:-1] if "data_batch_3" in name else content for name, content in members.items()}


def with_a_wrong_label(members):
    return {name: b"\x0a" + content[1:] if "data_batch_3" in name else content for name, content in members.items()}


@pytest.mark.parametrize(
    ("change", "why"),
    [(without_a_member, "lacks"), (with_a_short_member, "61,460 bytes"), (with_a_wrong_label, "label 10, above 9")],
)
def test_the_members_are_checked_behind_the_digest(change, why, tmp_path):
    path, archive = write(cifar.CIFAR10, tmp_path, change)
    with pytest.raises(BadInput, match=why):
        cifar.read(archive, str(path))


def test_what_is_no_archive_is_refused(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    content = b"\x80\x04not an archive"
    path.write_bytes(content)
    archive = replace(cifar.CIFAR10, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(BadInput, match="official cifar-10-binary"):
        cifar.read(archive, str(path))


@EACH
def test_a_missing_archive_says_where_to_get_it(name, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="No such file") as refusal:
            load(RunConfig(data=name, path=str(path), model="resnet18"))
        assert OFFICIAL[name].name in str(refusal.value)
        assert cifar.HOME in str(refusal.value)
    with pytest.raises(BadInput, match="path must be given"):
        load(RunConfig(data=name, model="resnet18"))


def test_the_official_archives_have_the_known_shape():
    for archive in OFFICIAL.values():
        assert sum(archive.records[name] for name in archive.train) == 50_000
        assert sum(archive.records[name] for name in archive.test) == 10_000
        assert len(bytes.fromhex(archive.sha256)) == 32
