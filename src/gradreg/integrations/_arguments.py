"""The arguments of a regularized trainer."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer

from gradreg._vectors import is_sharded
from gradreg.training.defaults import default_gamma
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.schedule import Schedule, warmup
from gradreg.training.target import TargetRatio


def is_positive(value: Any) -> bool:
    """Whether this is a finite number > 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@dataclass
class CommonArguments:
    """Every argument but ε, whose name some trainers have taken for something else."""

    gamma: float | None = field(
        default=None,
        metadata={
            "help": "Strength γ ≥ 0 of the penalty γ/2 ‖∇L‖²; 0 runs no second pass, None finds γ by a penalty ratio."
        },
    )
    scheme: str = field(default="forward", metadata={"help": "'forward' or 'backward' difference."})
    ascent: str = field(default="gradient", metadata={"help": "'gradient', 'normalized' (SAM) or 'adaptive' (ASAM)."})
    include: list[str] | None = field(
        default=None, metadata={"help": "Shell-style patterns over parameter names to penalize; None takes all."}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Patterns taken away again; None is the trainer's default, [] is nothing."}
    )
    gamma_warmup_steps: int = field(default=0, metadata={"help": "Steps in which γ rises linearly from 0."})
    penalty_cap: float | None = field(default=None, metadata={"help": "The largest ‖ĝ − g1‖/‖g1‖, or None."})
    target_penalty_ratio: float | None = field(
        default=None,
        metadata={"help": "Turn γ, from `gamma` on if it is given, until ‖ĝ − g1‖/‖g1‖ is about this; at most γ = ε."},
    )

    @property
    def displacement_epsilon(self) -> float | None:
        """ε, the step length along the ascent; None where the library chooses it."""
        raise NotImplementedError

    def get_process_log_level(self) -> Any:
        """As the host's. Every Trainer asks this when it is made; one without the mixin would ignore the fields above.

        Raises:
            TypeError: such a trainer, where γ is not 0.
        """
        asking = sys._getframe(1).f_locals.get("self")
        if self.gamma != 0 and isinstance(asking, Trainer) and not hasattr(asking, "regularizer_state"):
            name, mine = type(asking).__name__, type(self).__name__
            raise TypeError(
                f"{name} would ignore gamma and epsilon of {mine} and train without the penalty: make it a class "
                f"{name}(GradientRegularizationMixin, {name}), or give it the arguments that {mine} is made from and "
                "call gradreg.integrations.transformers.attach(trainer, gamma, epsilon). For no penalty, gamma=0."
            )
        host: Any = super()
        return host.get_process_log_level()

    def __post_init__(self) -> None:
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        if self.scheme not in ("forward", "backward"):
            raise ValueError(
                f'scheme must be "forward" or "backward", got {self.scheme!r}: the window is replayed once, which '
                "serves no other scheme. For those use a loop of your own and GradientRegularizer.backward."
            )
        steps = self.gamma_warmup_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"gamma_warmup_steps must be an integer ≥ 0 (0: γ from the first step on), got {steps!r}.")
        target, cap = self.target_penalty_ratio, self.penalty_cap
        for name, value in (("target_penalty_ratio", target), ("penalty_cap", cap)):
            if value is not None and not is_positive(value):
                raise ValueError(f"{name} must be a finite number > 0, or None for none, got {value!r}.")
        if target is not None and cap is not None and cap < target:
            raise ValueError(
                f"target_penalty_ratio must not exceed penalty_cap, got {target} and {cap}: it would never be met."
            )
        if target is not None and self.gamma == 0:
            raise ValueError(
                "target_penalty_ratio begins at gamma, so gamma must be > 0, or None for a small one, got 0."
            )


@dataclass
class RegularizationArguments(CommonArguments):
    """For a trainer whose arguments have no `epsilon`: `class MyArguments(RegularizationArguments, Theirs)`.

    Raises:
        TypeError: on construction, where the other class has an `epsilon`, which this one would overwrite.
    """

    epsilon: float | None = field(
        default=None, metadata={"help": "Step length ε > 0 along the ascent; None is one that suits the ascent."}
    )

    @property
    def displacement_epsilon(self) -> float | None:
        return self.epsilon

    def __post_init__(self) -> None:
        for kind in type(self).__mro__:
            if "epsilon" in vars(kind) and not issubclass(kind, RegularizationArguments):
                raise TypeError(
                    f"{kind.__name__} has an epsilon that means something else: instead of "
                    "RegularizationArguments inherit from TRLRegularizationArguments (gradreg.integrations.trl), and "
                    "give ε as gr_epsilon."
                )
        super().__post_init__()


