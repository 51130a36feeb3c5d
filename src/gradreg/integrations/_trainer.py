"""The mixin: a second pass inside `transformers.Trainer`, and what is built on it.

The Trainer runs `training_step` once for each micro-batch of an accumulation window, and after the last one clips and
steps. There, and nowhere else, is g1 whole and unclipped. So every micro-batch is kept as `_prepare_inputs` returned
it, together with the number of items that the loss was divided by; and when the last one has run, the door is opened
and `training_step` runs once more for each of them, with `_prepare_inputs` answering from memory. Whatever the host
does to a loss (autocast, normalization, scaling) it thus does twice alike. Names with an underscore are the host's:
they have been stable since 4.50 and TRL overrides them too, but read here with transformers 5.23.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback

from gradreg.integrations._arguments import check_arguments, check_host, make_regularizer
from gradreg.integrations._versions import check_versions
from gradreg.training.block import Block
from gradreg.training.regularizer import GradientRegularizer
from gradreg.training.replay import RandomState
from gradreg.training.schedule import value_at

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

STATE_FILE = "gradreg.json"


@dataclass
class MicroBatch:
    """What one call of `training_step` made its loss from."""

    inputs: Any  # as `_prepare_inputs` returned them: `compute_loss` may take labels out of its own copy
    num_items_in_batch: Any
    num_steps: int  # micro-batches that the host divides a mean by
    random: RandomState  # where `compute_loss` began


class _Witness(TrainerCallback):
    """Before a step of the optimizer, asks whether the window went through the mixin at all."""

    def __init__(self, trainer: GradientRegularizationMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs
        if not self._trainer.has_run_window:
            raise RuntimeError(
                f"training_step of {type(self._trainer).__name__} did not call that of GradientRegularizationMixin, so "
                "the step would have no penalty: return super().training_step(model, inputs, num_items_in_batch) in it."
            )
        self._trainer.has_run_window = False


class GradientRegularizationMixin(Trainer):
    """Makes ĝ = g1 + (γ/ε)(g2 − g1) of each accumulation window, before clipping and the optimizer's step.

    Put it before a trainer that runs its loss through `Trainer.training_step`; its arguments need the fields of
    `RegularizationArguments`:

        class RegularizedSFTTrainer(GradientRegularizationMixin, SFTTrainer): ...
        class RegularizedSFTConfig(RegularizationArguments, SFTConfig): ...

    A trainer that is made already is given the mixin by `attach` (_attach.py).

    The regularizer is `trainer.regularizer`. Logs get `penalty_ratio`, `realized` (the share of the displacement
    that rounding left), `gradreg_grad_norm` (‖g1‖), `gradreg_penalty_norm` (‖ĝ − g1‖) and `skipped_steps`, measured
    in one step since the last log; the host's `grad_norm` is ‖ĝ‖. Checkpoints hold the regularizer's state in
    `gradreg.json`.

    Raises:
        TypeError: arguments without the fields; on declaring a class, a trainer that stands before the mixin.
        ValueError: DeepSpeed, FSDP1, FSDP that accelerate would ignore, nn.DataParallel, tensor, context or sequence
            parallelism, and optimizers that step inside the backward pass; a loss that runs the model in its backward
            pass alone; whatever `GradientRegularizer` refuses.
        RuntimeError: a host without a method that the second pass stands on; a `training_step` that does not call
            `_prepare_inputs` exactly once, or one of a subclass that does not call the mixin's.
    """

    # What a step counts for its logs; during the second pass a copy counts instead. Extend it if yours counts more.
    bookkeeping: tuple[str, ...] = (
        *("_metrics", "_step", "_current_train_step_time", "_total_train_tokens"),  # TRL
        "accum_loss_components",  # sentence-transformers
    )

    has_run_window = False  # since the last step of the optimizer
    _is_recording = False
    _replayed: MicroBatch | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if issubclass(base, GradientRegularizationMixin):
                return
            if hasattr(base, "training_step"):  # the mixin behind it would never be asked
                raise TypeError(
                    f"{cls.__name__} must name GradientRegularizationMixin before {base.__name__}, or it would train "
                    f"without the penalty: class {cls.__name__}(GradientRegularizationMixin, {base.__name__})."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_arguments(self)
        self._take_up()

    def _take_up(self) -> None:
        """What there is to do once the host has been made; if it refuses, nothing of the host has changed."""
        check_versions(self)
        self._check_host()
        self._window: list[MicroBatch] = []
        self.regularizer = self.create_regularizer(self.model)
        self.add_callback(_Witness(self))

    def _check_host(self) -> None:
        """Refuse what cannot be served; asked again when training starts, since settings may have changed."""
        check_host(self)

    def create_regularizer(self, model: Any) -> GradientRegularizer:
        """The regularizer of a model, wrapped or not; override it for schedules, module types or another ascent."""
        return make_regularizer(model, self.args, self.default_exclude(model))

    def default_exclude(self, model: nn.Module) -> Sequence[str]:
        """What is not penalized where `exclude` is None."""
        del model
        return ()

    def pin(self, micro_batch: MicroBatch) -> None:
        """Keep what `compute_loss` took from the weights at θ as if it were data; called after each first pass."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """What `train` runs, and runs again with a smaller batch under `auto_find_batch_size`."""
        self._check_host()
        self._window.clear()
        self.regularizer = self.create_regularizer(self.model)  # a new run starts at step 0, as the host's does
        return super()._inner_training_loop(*args, **kwargs)

    # The two passes.

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.regularizer.model is not model:  # the host has wrapped it since, or made another
            state = self.regularizer_state()
            self.regularizer = self.create_regularizer(model)
            self.load_regularizer_state(state)
        is_active = value_at(self.regularizer.gamma, self.regularizer.step) != 0
        try:
            with self._recording(num_items_in_batch) if is_active else nullcontext():
                loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                if is_active:
                    self._second_pass(model)
                else:
                    self.regularizer.step += 1  # what would have been a second pass
                self.has_run_window = True
                self._window.clear()
        except BaseException:
            self._window.clear()
            raise
        return loss

    @contextmanager
    def _recording(self, num_items_in_batch: Any) -> Iterator[None]:
        self._is_recording = True
        before = len(self._window)
        try:
            yield
        finally:
            self._is_recording = False
        if len(self._window) != before + 1:
            raise RuntimeError(
                f"training_step of {type(self).__name__} called _prepare_inputs {len(self._window) - before} times, "
                "and must do so once: the inputs that it returns are those of the second pass."
            )
        self._window[-1].num_items_in_batch = num_items_in_batch
        self.pin(self._window[-1])

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self._replayed is not None:
            self._replayed.random.restore()
            return copy.copy(self._replayed.inputs)
        inputs = super()._prepare_inputs(inputs)
        if self._is_recording:
            devices = [] if self.args.device.type == "cpu" else [self.args.device]
            num_steps = getattr(self, "current_gradient_accumulation_steps", 1)
            self._window.append(MicroBatch(copy.copy(inputs), None, num_steps, RandomState(devices)))
        return inputs

    def _second_pass(self, model: nn.Module) -> None:
        if not self.regularizer._engine.watch.has_seen:
            raise ValueError(
                f"the loss of {type(self).__name__} ran the model within its backward pass alone, as losses do that "
                "cache gradients (GradCache), and where such a pass begins is not known here: use the loss without "
                "the cache, or a loop of your own and gradreg.GradientRegularizer.backward(loss_fn)."
            )
        scaler = self.accelerator.scaler  # of fp16: `.grad` and the replayed losses carry its scale
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        num_steps = getattr(self, "current_gradient_accumulation_steps", 1)
        with Block(self.regularizer, scale, replays_random_numbers=True), self._scratch():
            try:
                for k, micro_batch in enumerate(self._window, 1):
                    is_last = k == len(self._window)
                    with nullcontext() if is_last else self.accelerator.no_sync(model):
                        self._replayed = micro_batch
                        self.current_gradient_accumulation_steps = micro_batch.num_steps
                        super().training_step(model, copy.copy(micro_batch.inputs), micro_batch.num_items_in_batch)
            finally:
                self._replayed = None
                self.current_gradient_accumulation_steps = num_steps

    @contextmanager
    def _scratch(self) -> Iterator[None]:
        """Metrics of the displaced pass go into a copy that nobody reads."""
        kept = {name: getattr(self, name) for name in self.bookkeeping if hasattr(self, name)}
        for name, value in kept.items():
            setattr(self, name, copy.deepcopy(value))
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    # What is logged and saved.

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(measured(self.regularizer))
        super().log(logs, *args, **kwargs)

    def regularizer_state(self) -> dict[str, Any]:
        """The regularizer's step and counters, and what a γ that follows a target has measured."""
        return self.regularizer.state_dict()

    def load_regularizer_state(self, state: dict[str, Any]) -> None:
        """Take up what `regularizer_state` gave.

        Raises:
            ValueError: missing or unknown keys, or values that no state has; nothing is changed.
        """
        self.regularizer.load_state_dict(state)

    # The folder of a checkpoint is known to these two alone; no callback is told which one a run resumes from.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            with open(os.path.join(output_dir, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump(self.regularizer_state(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint, STATE_FILE) if checkpoint is not None else ""
        if os.path.isfile(path):  # else: of a run without the penalty, which begins now
            with open(path, "rb") as file:
                content = file.read()
            try:
                state = json.loads(content)
            except ValueError:
                state = None
            if not isinstance(state, dict):
                raise ValueError(
                    f"{path} must be a JSON object, the regularizer's state; resume from another checkpoint."
                )
            self.load_regularizer_state(state)


def measured(regularizer: GradientRegularizer) -> dict[str, float]:
    """What is logged of the last step with γ > 0, as far as it was measured; waits for an accelerator."""
    found: dict[str, Any] = regularizer.diagnostics()
    norm, ratio = found["grad_norm"], found["penalty_ratio"]
    tensors = {
        "penalty_ratio": ratio,
        "realized": found["realized"].cosine * found["realized"].norm,
        "gradreg_grad_norm": norm,
        "gradreg_penalty_norm": ratio * norm,
        "skipped_steps": found["skipped_steps"],
    }
    values = {name: value.item() for name, value in tensors.items()}
    if "gamma" in found:  # one that follows a target
        values["gamma"] = found["gamma"].item()
    return {name: value for name, value in values.items() if not math.isnan(value)}  # NaN: nothing measured yet
