"""verl: a second `forward_backward_batch` in the step of the engine that trains the policy.

    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.fsdp_config._target_=gradreg.integrations.verl.RegularizedEngineConfig
    +actor_rollout_ref.actor.fsdp_config.gamma=1e-3
    +actor_rollout_ref.actor.fsdp_config.epsilon=1e-2

Every worker makes its engine's config before its engine. Making this one imports this file, and the file registers
engines that stand before verl's own for the device and vendor of this process. They are verl's unless the config is
this one, so that a reference policy beside the actor is what it was. There is no entry point of the group
`verl.plugins`: verl passes over the errors of plugins, and a run would go on without the penalty and without a word.

The engine's `train_batch` is `optimizer_zero_grad`, `forward_backward_batch` over all micro-batches of a mini-batch,
`optimizer_step`, which unscales, clips and steps. After the first `forward_backward_batch` of it `.grad` holds g1; it
runs once more at θ + εd, and `.grad` holds ĝ. Old log-probabilities and advantages come with the data.

Tested with verl 0.9.1 on the CPU; see docs/hosts.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gradreg._install import how

try:
    from verl import __version__ as version  # pyright: ignore
    from verl.utils.device import get_device_name, get_vendor  # pyright: ignore[reportMissingImports]
    from verl.workers.config import FSDPEngineConfig  # pyright: ignore[reportMissingImports]
    from verl.workers.engine import EngineRegistry  # pyright: ignore[reportMissingImports]
    from verl.workers.engine.fsdp import (  # pyright: ignore[reportMissingImports]
        FSDPEngineWithLMHead,
        FSDPTurboEngineWithLMHead,
    )
    from verl.workers.engine.fsdp.transformer_impl import (  # pyright: ignore[reportMissingImports]
        FSDPEngineWithValueHead,
    )
except ImportError as error:
    raise ImportError(f"gradreg.integrations.verl needs verl with its FSDP engine: {how('verl')}") from error

from gradreg.integrations._arguments import RegularizationArguments, make_regularizer
from gradreg.integrations._policy import embeddings_and_head
from gradreg.integrations._trainer import measured
from gradreg.integrations._versions import TESTED, is_tested
from gradreg.training.block import Block
from gradreg.training.check import State, check_same
from gradreg.training.notices import warn
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.replay import Moment
from gradreg.training.schedule import value_at

__all__ = ["RegularizedEngineConfig", "RegularizedFSDPEngine"]


@dataclass
class RegularizedEngineConfig(RegularizationArguments, FSDPEngineConfig):
    """verl's config of an FSDP engine with a penalty: the fields of `RegularizationArguments` beside its own.

    `exclude=None` spares the embeddings and the output head, `exclude=[]` nothing. A step is a mini-batch.
    """


class RegularizedEngine:
    """Stands before an FSDP engine of verl; with a `RegularizedEngineConfig` its `train_batch` makes ĝ.

    The regularizer is `engine.regularizer`. Losses that report metrics get `gradreg/penalty_ratio`, `gradreg/realized`,
    `gradreg/grad_norm` (‖g1‖), `gradreg/penalty_norm` (‖ĝ − g1‖), `gradreg/skipped_steps` and, where it follows a
    target, `gradreg/gamma`; the engine's own `grad_norm` is ‖ĝ‖. Its state is in the folder of verl's checkpoint, a
    file for each rank.

    Raises:
        ValueError: when the engine is made: FSDP1 and FSDP-Turbo, critics, Ulysses sequence parallelism,
            `offload_policy`, quantization-aware training; when the model is there: what `GradientRegularizer` refuses;
            in the first step with γ > 0: a loss that is another when it is asked again.
        RuntimeError: a step of the optimizer outside of `train_batch`, which would have no penalty.
    """

    regularizer: GradientRegularizer | None = None
    _is_training = False  # within train_batch
    _is_checked = False  # the loss was asked twice

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        self._is_asked = isinstance(engine_config, RegularizedEngineConfig) and not engine_config.forward_only
        if self._is_asked:
            _check(model_config, engine_config)
        host: Any = super()
        host.__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def initialize(self) -> None:
        host: Any = super()
        host.initialize()
        if self._is_asked:
            engine: Any = self
            spared = embeddings_and_head(engine.module)
            # The model's output is all logits of a micro-batch, too large to be kept; what is asked twice is the loss.
            self.regularizer = make_regularizer(engine.module, engine.engine_config, spared, replay_check=False)
            self.regularizer._engine.displacement.keeps_room = False  # between steps the memory is the rollout's
            self._is_checked = False

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        host: Any = super()
        self._is_training = True
        try:
            return host.train_batch(data, loss_function)
        finally:
            self._is_training = False

    def forward_backward_batch(self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False) -> Any:
        host: Any = super()
        regularizer = self.regularizer
        if regularizer is None or forward_only or not self._is_training:
            return host.forward_backward_batch(data, loss_function, forward_only)
        if value_at(regularizer.gamma, regularizer.step) == 0:
            outputs = host.forward_backward_batch(data, loss_function, forward_only)
            regularizer.step += 1  # what would have been a second pass
            return outputs
        regularizer._engine.follow()  # the engine may have moved the model between devices
        before = Moment(regularizer._engine.anatomy)
        outputs = host.forward_backward_batch(data, loss_function, forward_only)
        if not self._is_checked:
            self._ask_twice(data, loss_function, before)
        scaler = getattr(self, "scaler", None)  # of fp16
        with Block(regularizer, 1.0 if scaler is None else scaler.get_scale(), replays_random_numbers=True):
            before.restore()
            host.forward_backward_batch(data, loss_function, forward_only)
        self._is_checked = True
        engine: Any = self
        if engine.is_mp_src_rank_with_outputs() and outputs["metrics"]:  # else nobody reads them, as in SFT
            found = {f"gradreg/{name.removeprefix('gradreg_')}": value for name, value in measured(regularizer).items()}
            outputs["metrics"].update({name: [value] for name, value in found.items()})  # as of one micro-batch
        return outputs

    def _ask_twice(self, data: Any, loss_function: Callable[..., Any], before: Moment) -> None:
        """The loss and the log-probabilities at θ, twice from the same moment."""
        host: Any = super()
        assert self.regularizer is not None
        anatomy = self.regularizer._engine.anatomy
        after, state = Moment(anatomy), State((loss_function,), anatomy)
        answers = []
        try:
            for _ in range(2):
                before.restore()
                with torch.no_grad():
                    answers.append(_values(host.forward_backward_batch(data, loss_function, forward_only=True)))
        finally:
            after.restore()
        once, again = answers
        check_same(once, again, state, "the loss of a mini-batch")

    def optimizer_step(self) -> Any:
        host: Any = super()
        regularizer = self.regularizer
        if regularizer is not None and not self._is_training and value_at(regularizer.gamma, regularizer.step) != 0:
            raise RuntimeError(
                "optimizer_step was called outside of train_batch, and this step would have no penalty: workers that "
                "ask for gradients and steps one by one (Tinker's API) are not supported. Use train_batch, or "
                "verl.workers.config.FSDPEngineConfig for no penalty."
            )
        return host.optimizer_step()

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        host: Any = super()
        host.save_checkpoint(local_path, *args, **kwargs)
        if self.regularizer is not None and local_path is not None:
            with open(_state_file(local_path), "w", encoding="utf-8") as file:
                json.dump(self.regularizer.state_dict(), file)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        host: Any = super()
        host.load_checkpoint(local_path, *args, **kwargs)
        if self.regularizer is None or local_path is None:
            return
        path = _state_file(local_path)
        if os.path.isfile(path):  # else: of a run without the penalty, which begins now
            with open(path, encoding="utf-8") as file:
                self.regularizer.load_state_dict(json.load(file))


class RegularizedFSDPEngine(RegularizedEngine, FSDPEngineWithLMHead):
    """verl's FSDP engine of a language model, with the penalty."""


