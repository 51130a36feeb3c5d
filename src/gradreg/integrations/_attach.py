"""The penalty in a live trainer that somebody else's code has made: no subclass, no arguments class.

The trainer stays the object that others hold, and is given a class made of the mixin and its own: what the mixin does
is then done by the mixin, in the order of its methods. The class keeps the name of the trainer's own, since there are
hosts that decide by it, and can be pickled by what it was made of.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from transformers import Trainer

from gradreg.integrations._policy import PolicyRegularizationMixin
from gradreg.integrations._replay import check_one_replay
from gradreg.integrations._trainer import GradientRegularizationMixin
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import Schedule

POLICIES = ("_get_per_token_logps_and_entropies", "_get_per_token_logps")
"""What GRPO and its kin ask for their loss, in TRL now and before, whatever their class is called."""

ELSEWHERE = {  # fields of RegularizationArguments, and what they are where there are no such arguments
    "gamma_warmup_steps": "gamma=gradreg.warmup(gamma, steps)",
    "penalty_cap": "cap=...",
    "target_penalty_ratio": "gamma=gradreg.TargetRatio(ratio)",
    "gr_epsilon": "epsilon=..., which is ε here also where a config has another epsilon",
}


def attach(trainer: Any, gamma: Schedule | None = None, epsilon: Schedule | None = None, **options: Any) -> None:
    r"""Make a live trainer minimize $L + \frac\gamma2 \|\nabla L\|^2$: `transformers.Trainer`, or any child of it.

    $$\hat g = g_1 + \tfrac\gamma\epsilon (g_2 - g_1), \; g_1 = \nabla L(\theta), g_2 = \nabla L(\theta + \epsilon d)$$

    Call it once the trainer is made and before `train()`. It needs no subclass and no arguments class, and does what
    `GradientRegularizationMixin` does, by the same code: every accumulation window is replayed as a whole, clipping
    and the optimizer's step follow, logs and checkpoints hold what is measured. The trainer stays the same object, of
    a class that is a child of the mixin and of its own, with the name of its own. Where it asks for log-probabilities
    as GRPO does, the old ones are pinned, and embeddings and output head are excluded unless `exclude` is given.

    The regularizer is `trainer.regularizer`. A trainer that counts things in its steps, as ms-swift does in
    `custom_metrics`, is told to count the first pass alone by `trainer.bookkeeping += ("custom_metrics",)`.

    Args:
        trainer: the trainer. The hook where a host lets one call this is shown in docs/hosts.md.
        gamma: strength γ ≥ 0, a number, a function of the step (a window is one step) or a `TargetRatio`; None is
            `TargetRatio()`.
        epsilon: step length ε > 0, a number or a function of the step; None is one that suits the ascent.
        options: of `GradientRegularizer`: scheme (`forward` or `backward`), ascent, include, exclude, cap, nonfinite.

    Raises:
        TypeError: no `Trainer`, or an option that `GradientRegularizer` does not have.
        ValueError: whatever `GradientRegularizationMixin` and `GradientRegularizer` refuse, and schemes of several
            replays.
        RuntimeError: a trainer that is not made yet, that trains or has trained, that has a penalty already, or one
            of whose methods was replaced on the instance. After every error the trainer is what it was.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> import contextlib, io, tempfile, torch
        >>> from transformers import TrainingArguments
        >>> class Line(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.ones(()))
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.slope * x - labels).square().mean() / 2}
        >>> data = [{"x": torch.tensor(1.0), "labels": torch.tensor(0.0)}] * 2
        >>> args = TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=1, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        ...     max_grad_norm=0, report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        ...     save_strategy="no", logging_strategy="no",
        ... )
        >>> trainer = Trainer(Line(), args, train_dataset=data)
        >>> attach(trainer, gamma=0.5, epsilon=0.1)
        >>> with contextlib.redirect_stdout(io.StringIO()):  # the host prints
        ...     result = trainer.train()
        >>> round(trainer.model.slope.item(), 4)  # the Hessian is 1, so ĝ = (1 + γ) g1 = 1.5
        0.85
    """
    _check_trainer(trainer)
    for name in options:
        if name in ELSEWHERE:
            raise TypeError(f"{name} is a field of arguments classes; attach takes {ELSEWHERE[name]}.")
    check_one_replay(options, "a loop of your own and gradreg.GradientRegularizer.backward(loss_fn, batches)")
    kind, attributes = type(trainer), dict(vars(trainer))
    try:
        trainer.__class__ = _regularized(kind)
        trainer._regularizer_options = {"gamma": gamma, "epsilon": epsilon, **options}
        trainer._take_up()
    except BaseException:
        trainer.__class__ = kind
        vars(trainer).clear()
        vars(trainer).update(attributes)
        raise


class _Attached(GradientRegularizationMixin):
    """The mixin with options in the place of arguments."""

    _regularizer_options: dict[str, Any]

    def create_regularizer(self, model: Any) -> GradientRegularizer:
        options = dict(self._regularizer_options)
        if options.get("exclude") is None:
            options["exclude"] = self.default_exclude(model)
        return GradientRegularizer(model, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the trainer's own class: the one made here has no place in a module where pickle could find it."""
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        kind = vars(type(self)).get("_host")
        return reduced if kind is None else (_blank, (kind,), *reduced[2:])


class _AttachedToPolicy(_Attached, PolicyRegularizationMixin):
    pass


@functools.cache
def _regularized(kind: type) -> type:
    """The class of a trainer of this kind with the penalty."""
    mixin = _AttachedToPolicy if any(hasattr(kind, name) for name in POLICIES) else _Attached
    namespace = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return types.new_class(kind.__name__, (mixin, kind), exec_body=lambda n: n.update(namespace, _host=kind))


def _blank(kind: type) -> Any:
    made: Any = _regularized(kind)
    return made.__new__(made)


def _check_trainer(trainer: Any) -> None:
    """Refuse what is no trainer, or not in the state to be given another class."""
    if not isinstance(trainer, Trainer):
        hint = {
            "lightning": "for Lightning there is gradreg.integrations.lightning.GradientRegularization",
            "accelerate": "for accelerate there is gradreg.integrations.accelerate.AcceleratedRegularizer",
        }.get(type(trainer).__module__.split(".")[0], "for a loop of your own there is gradreg.GradientRegularizer")
        raise TypeError(f"trainer must be a live transformers.Trainer or a child of it, got {_named(trainer)}: {hint}.")
    name = type(trainer).__name__
    if isinstance(trainer, GradientRegularizationMixin):
        raise RuntimeError(
            f"trainer is regularized already, as a {name} with {trainer.regularizer!r}: attach once, and not to a "
            "trainer of a regularized class."
        )
    state = getattr(trainer, "state", None)
    if state is None or not hasattr(trainer, "is_in_train"):
        raise RuntimeError(
            f"trainer is a {name} whose __init__ has not run yet: attach when it has, at the earliest in on_init_end "
            "of a callback."
        )
    if trainer.is_in_train or state.global_step > 0:
        raise RuntimeError(
            f"trainer has begun to train (step {state.global_step}): attach before train(). To go on from here with "
            "the penalty save a checkpoint, make a new trainer, attach, and resume from it."
        )
    replaced = sorted(name for name in vars(trainer) if callable(getattr(PolicyRegularizationMixin, name, None)))
    if replaced:
        raise RuntimeError(
            f"{', '.join(replaced)} of the trainer was replaced on the instance, which would go past the penalty: "
            "attach first, and replace it then by what calls the one that is there."
        )


def _named(value: Any) -> str:
    return f"the class {value.__name__}, which is to be made first" if isinstance(value, type) else type(value).__name__