def make_regularizer(model: Any, args: Any, default_exclude: Sequence[str], **options: Any) -> GradientRegularizer:
    """The regularizer that the arguments describe, with options that they do not have."""
    steps, target = args.gamma_warmup_steps, args.target_penalty_ratio
    if target is not None:
        gamma: Schedule = TargetRatio(target, ramp=steps, start=args.gamma)
    elif args.gamma is None:
        gamma = TargetRatio(ramp=steps) if steps else default_gamma()
    else:
        gamma = warmup(args.gamma, steps) if steps else args.gamma
    return GradientRegularizer(
        model,
        gamma,
        args.displacement_epsilon,
        scheme=args.scheme,
        ascent=args.ascent,
        include=args.include,
        exclude=default_exclude if args.exclude is None else args.exclude,
        cap=args.penalty_cap,
        **options,
    )


def check_arguments(trainer: Any) -> None:
    """Refuse arguments without the fields above.

    Raises:
        TypeError: such arguments.
    """
    if not issubclass(type(trainer.args), CommonArguments):
        raise TypeError(
            f"args must have gamma, epsilon and the other fields of RegularizationArguments, got "
            f"{type(trainer.args).__name__}: pass RegularizedTrainingArguments or RegularizedGRPOConfig, inherit from "
            "both, or leave args and the trainer's class as they are and call "
            "gradreg.integrations.transformers.attach(trainer, gamma, epsilon)."
        )


def check_host(trainer: Any) -> None:
    """Refuse the settings under which the two passes would differ, or under which there is no gradient to replace.

    Raises:
        ValueError: a setting that is not supported.
    """
    args, accelerator = trainer.args, trainer.accelerator
    version = getattr(getattr(accelerator.state, "fsdp_plugin", None), "fsdp_version", None)
    optimizer = str(getattr(args.optim, "value", args.optim))
    refused = {
        "deepspeed": (
            trainer.is_deepspeed_enabled,
            "its engine owns weights and gradients; use DistributedDataParallel or FSDP2",
        ),
        "fsdp_config": (
            trainer.is_fsdp_enabled and version != 2,
            'FSDP1 flattens parameters; set {"version": 2}',
        ),
        "fsdp": (
            bool(getattr(args, "fsdp", None)) and not trainer.is_fsdp_enabled,
            "accelerate shards on accelerators only, and would silently train under DistributedDataParallel here; on "
            "CPUs leave it out, or shard with from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=n))",
        ),
        "parallelism_config": (
            getattr(args, "parallelism_config", None) is not None,
            "tensor, context and sequence parallelism are not tested; use data parallelism",
        ),
        "n_gpu": (
            args.n_gpu > 1,
            "nn.DataParallel draws dropout masks on devices that are not replayed; launch with torchrun, or make one "
            "GPU visible",
        ),
        "optim": (
            "lomo" in optimizer or optimizer.endswith("layerwise"),
            f"{optimizer} moves the weights inside the first backward pass; use one that steps after it",
        ),
    }
    refused["distributed_config"] = _sharded_when_loaded(trainer.model)
    for setting, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{setting} is not supported by {type(trainer).__name__}: {reason}.")


def _sharded_when_loaded(model: Any) -> tuple[bool, str]:
    """Whether a model that `from_pretrained(distributed_config=...)` has sharded cannot be served, and why."""
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return False, ""
    config = model.config.distributed_config
    if max(config.tp_size, config.pp_size, config.ep_size) > 1:
        return True, "tensor, pipeline and expert parallelism are not tested; use fsdp_size alone"
    if model.all_tied_weights_keys:
        return True, (
            "transformers 5.23 computes with old weights after they moved, where weights are tied and sharded at "
            'loading; shard with fsdp_config={"version": 2}, or untie them'
        )
    if not all(is_sharded(p) for p in model.parameters() if p.requires_grad):
        return True, (
            "trainable parameters outside of the shards (adapters) are not tested; shard them too, with "
            'fsdp_config={"version": 2}'
        )
    return False, ""
