"""TRL: `GRPOTrainer` becomes `RegularizedGRPOTrainer`, `GRPOConfig` becomes `RegularizedGRPOConfig`.

    args = RegularizedGRPOConfig("out", gamma=1e-3, gr_epsilon=1e-2, penalty_cap=5.0, ...)
    RegularizedGRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts).train()

In language-model post-training the penalty takes the place of the KL term (`beta=0`) as a guard against reward hacking
(Ackermann, arXiv 2602.18037). For the other trainers of TRL, see `GradientRegularizationMixin`. Tested with TRL 1.16
and transformers 5.23; see docs/hosts.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gradreg._install import how

try:
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]
except ImportError as error:
    raise ImportError(f"gradreg.integrations.trl needs trl: {how('trl')}") from error

from gradreg.integrations._arguments import CommonArguments, RegularizationArguments, is_positive
from gradreg.integrations._policy import PolicyRegularizationMixin, embeddings_and_head
from gradreg.integrations._trainer import GradientRegularizationMixin

__all__ = [
    "GradientRegularizationMixin",
    "PolicyRegularizationMixin",
    "RegularizationArguments",
    "RegularizedGRPOConfig",
    "RegularizedGRPOTrainer",
    "TRLRegularizationArguments",
    "embeddings_and_head",
]


@dataclass
class TRLRegularizationArguments(CommonArguments):
    """`RegularizationArguments` for a config whose `epsilon` is a clipping range (GRPO, RLOO): ours is `gr_epsilon`.

    Raises:
        ValueError: no `gr_epsilon`, or one that is not a finite number > 0.
    """

    gr_epsilon: float | None = field(default=None, metadata={"help": "Step length ε > 0 along the ascent. Required."})

    @property
    def displacement_epsilon(self) -> float:
        assert self.gr_epsilon is not None
        return self.gr_epsilon

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gr_epsilon is None:
            raise ValueError(
                "gr_epsilon must be given: it is the step length ε of the displacement. `epsilon` here is the "
                "clipping range of the policy ratio, and stays so."
            )
        if not is_positive(self.gr_epsilon):
            raise ValueError(
                f"gr_epsilon must be a finite number > 0, got {self.gr_epsilon!r}. For the backward difference pass "
                'scheme="backward"; for no penalty, gamma=0.'
            )


@dataclass
class RegularizedGRPOConfig(TRLRegularizationArguments, GRPOConfig):
    """`GRPOConfig` with gamma, gr_epsilon, scheme, ascent, include, exclude, gamma_warmup_steps, penalty_cap and
    target_penalty_ratio.

    γ has a scale: the same number is a ratio ‖ĝ − g1‖/‖g1‖ of 0.01 in one run and of 28 in another. Watch
    `penalty_ratio` in the logs, or give `target_penalty_ratio` (about 0.3), which γ then follows: see
    `gradreg.TargetRatio`, which is also what no γ means. `penalty_cap` bounds the ratio of every step; do not clip g1
    for that.
    """


class RegularizedGRPOTrainer(PolicyRegularizationMixin, GRPOTrainer):
    r"""`trl.GRPOTrainer` that minimizes $L + \frac\gamma2 \|\nabla L\|^2$ on the rollouts of each window.

    The second pass sees the same generations, rewards and advantages: nothing is generated twice. What the loss takes
    from the weights as if it were data is that of θ: the old log-probabilities, where TRL leaves them to be those of
    the present weights (else the policy ratio would be 1 at every point), and the mask of high-entropy tokens.
    Embeddings and output head keep g1 unless `exclude` says otherwise. A batch whose advantages are all zero has no
    gradient: it is counted in `skipped_steps` and leaves the weights as they are.

    Raises:
        ValueError: an adaptive entropy coefficient, which changes between the passes; and as
            `GradientRegularizationMixin`.
        RuntimeError: a version of TRL whose log-probabilities cannot be pinned.

    References:
        Ackermann et al., [arXiv 2602.18037](https://arxiv.org/abs/2602.18037), 2026.
    """
