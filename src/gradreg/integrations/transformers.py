"""transformers: `Trainer` becomes `RegularizedTrainer`, and its arguments `RegularizedTrainingArguments`.

    trainer = RegularizedTrainer(model, RegularizedTrainingArguments("out", ...), train_dataset=dataset)
    trainer.train()

A trainer that somebody else's code has made is given the penalty by `attach(trainer, gamma, epsilon)`.

Tested with transformers 5.23 and accelerate 1.15; see docs/hosts.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradreg._install import how

try:
    from transformers import Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"gradreg.integrations.transformers needs transformers and accelerate: {how('transformers')}"
    ) from error

from gradreg.integrations._arguments import RegularizationArguments
from gradreg.integrations._attach import attach
from gradreg.integrations._trainer import GradientRegularizationMixin

__all__ = [
    "GradientRegularizationMixin",
    "RegularizationArguments",
    "RegularizedTrainer",
    "RegularizedTrainingArguments",
    "attach",
]


@dataclass
class RegularizedTrainingArguments(RegularizationArguments, TrainingArguments):
    """`TrainingArguments` with gamma, epsilon, scheme, ascent, include, exclude, gamma_warmup_steps, penalty_cap and
    target_penalty_ratio.

    Raises:
        ValueError: a scheme that needs more than one replay, or a ratio that the cap forbids.
    """


class RegularizedTrainer(GradientRegularizationMixin, Trainer):
    r"""`transformers.Trainer` that minimizes $L + \frac\gamma2 \|\nabla L\|^2$.

    Every accumulation window is replayed at θ + εd with the same inputs, `num_items_in_batch` and random state: the
    penalty is that of the whole window, as if it were one batch. Clipping and the optimizer's step follow, unchanged.
    Costs a second pass; γ = 0 costs nothing. See `GradientRegularizationMixin` for logs, checkpoints and what is
    refused.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> import contextlib, io, tempfile, torch
        >>> class Line(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.slope * x - labels).square().mean() / 2}
        >>> data = [{"x": torch.tensor(1.0), "labels": torch.tensor(0.0)}] * 2
        >>> args = RegularizedTrainingArguments(
        ...     tempfile.mkdtemp(), gamma=0.5, epsilon=0.1, max_steps=1, learning_rate=0.1, optim="sgd",
        ...     lr_scheduler_type="constant", max_grad_norm=0, report_to="none", disable_tqdm=True, use_cpu=True,
        ...     dataloader_pin_memory=False, save_strategy="no", logging_strategy="no",
        ... )
        >>> model = Line()
        >>> with contextlib.redirect_stdout(io.StringIO()):  # the host prints
        ...     result = RegularizedTrainer(model, args, train_dataset=data).train()
        >>> round(model.slope.item(), 4)  # the Hessian is 1, so ĝ = (1 + γ) g1 = 1.5
        0.85
    """
