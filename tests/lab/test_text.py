import math
from collections import Counter

import pytest
import torch

from gradreg.lab.config import RunConfig
from gradreg.lab.data import load, text
from gradreg.lab.models import build
from gradreg.lab.objective import evaluate, loss


def spelled(ids):
    return "".join(text._ALPHABET[i] for i in ids.tolist())


def test_rows_are_text_and_labels_the_next_characters():
    split = load(RunConfig(data="text", num_train=50, batch_size=50))
    assert [len(part) for part in (split.train, split.validation, split.test)] == [50, 500, 1000]
    for part in (split.train, split.validation, split.test):
        assert part.x.shape[1:] == part.y.shape[1:] == (text.LENGTH,)
        assert torch.equal(part.x[:, 1:], part.y[:, :-1])
    assert spelled(split.train.x[0]).startswith("the ")
    assert split.num_classes == len(text._ALPHABET) == split.train.x.max() + 1
    assert split.is_language


def test_parts_share_no_text_and_more_rows_contain_the_fewer():
    written = {part: [row for row, _ in text.rows(part, 1000)] for part in text._SEEDS}
    assert len(set().union(*written.values())) == 3000
    assert [row for row, _ in text.rows("train", 10)] == written["train"][:10]
    few, many = (load(RunConfig(data="text", num_train=size)) for size in (200, 2100))
    assert torch.equal(few.train.x, many.train.x[:200])
    assert torch.equal(few.test.x, many.test.x)


def subjects_and_verbs(sentence):
    """Pairs (noun, verb) of a whole sentence, by the brackets that "that" and verbs are."""
    nouns, pairs = [], []
    for word in sentence.split():
        if word.rstrip("s") in text.NOUNS:
            nouns.append(word)
        elif word.rstrip("s") in text.VERBS:
            pairs.append((nouns.pop(), word))
    assert not nouns
    return pairs


def test_every_verb_agrees_with_its_subject_also_over_clauses():
    sentences = [s for row, _ in text.rows("train", 500) for s in row.split(".")[:-1]]
    distances = Counter(len(subjects_and_verbs(sentence)) for sentence in sentences)
    assert set(distances) == {1, 2, 3}, "up to two clauses in between"
    for sentence in sentences:
        for noun, verb in subjects_and_verbs(sentence):
            assert noun.endswith("s") != verb.endswith("s"), sentence


def test_the_probabilities_of_all_texts_add_up_to_one(monkeypatch):
    """Over the beginnings of 12 characters, which are few enough to be counted."""
    monkeypatch.setattr(text, "LENGTH", 11)
    drawn = dict(text.rows("train", 20_000))
    assert sum(math.exp(-nats) for nats in drawn.values()) == pytest.approx(1, abs=0.01)


def test_a_word_that_is_cut_counts_with_all_words_that_begin_so(monkeypatch):
    monkeypatch.setattr(text, "LENGTH", 4)
    nats = dict(text.rows("train", 2000))
    # 4 adjectives, 8 nouns in two numbers: 20 words, of which quiet alone begins with q, and red and robot(s) with r.
    assert nats["the q"] == pytest.approx(math.log(20))
    assert nats["the r"] == pytest.approx(math.log(20 / 3))


def test_the_best_loss_is_far_below_that_of_character_pairs_and_no_model_passes_it():
    """The best table of P(next | this character), fitted to the test rows themselves, is worse."""
    part = load(RunConfig(data="text")).test
    counts = torch.zeros(len(text._ALPHABET), len(text._ALPHABET), dtype=torch.float64)
    counts.index_put_((part.x.flatten(), part.y.flatten()), torch.ones((), dtype=torch.float64), accumulate=True)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    pairs = -(counts * share.clamp(min=1e-300).log()).sum().item() / counts.sum().item()
    assert 0.3 < text.best_loss() < 0.4 < 2 * text.best_loss() < pairs


def test_a_small_gpt_learns_and_stays_above_the_best_loss():
    config = RunConfig(data="text", model="gpt", depth=1, width=32, num_train=400)
    split = load(config)
    model = build(config, split)
    uniform = math.log(split.num_classes)
    assert evaluate(model, split.test).loss == pytest.approx(uniform, abs=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(60):
        optimizer.zero_grad()
        loss(model, split.train[step % 4 * 100 : step % 4 * 100 + 100]).backward()
        optimizer.step()
    assert text.best_loss() < evaluate(model, split.test).loss < uniform / 2
