"""One run: GRPO of a policy against a verifier, and what it comes to, the true reward beside it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from gradreg.lab.folder import BadInput
from gradreg.lab.randomness import seeded
from gradreg.studies.hacking.arms import divergence, step_of
from gradreg.studies.hacking.game import WORTH, Prompts, hacks, honest, paid, prompts
from gradreg.studies.hacking.policy import answers, log_likelihood, start

VALIDATION, TEST = 7_000_001, 7_000_002
"""Seeds of the prompts on which settings are chosen, and of those on which they are read."""
FAITHFUL = "faithful"
"""The game of the verifier without a flaw, for which the learning rate is chosen."""


@dataclass(frozen=True)
class Job:
    """A run."""

    game: str
    arm: str
    value: float
    seed: int
    rate: float
    prompts: int = VALIDATION
    steps: int = 100
    groups: int = 16
    """Prompts in a step."""
    answers: int = 8
    """Of each."""
    asked: int = 500
    """Prompts of a reading."""
    readings: int = 20


@dataclass(frozen=True)
class Reading:
    """Of a policy, on prompts that it has not been trained on."""

    step: int
    true: float
    """Share of honest answers."""
    proxy: float
    """What the verifier pays on average."""
    hacks: float
    """Share of hacks."""
    kl: float
    """KL(π‖π₀) of an answer, in nats: the mean over answers of the sum over their places."""


@dataclass(frozen=True)
class Outcome:
    """Of a run."""

    readings: list[Reading]
    seconds: float
    """Of its steps alone."""
    steps: int

    @property
    def last(self) -> Reading:
        return self.readings[-1]


def play(job: Job) -> Outcome:
    """Bitwise the same for the same job.

    Raises:
        BadInput: a verifier that pays no number, or all answers of the first step alike.
    """
    with seeded(job.seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The penalty is")  # strong ones are tried too
        return _play(job)


def _play(job: Job) -> Outcome:
    policy, reference = start(job.seed), start(job.seed).eval()
    rate = job.rate * (job.value if job.arm == "smaller rate" else 1.0)
    optimizer = torch.optim.AdamW(policy.parameters(), rate, weight_decay=0.0)
    step = step_of(job.arm, job.value, policy)
    dice = torch.Generator().manual_seed(job.seed)
    held = prompts(job.asked, job.prompts)
    every = max(1, job.steps // job.readings)
    readings, seconds, taken = [read(policy, reference, held, job, 0)], 0.0, 0
    for k in range(1, job.steps + 1):
        since = time.perf_counter()
        asked = prompts(job.groups, (job.seed + 1) * 1_000_003 + k).repeated(job.answers)
        given = answers(policy, asked, dice)
        reward = _paid(job.game, asked, given)
        if k == 1 and bool((reward == reward[0]).all()):
            raise BadInput(f"the verifier must pay some answers more than others, and pays {reward[0]:g} for each.")
        advantage = advantages(reward, job.answers)
        optimizer.zero_grad()
        step(partial(loss, policy, reference, asked, given, advantage, job))
        optimizer.step()
        seconds += time.perf_counter() - since
        taken = k
        is_over = job.arm == "early stop" and reward.mean().item() >= job.value
        if k % every == 0 or k == job.steps or is_over:
            readings.append(read(policy, reference, held, job, k))
        if is_over:
            break
    return Outcome(readings, seconds, taken)


def _paid(game: str, asked: Prompts, given: Tensor) -> Tensor:
    found = paid(asked, given, WORTH.get(game, 0.0))
    if not bool(found.isfinite().all()):
        raise BadInput(f"the verifier must pay a finite number for each answer, got {found[~found.isfinite()][0]:g}.")
    return found


def advantages(reward: Tensor, answers: int) -> Tensor:
    """Within each group of answers to one prompt."""
    groups = reward.view(-1, answers)
    spread = groups.std(1, keepdim=True) + 1e-4
    return ((groups - groups.mean(1, keepdim=True)) / spread).flatten()


def loss(policy: nn.Module, reference: nn.Module, asked: Prompts, given: Tensor, advantage: Tensor, job: Job) -> Tensor:
    """Of GRPO, and of the divergence of an arm that has one."""
    log_now, is_there = log_likelihood(policy, asked, given)
    chosen = log_now.gather(2, given[:, :, None])[:, :, 0]
    count = is_there.sum()
    total = -(advantage[:, None] * chosen * is_there).sum() / count
    if job.arm in ("KL", "χ²"):
        with torch.no_grad():
            log_start, _ = log_likelihood(reference, asked, given)
        total = total + job.value * (divergence(job.arm, log_now, log_start) * is_there).sum() / count
    return total


@torch.no_grad()
def read(policy: nn.Module, reference: nn.Module, asked: Prompts, job: Job, step: int) -> Reading:
    """By answers that are drawn with the same random numbers in all readings."""
    given = answers(policy, asked, torch.Generator().manual_seed(job.prompts))
    log_now, is_there = log_likelihood(policy, asked, given)
    log_start, _ = log_likelihood(reference, asked, given)
    away = (divergence("KL", log_now, log_start) * is_there).sum(1).mean().item()
    true = honest(asked, given).float().mean().item()
    return Reading(step, true, _paid(job.game, asked, given).mean().item(), hacks(given).float().mean().item(), away)


def on_test(job: Job, seed: int) -> Job:
    """The same, read on test prompts."""
    return replace(job, seed=seed, prompts=TEST)
