import sys

import numpy as np
import pytest
import torch

from gradreg.lab.config import RunConfig
from gradreg.lab.data import images, load
from gradreg.lab.folder import BadInput
from gradreg.lab.models import build

Image = pytest.importorskip("PIL.Image")

SIDE = 8


@pytest.fixture(autouse=True)
def _no_cache():
    images.from_folder.cache_clear()
    images.from_hub.cache_clear()


def picture(number, size=(SIDE, SIDE)):
    """A different picture for each number; its first pixel is the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[0, 0] = number
    return pixels


def write(root, classes, start=0, count=10):
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(picture(start + label * count + k)).save(root / name / f"{k:02}.png")
        (root / name / "notes.txt").write_text("not an image")


def config(path, **fields):
    return RunConfig(**{"data": "images", "path": str(path), "model": "cnn", "batch_size": 4, **fields})


def numbers(split, train):
    """The first pixel of each row of each part, standardization undone by the moments of the training pictures."""
    pixels = np.stack([picture(number) for number in sorted(train)]) / 255
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    parts = (split.train, split.validation, split.test)
    return [((part.x[:, 0, 0, 0].double() * std[0] + mean[0]) * 255).round().int().tolist() for part in parts]


def test_one_folder_is_split_by_a_fixed_shuffle(tmp_path):
    write(tmp_path, ["cat", "dog"], count=25)
    split = load(config(tmp_path))
    order = images.shuffled(50)
    train, validation, test = order[14:].tolist(), order[10:14].tolist(), order[:10].tolist()
    assert numbers(split, train) == [train, validation, test]
    for part, rows in ((split.train, train), (split.validation, validation), (split.test, test)):
        assert part.y.tolist() == [int(number >= 25) for number in rows]
    assert split.num_classes == 2
    torch.testing.assert_close(split.train.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(split.train.x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert build(config(tmp_path), split)(split.test.x).shape == (10, 2)


def test_the_test_folder_is_the_test_part(tmp_path):
    write(tmp_path / "train", ["cat", "dog", "owl"])
    write(tmp_path / "test", ["cat", "dog", "owl"], start=100, count=2)
    split = load(config(tmp_path))
    train, validation, test = numbers(split, images.shuffled(30)[3:])
    assert test == list(range(100, 106))
    assert split.test.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(train + validation) == list(range(30))
    assert len(validation) == 3


def test_rows_of_val_are_validation_rows_or_test_rows_where_there_are_no_others(tmp_path):
    write(tmp_path / "train", ["cat", "dog"])
    write(tmp_path / "val", ["cat", "dog"], start=50, count=2)
    split = load(config(tmp_path))
    assert numbers(split, images.shuffled(20)[2:])[2] == [50, 51, 52, 53]
    images.from_folder.cache_clear()
    write(tmp_path / "test", ["cat", "dog"], start=100, count=3)
    split = load(config(tmp_path))
    train, validation, test = numbers(split, range(20))
    assert (sorted(train), validation, test) == (list(range(20)), [50, 51, 52, 53], list(range(100, 106)))


def test_what_systems_and_archivers_leave_is_no_class(tmp_path):
    write(tmp_path, ["cat", "dog"])
    for name in ("__MACOSX", "@eaDir", ".cache", "empty"):
        (tmp_path / name).mkdir()
    for name in ("__MACOSX", "@eaDir", ".cache"):
        (tmp_path / name / "._0.png").write_bytes(b"none")
    (tmp_path / "cat" / "@eaDir").mkdir()
    (tmp_path / "cat" / "._00.png").write_bytes(b"none")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"none")
    split = load(config(tmp_path))
    assert split.num_classes == 2
    assert sum(map(len, (split.train, split.validation, split.test))) == 20


@pytest.mark.parametrize(
    ("dtype", "most"), [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1.0)], ids=["16 bits", "32 bits", "float"]
)
def test_wide_images_keep_their_shades(tmp_path, dtype, most):
    write(tmp_path, ["cat", "dog"])
    shades = np.linspace(0, most, SIDE * SIDE).reshape(SIDE, SIDE).astype(dtype)
    file = tmp_path / "wide.tif"
    Image.fromarray(shades).save(file)
    with Image.open(file) as image:
        read = images._as_bytes(image)
    np.testing.assert_array_equal(read, np.repeat(np.round(shades / most * 255).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 255.0], [np.nan, 0.0]])
def test_floating_point_images_of_another_range_are_refused(tmp_path, values):
    write(tmp_path, ["cat", "dog"])
    wrong = np.resize(np.array(values, np.float32), (SIDE, SIDE))
    Image.fromarray(wrong).save(tmp_path / "cat" / "wrong.tif")
    with pytest.raises(BadInput, match=r"wrong\.tif.*0 to 1 can be read"):
        load(config(tmp_path))


def test_images_are_read_upright(tmp_path):
    pixels = picture(7, (SIDE, SIDE))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    file = tmp_path / "turned.png"
    Image.fromarray(np.rot90(pixels).copy()).save(file, exif=exif)
    with Image.open(file) as image:
        np.testing.assert_array_equal(images._as_bytes(image), pixels)


def deeper(root):
    (root / "cat" / "more").mkdir()
    Image.fromarray(picture(1)).save(root / "cat" / "more" / "x.png")


def unknown(root):
    (root / "cat" / "x.heic").write_bytes(b"none")


@pytest.mark.parametrize(("change", "why"), [(deeper, "a deeper one.*more"), (unknown, r"x\.heic.*convert")])
def test_nothing_is_passed_over_without_a_word(tmp_path, change, why):
    write(tmp_path, ["cat", "dog"])
    change(tmp_path)
    with pytest.raises(BadInput, match=why) as refusal:
        load(config(tmp_path))
    assert "\n" not in str(refusal.value)


def add(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def damage(root):
    add(root / "cat" / "03.png", b"\x89PNG broken")


def other_size(root):
    Image.fromarray(picture(1, (4, 6))).save(root / "dog" / "09.png")


def other_classes(root):
    (root / "train").mkdir()
    (root / "test").mkdir()
    for name in ("cat", "dog"):
        (root / name).rename(root / "train" / name)
        (root / "test" / name.upper()).mkdir()
        Image.fromarray(picture(1)).save(root / "test" / name.upper() / "0.png")


@pytest.mark.parametrize(
    ("harm", "why"),
    [(damage, r"3\.png.*UnidentifiedImageError"), (other_size, r"9\.png.*6×4.*8×8"), (other_classes, "same classes")],
)
def test_bad_folders_are_refused_by_name_on_one_line(harm, why, tmp_path):
    write(tmp_path, ["cat", "dog"])
    harm(tmp_path)
    with pytest.raises(BadInput, match=why) as refusal:
        load(config(tmp_path))
    assert "\n" not in str(refusal.value)


def test_too_little_is_refused(tmp_path):
    with pytest.raises(BadInput, match="two or more classes"):
        load(config(tmp_path))
    write(tmp_path, ["cat", "dog"], count=5)
    with pytest.raises(BadInput, match="at least 13, got 10"):
        load(config(tmp_path))
    with pytest.raises(BadInput, match="must be a folder"):
        load(config(tmp_path / "nowhere"))


def test_thirteen_images_are_enough(tmp_path):
    write(tmp_path, ["cat"], count=6)
    write(tmp_path / "more", ["dog"], start=6, count=7)
    (tmp_path / "more" / "dog").rename(tmp_path / "dog")
    (tmp_path / "more").rmdir()
    split = load(config(tmp_path))
    assert [len(part) for part in (split.train, split.validation, split.test)] == [10, 1, 2]


@pytest.mark.parametrize(("name", "module"), [("images", "PIL.Image"), ("hub", "datasets")])
def test_without_the_extra_the_install_line_is_given(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=r"pip install '.\[hub\]'"):
        load(config(tmp_path, data=name))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def rows(hub, start, count, label=None):
    columns = {
        "name": [str(k) for k in range(count)],
        "picture": [Image.fromarray(picture(start + k)) for k in range(count)],
        "kind": [k % 3 if label is None else label for k in range(count)],
    }
    features = {
        "name": hub.Value("string"),
        "picture": hub.Image(),
        "kind": hub.ClassLabel(names=["cat", "dog", "owl"]),
    }
    return hub.Dataset.from_dict(columns, features=hub.Features(features))


def test_a_data_set_on_disk_is_read_by_its_column_types(hub, tmp_path):
    hub.DatasetDict({"train": rows(hub, 0, 30), "test": rows(hub, 100, 6)}).save_to_disk(tmp_path / "set")
    split = load(config(tmp_path / "set", data="hub"))
    train, validation, test = numbers(split, images.shuffled(30)[3:])
    assert (test, split.test.y.tolist()) == (list(range(100, 106)), [0, 1, 2, 0, 1, 2])
    assert sorted(train + validation) == list(range(30))
    assert split.train.y.tolist() == [number % 3 for number in train]
    assert split.num_classes == 3


def test_one_part_is_split_in_three(hub, tmp_path):
    rows(hub, 0, 50).save_to_disk(tmp_path / "set")
    split = load(config(tmp_path / "set", data="hub"))
    assert [len(part) for part in (split.train, split.validation, split.test)] == [36, 4, 10]


def test_what_cannot_be_used_of_the_hub_is_one_line(hub, tmp_path):
    with pytest.raises(BadInput, match="nobody/nothing") as refusal:
        load(config("nobody/nothing", data="hub"))
    assert "\n" not in str(refusal.value)
    hub.Dataset.from_dict({"text": ["a"] * 20}).save_to_disk(tmp_path / "words")
    with pytest.raises(BadInput, match="Image and a ClassLabel"):
        load(config(tmp_path / "words", data="hub"))
    rows(hub, 0, 20, label=-1).save_to_disk(tmp_path / "unlabeled")
    with pytest.raises(BadInput, match="label -1"):
        load(config(tmp_path / "unlabeled", data="hub"))
