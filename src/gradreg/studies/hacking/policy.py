"""The policy: a small GPT over words, how it begins, answers, and how likely it finds an answer."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg.lab.data.cache import kept
from gradreg.lab.models.attention import GPT
from gradreg.lab.randomness import seeded
from gradreg.studies.hacking.game import (
    LONGEST_ANSWER,
    LONGEST_PROMPT,
    NUMBER,
    PAD,
    RARE,
    STOP,
    WORDS,
    WRONG,
    Prompts,
    texts,
)

WIDTH, DEPTH = 32, 2
STEPS, ROWS, RATE = 400, 128, 3e-3
"""Of the supervised training that a policy begins with."""


def fresh() -> GPT:
    return GPT(len(WORDS), WIDTH, DEPTH, LONGEST_PROMPT + LONGEST_ANSWER)


def start(seed: int) -> GPT:
    """A policy that has learned to write sentences, as every run of a seed begins."""
    policy = fresh()
    policy.load_state_dict(_learned(seed))
    return policy


@lru_cache(maxsize=4)
def _learned(seed: int) -> dict[str, Tensor]:
    settings = {"seed": seed, "steps": STEPS, "rows": ROWS, "rate": RATE, "width": WIDTH, "depth": DEPTH}
    settings |= {"words": WORDS, "rare": RARE, "wrong": WRONG, "torch": torch.__version__}
    return kept("hacking-policy", settings, lambda: _learn(seed))


def _learn(seed: int) -> dict[str, Tensor]:
    with seeded(seed):
        policy = fresh()
        optimizer = torch.optim.AdamW(policy.parameters(), RATE)
        for step in range(STEPS):
            rows = texts(ROWS, seed * STEPS + step)
            loss = F.cross_entropy(policy(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), ignore_index=NUMBER[PAD])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


@torch.no_grad()
def answers(policy: nn.Module, asked: Prompts, dice: torch.Generator) -> Tensor:
    """Words (n, 4) drawn one by one, padded after the end of the sentence."""
    room = torch.zeros(len(asked), LONGEST_ANSWER, dtype=torch.long)
    rows = torch.cat([asked.ids, room], 1)
    drawn = room.clone()
    is_open = torch.ones(len(asked), dtype=torch.bool)
    each = torch.arange(len(asked))
    for k in range(LONGEST_ANSWER):
        logits = policy(rows[:, : LONGEST_PROMPT + k])[each, asked.lengths + k - 1]
        logits[:, NUMBER[PAD]] = -torch.inf
        word = torch.multinomial(logits.softmax(-1), 1, generator=dice)[:, 0] * is_open
        drawn[:, k] = word
        rows[each, asked.lengths + k] = word
        is_open &= word != NUMBER[STOP]
    return drawn


def log_likelihood(policy: nn.Module, asked: Prompts, given: Tensor) -> tuple[Tensor, Tensor]:
    """log π of all words at each place of an answer, (n, 4, words), and which places an answer (n, 4) has."""
    rows = torch.cat([asked.ids, torch.zeros_like(given)], 1)
    place = asked.lengths[:, None] + torch.arange(LONGEST_ANSWER)
    rows = rows.scatter(1, place, given)
    logits = policy(rows)
    index = (place - 1)[:, :, None].expand(-1, -1, logits.size(-1))
    return logits.gather(1, index).log_softmax(-1), given != NUMBER[PAD]
