import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from gradreg.lab import data
from gradreg.lab.data import load, with_random_labels
from gradreg.lab.models import build
from gradreg.lab.tasks import RANDOM_SHARE, TASKS

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
    data._mnist1d.__wrapped__()  # past the cache
    assert (random.random(), np.random.random()) == expected


@EACH_TASK
def test_a_model_is_made_by_its_seed_and_leaves_the_global_generator_as_it_was(task):
    split = load(task)
    before = torch.get_rng_state()
    one, same, other = (build(replace(task, seed=seed), split).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    assert build(task, split)(split.test.x[:3]).shape == (3, 10)