# These two are there to refuse: under the names of their backends verl's own would train without the penalty.


class _Critic(RegularizedEngine, FSDPEngineWithValueHead):
    pass


class _Turbo(RegularizedEngine, FSDPTurboEngineWithLMHead):
    pass


def _check(model_config: Any, config: Any) -> None:
    """Refuse what cannot be displaced, and what could not be tried.

    Raises:
        ValueError: naming the setting and the way out.
    """
    refused = {
        f"strategy={config.strategy}": (
            config.strategy != "fsdp2",
            "FSDP1 (fsdp, verl's default) flattens parameters, so that norms and displacements would be those of one "
            "rank's share; set actor_rollout_ref.actor.strategy=fsdp2, or engine.strategy=fsdp2 for SFT",
        ),
        f"model_type={model_config.model_type}": (
            model_config.model_type != "language_model",
            "critics are not tested; leave _target_ of critic.fsdp as it was",
        ),
        f"ulysses_sequence_parallel_size={config.ulysses_sequence_parallel_size}": (
            config.ulysses_sequence_parallel_size > 1,
            "sequence parallelism is not tested; set it to 1",
        ),
        "offload_policy=True": (
            config.offload_policy,
            "shards that live on the host are not tested; use param_offload and optimizer_offload, which bring them "
            "back before a step",
        ),
        "qat.enable=True": (
            config.qat.enable,
            "scales of quantized weights are kept until the optimizer steps, and would be those of θ in the displaced "
            "pass; train without",
        ),
    }
    for setting, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{setting} is not supported with a RegularizedEngineConfig: {reason}.")
    if not is_tested("verl", version):
        warn(
            f"gradreg was tested with verl {', '.join(TESTED['verl'])}, and not with {version}: install one of these, "
            "or check by yourself that gamma=0 is plain training and that gradreg/penalty_ratio in the metrics is what "
            "you expect."
        )


def _values(outputs: Any) -> list[torch.Tensor]:
    """Losses and model outputs as plain tensors."""
    made = [x.values() if x.is_nested else x for x in outputs["model_output"].values()]
    losses = torch.tensor(outputs["loss"], device=made[0].device if made else None)  # of an accelerator: to rounding
    return [losses, *made]


def _state_file(folder: str) -> str:
    return os.path.join(folder, f"gradreg_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.json")


def _register() -> None:
    """Stand before verl's own engines where it looks first, under the vendor of this process.

    Raises:
        RuntimeError: somebody else stands there.
    """
    device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
    engines = [
        ("language_model", ["fsdp", "fsdp2"], RegularizedFSDPEngine),
        ("language_model", ["fsdp_turbo"], _Turbo),
        ("value_model", ["fsdp", "fsdp2"], _Critic),
    ]
    for model_type, backends, engine in engines:
        try:
            EngineRegistry.register(model_type, backends, device, vendor)(engine)
        except AssertionError as error:
            raise RuntimeError(
                f"another package has registered an engine for {model_type}, {backends}, {device} and {vendor} with "
                "verl already, and gradreg's would never be asked: disable that plugin (VERL_USE_EXTERNAL_PLUGINS), or "
                "make an engine of both, class Both(gradreg.integrations.verl.RegularizedEngine, Theirs)."
            ) from error


_register()
