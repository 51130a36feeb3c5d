"""IDX files: MNIST and its kin, small ones made here; whatever is not whole is refused by name."""

import numpy as np
import pytest
import torch
from idx_files import encoded, write

from gradreg.lab.config import RunConfig
from gradreg.lab.data import idx, load
from gradreg.lab.data.parts import shuffled
from gradreg.lab.folder import BadInput
from gradreg.lab.models import build

SIDE, TRAIN, TEST = 6, 48, 10


@pytest.fixture(autouse=True)
def _no_cache():
    idx._read.cache_clear()


def arrays(num_classes=4, first=0):
    dice = np.random.default_rng(0)
    made = {}
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        made[f"{part}-images-idx3-ubyte"] = dice.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
        made[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % num_classes + first).astype(np.uint8)
    return made


def config(path, **fields):
    fields = {"data": "idx", "model": "cnn", "batch_size": 4, **fields}
    return RunConfig(path=None if path is None else str(path), **fields)


@pytest.mark.parametrize("compressed", [True, False])
def test_four_files_are_three_parts(tmp_path, compressed):
    files = arrays()
    write(tmp_path, files, compressed)
    (tmp_path / "readme.txt").write_text("beside")
    split = load(config(tmp_path))
    order = shuffled(TRAIN)
    train, validation = order[:-4], order[-4:]
    pixels, labels = files["train-images-idx3-ubyte"] / 255, files["train-labels-idx1-ubyte"]
    mean, std = pixels[train].mean(), pixels[train].std()
    for part, rows in ((split.train, train), (split.validation, validation)):
        expected = torch.tensor((pixels[rows] - mean) / std, dtype=torch.float32)[:, None]
        torch.testing.assert_close(part.x, expected, atol=1e-4, rtol=0)
        assert part.y.tolist() == labels[rows].tolist()
    assert split.test.x.shape == (TEST, 1, SIDE, SIDE)
    assert split.num_classes == 4
    assert build(config(tmp_path), split)(split.test.x).shape == (TEST, 4)


def test_images_are_averaged_over_squares(tmp_path):
    write(tmp_path, arrays())
    whole, small = load(config(tmp_path)), load(config(tmp_path, shrink=4))
    for part in ("train", "validation", "test"):
        before, after = getattr(whole, part), getattr(small, part)
        assert after.x.shape == (len(before), 1, 1, 1)  # 6 pixels hold one square of 4
        torch.testing.assert_close(after.x[:, 0, 0, 0], before.x[:, 0, :4, :4].mean((1, 2)))
        assert torch.equal(before.y, after.y)
    with pytest.raises(BadInput, match="shrink must be from 1 to 6 for images of 6×6, got '7'"):
        load(config(tmp_path, shrink=7))


def test_labels_that_begin_at_one_are_counted_from_zero(tmp_path):
    files = arrays(first=1)
    write(tmp_path, {name.replace("t10k", "test"): x for name, x in files.items()}, prefix="emnist-letters-")
    split = load(config(tmp_path))
    assert split.num_classes == 4
    assert split.test.y.tolist() == (files["t10k-labels-idx1-ubyte"] - 1).tolist()


def test_a_file_that_is_there_twice_is_read_once(tmp_path):
    write(tmp_path, arrays(), compressed=True)
    write(tmp_path, arrays(), compressed=False)
    assert len(load(config(tmp_path)).train) == TRAIN - 4


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: f.pop(LABELS), "without train labels"),
        (lambda f: f.update({IMAGES: encoded(f[IMAGES])[:-1]}), "truncated"),
        (lambda f: f.update({IMAGES: encoded(f[IMAGES]) + b"0"}), "longer"),
        (lambda f: f.update({IMAGES: encoded(f[IMAGES])[:7]}), "begins with 00 00 08 03"),
        (lambda f: f.update({IMAGES: b""}), "begins with nothing"),
        (lambda f: f.update({IMAGES: encoded(f[IMAGES], kind=13)}), "begins with 00 00 0d 03 and not with 00 00 08 03"),
        (lambda f: f.update({LABELS: encoded(f[IMAGES])}), "begins with 00 00 08 03 and not with 00 00 08 01"),
        (lambda f: f.update({IMAGES: bytes((0, 0, 8, 3)) + b"\xff" * 12}), "truncated"),
        (lambda f: f.update({LABELS: f[LABELS][:-1]}), "47 labels for 48 images"),
        (lambda f: f.update({IMAGES: f[IMAGES][:, :-1]}), "another size"),
        (lambda f: f.update({"t10k-labels-idx1-ubyte": np.full(TEST, 9, np.uint8)}), "the label 9"),
        (lambda f: f.update({n: np.zeros_like(x) for n, x in f.items() if "labels" in n}), "one class"),
        (lambda f: f.update({IMAGES: f[IMAGES][:8], LABELS: f[LABELS][:8]}), "too few"),
    ],
)
def test_what_is_not_whole_is_refused_on_one_line(tmp_path, change, why):
    files = arrays()
    change(files)
    write(tmp_path, files)
    with pytest.raises(BadInput, match=why) as refusal:
        load(config(tmp_path))
    assert "\n" not in str(refusal.value)


def test_what_is_no_archive_or_no_folder_is_refused(tmp_path):
    write(tmp_path, arrays())
    (tmp_path / f"{IMAGES}.gz").write_bytes(b"not compressed")
    with pytest.raises(BadInput, match="gz"):
        load(config(tmp_path))
    with pytest.raises(BadInput, match="must be a folder"):
        load(config(tmp_path / "nowhere"))
    write(tmp_path / "two", arrays(), prefix="emnist-letters-")
    write(tmp_path / "two", arrays(), prefix="emnist-digits-")
    with pytest.raises(BadInput, match="emnist-digits, emnist-letters"):
        load(config(tmp_path / "two"))


def test_fashion_mnist_is_known_by_what_it_holds(tmp_path, monkeypatch):
    write(tmp_path, arrays())
    with pytest.raises(BadInput, match="SHA-256") as refusal:
        load(config(tmp_path, data="fashion-mnist"))
    assert "apt install dataset-fashion-mnist" in str(refusal.value)
    digests = {
        name: __import__("hashlib").sha256(encoded(array)).hexdigest()
        for name, array in zip(idx.FASHION_MNIST, arrays().values())
    }
    monkeypatch.setattr(idx, "FASHION_MNIST", digests)
    assert len(load(config(tmp_path, data="fashion-mnist")).test) == TEST
    monkeypatch.setattr(idx, "DEBIAN", tmp_path)
    assert len(load(config(None, data="fashion-mnist")).test) == TEST


def test_where_fashion_mnist_is_not_there_both_ways_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "DEBIAN", tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"apt install dataset-fashion-mnist.*--path"):
        load(config(None, data="fashion-mnist"))
