"""What a training loop of the user's own is given: the settings of a run, and the method to attach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradreg.lab.attach import Attached, attach, options
from gradreg.lab.config import RunConfig


@dataclass(frozen=True)
class Run:
    """One run of a `Loop`, as its function sees it.

    Example:
        def train(run):
            model = MyNet()
            optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay)
            method = run.attach(model, optimizer, num_steps=run.epochs * len(loader))
            for batch in ...:
                optimizer.zero_grad()
                method.backward(loss_fn, [batch])
                optimizer.step()
            return {"validation": score(model, validation), "test": score(model, test)}
    """

    config: RunConfig
    scored_on: str
    """`validation` while settings are chosen, `test` at the end: the other score is not looked at."""

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate

    @property
    def weight_decay(self) -> float:
        return self.config.weight_decay

    @property
    def epochs(self) -> int:
        return self.config.epochs

    @property
    def batch_size(self) -> int:
        return self.config.batch_size

    @property
    def seed(self) -> int:
        """The global generators of torch, NumPy and Python have been seeded by it."""
        return self.config.seed

    @property
    def method(self) -> str:
        return self.config.method

    def attach(self, model: nn.Module, optimizer: Optimizer, num_steps: int) -> Attached:
        """The method of the run on a model: `.backward(loss_fn, [batch])` in the place of `loss.backward()`."""
        return attach(model, num_steps, self.config, optimizer)

    def options(self, num_steps: int, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """The method as arguments of `gradreg.GradientRegularizer`; γ is 0 for plain training.

        For a host that makes the regularizer itself: the Lightning callback, the Trainer mixin.

        Raises:
            BadInput: a method that is none, such as flooding.
        """
        return options(num_steps, self.config, optimizer)
