import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from gradreg.lab import data
from gradreg.lab.config import DATA, MODELS, RunConfig
from gradreg.lab.data import load, with_random_labels
from gradreg.lab.data.augment import augment
from gradreg.lab.data.parts import Part
from gradreg.lab.folder import BadInput
from gradreg.lab.models import MODELS as BUILT
from gradreg.studies.demo.tasks import RANDOM_SHARE, TASKS

EACH_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.task)


def rows(part):
    return {row.numpy().tobytes() for row in part.x}


@EACH_TASK
def test_the_parts_share_no_row(task):
    split = load(task)
    train, validation, test = rows(split.train), rows(split.validation), rows(split.test)
    assert len(split.train) == task.num_train
    assert min(len(validation), len(test)) >= 500
    assert not train & validation
    assert not train & test
    assert not validation & test


@EACH_TASK
def test_test_rows_are_the_same_for_every_seed_and_label_share(task):
    one, other = load(task), load(replace(task, random_labels=0.5, seed=1_000_000))
    assert torch.equal(one.test.x, other.test.x)
    assert torch.equal(one.test.y, other.test.y)
    assert torch.equal(one.validation.y, other.validation.y)


@EACH_TASK
def test_the_stated_share_of_training_labels_is_another_class(task):
    clean = load(replace(task, random_labels=0.0, seed=3)).train.y
    changed = (load(replace(task, seed=3)).train.y != clean).float().mean().item()
    assert changed == pytest.approx(task.random_labels, abs=1 / len(clean))


def test_random_labels_depend_on_the_seed_and_reach_every_other_class():
    y = torch.zeros(2000, dtype=torch.long)
    labels = with_random_labels(y, RANDOM_SHARE, seed=0)
    assert torch.equal(labels, with_random_labels(y, RANDOM_SHARE, seed=0))
    assert not torch.equal(labels, with_random_labels(y, RANDOM_SHARE, seed=1))
    assert labels.unique().tolist() == list(range(10))
    assert not y.any(), "the labels handed in are not modified"


def test_generating_mnist1d_leaves_the_global_generators_as_they_were():
    random.seed(7)
    np.random.seed(7)
    expected = random.random(), np.random.random()
    random.seed(7)
    np.random.seed(7)
    data._mnist1d_block(0)
    assert (random.random(), np.random.random()) == expected


@pytest.fixture
def small_blocks(monkeypatch):
    """A generator that is quick, and as random as mnist1d: rows of one seed in another number are other rows."""

    def block(seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8000, 40, generator=generator)
        return Part(x, torch.randint(10, (8000,), generator=generator))

    monkeypatch.setattr(data, "_mnist1d_block", block)
    data._mnist1d.cache_clear()
    yield
    data._mnist1d.cache_clear()


@pytest.mark.usefixtures("small_blocks")
def test_a_larger_mnist1d_contains_the_smaller_and_keeps_validation_and_test():
    sizes = (3000, 4000, 4001, 12_000, 20_001)
    splits = [load(RunConfig(num_train=size)) for size in sizes]
    for split, size in zip(splits, sizes):
        assert len(split.train) == len(rows(split.train)) == size
        smaller = split.train[:3000]
        assert torch.equal(smaller.x, splits[0].train.x)
        assert torch.equal(smaller.y, splits[0].train.y)
        assert torch.equal(split.test.x, splits[0].test.x)
        assert torch.equal(split.validation.y, splits[0].validation.y)
    largest = splits[-1]
    assert torch.equal(largest.train[:12_000].x, splits[3].train.x)
    assert not rows(largest.train) & (rows(largest.validation) | rows(largest.test))


def test_more_rows_of_mnist1d_are_like_the_first():
    """One real block more: as many rows of each class, and the same scale."""
    split = load(RunConfig(num_train=5000))
    first, more = split.train[:4000], split.train[4000:]
    assert not rows(first) & rows(more)
    assert torch.bincount(more.y, minlength=10).min() > 50
    assert more.x.std().item() == pytest.approx(first.x.std().item(), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"data": "digits", "num_train": 301}, r"num_train must be .* from 100 .* to 300 .*got '301'"),
        ({"num_train": 50}, r"num_train must be .* from 100 \(the batch size\) to 1000000 .*got '50'"),
        ({"num_train": 1_000_001}, "num_train must be .* to 1000000 .*got '1000001'"),
        ({"data": "digits", "batch_size": 301}, "batch_size must be .* from 1 to 300 .*got '301'"),
        ({"path": "/somewhere"}, "path must be left out with data mnist1d, got '/somewhere'"),
        ({"data": "hub"}, "path must be given with data hub: the name of an image data set"),
        ({"data": "images"}, "path must be given with data images: a folder"),
        ({"augment": True}, "augment must be false with data mnist1d"),
        ({"shrink": 2}, "shrink must be 1 with data mnist1d: only images "),
        ({"data": "digits", "augment": True}, "augment must be false with data digits"),
        ({"data": "text", "augment": True}, "augment must be false with data text"),
        ({"data": "text", "random_labels": 0.1}, "random_labels must be 0 with data text, got 0.1"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_on_one_line(fields, why):
    with pytest.raises(BadInput, match=why) as refusal:
        load(RunConfig(**fields))
    assert "\n" not in str(refusal.value)


def test_every_source_of_the_configuration_is_there():
    assert set(data.SOURCES) == set(DATA)
    assert set(MODELS) == set(BUILT)


IMAGE = torch.arange(1.0, 2 * 3 * 32 * 32 + 1).view(2, 3, 32, 32)  # each pixel another number, none of them 0


def cropped(image, down, right, mirrored):
    padded = torch.zeros(3, 40, 40)
    padded[:, 4:36, 4:36] = image
    window = padded[:, down : down + 32, right : right + 32]
    return window.flip(-1) if mirrored else window


def place(image, augmented):
    """The crop that it is, by trying all."""
    return next(
        (down, right, mirrored)
        for down, right, mirrored in product(range(9), range(9), (False, True))
        if torch.equal(cropped(image, down, right, mirrored), augmented)
    )


def test_augmented_images_are_crops_of_the_padded_ones_with_all_colors_moved_alike():
    x = IMAGE[torch.arange(40) % 2]
    before = x.clone()
    out = augment(x, torch.Generator().manual_seed(0))
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.is_contiguous()
    places = [place(x[k], out[k]) for k in range(len(x))]
    assert len(set(places)) > 30, "each image has a place of its own"


def test_every_shift_and_both_sides_occur():
    x = torch.zeros(4000, 1, 32, 32)
    x[:, :, 16, 10] = 1
    marks = augment(x, torch.Generator().manual_seed(0)).nonzero()[:, 2:]
    assert sorted(set(marks[:, 0].tolist())) == list(range(12, 21))
    columns = torch.bincount(marks[:, 1], minlength=32)
    assert set(columns.nonzero().flatten().tolist()) == {*range(6, 15), *range(17, 26)}
    assert columns[17:].sum().item() / 4000 == pytest.approx(0.5, abs=0.03)


def test_augmentation_uses_its_own_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (augment(IMAGE, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
