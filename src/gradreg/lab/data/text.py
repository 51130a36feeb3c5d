"""A small language, generated, whose best attainable loss is known.

Sentences in which the verb agrees in number with its subject, over up to two clauses in between:

    the cat that the old dogs follow sees. the owls hear.

Each word is drawn uniformly from the list of its place, and no word in a list begins another one, so that the
probability of every text is known exactly: −log P, divided by the number of characters, is the loss of a model that
knows the grammar. A model that has not learned it must memorize; few rows and many epochs show over-fitting.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gradreg.lab.data.cache import kept
from gradreg.lab.data.parts import Part, Split

LENGTH = 64
"""Characters in a row; each predicts the next."""
ADJECTIVES = ("old", "red", "small", "quiet")
NOUNS = ("cat", "dog", "owl", "horse", "bird", "girl", "king", "robot")
_ADJECTIVES = tuple(f"{adjective} " for adjective in ADJECTIVES)
_ONE = tuple(f"{noun} " for noun in NOUNS)
_MANY = tuple(f"{noun}s " for noun in NOUNS)
VERBS = ("see", "hear", "follow", "help", "paint", "know")
_JOINT = "that the "
_ALPHABET = sorted(set("".join((*_ADJECTIVES, *_ONE, *_MANY, *VERBS, _JOINT, "the . "))))
_SEEDS = {"train": 0, "validation": 1, "test": 2}

Choose = Callable[[Sequence[str]], str]


@lru_cache(maxsize=1)
def make(num_train: int) -> Split:
    """`num_train` training rows, 500 to choose and 1,000 to test; more training rows contain the fewer."""
    sizes = {"train": num_train, "validation": 500, "test": 1000}
    settings = {"sizes": sizes, "seeds": _SEEDS, "length": LENGTH, "words": [ADJECTIVES, NOUNS, VERBS, _JOINT]}

    def generate() -> dict[str, Tensor]:
        parts = {name: _part([row for row, _ in rows(name, sizes[name])]) for name in sizes}
        return {f"{name}.{key}": getattr(part, key) for name, part in parts.items() for key in ("x", "y")}

    found = kept("text", settings, generate)
    train, validation, test = (Part(found[f"{name}.x"], found[f"{name}.y"]) for name in sizes)
    return Split(train, validation, test, len(_ALPHABET))


def best_loss() -> float:
    """The mean of −log P over the characters of the test rows: the least loss that a model can be expected to have."""
    drawn = rows("test", 1000)
    return sum(nats for _, nats in drawn) / (len(drawn) * LENGTH)


def rows(part: str, count: int) -> list[tuple[str, float]]:
    """Texts of `LENGTH` + 1 characters, from the beginning of a sentence on, with −log P of each."""
    generator = random.Random(_SEEDS[part])
    return [_row(generator) for _ in range(count)]


def _row(generator: random.Random) -> tuple[str, float]:
    text, nats = "", 0.0

    def choose(options: Sequence[str]) -> str:
        nonlocal text, nats
        word = options[int(generator.random() * len(options))]
        seen = word[: max(0, LENGTH + 1 - len(text))]
        nats += math.log(len(options) / sum(option.startswith(seen) for option in options))
        text += seen
        return word

    while len(text) <= LENGTH:
        choose(["the "])
        _clause(choose, 0)
        choose([". "])
    return text, nats


def _clause(choose: Choose, depth: int) -> None:
    """Subject, perhaps a clause about it, and the verb of the subject's number."""
    word = choose((*_ADJECTIVES, *_ONE, *_MANY))
    if word in _ADJECTIVES:
        word = choose((*_ONE, *_MANY))
    verbs = VERBS if word in _MANY else tuple(f"{verb}s" for verb in VERBS)
    if choose((*verbs, *(_JOINT,) * (3 if depth < 2 else 0))) == _JOINT:
        _clause(choose, depth + 1)
        choose([" "])
        choose(verbs)


def _part(texts: Sequence[str]) -> Part:
    number = {character: index for index, character in enumerate(_ALPHABET)}
    ids = torch.tensor([[number[character] for character in text] for text in texts])
    return Part(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
