"""DeepSpeed: ZeRO-1 and 2, where gradients live in partitions and `.grad` is empty after a backward pass.

    regularizer = DeepSpeedRegularizer(engine)
    loss = regularizer.backward(lambda batch: criterion(engine(batch.x), batch.y), window)
    engine.step()  # unchanged: clipping, loss scale and the optimizer work on ĝ

Gradients are read and written by DeepSpeed's `safe_get_full_grad` and `safe_set_full_grad`. Both stages keep all
weights on every rank, so the second pass displaces these and puts them back; the fp32 masters never move. ZeRO-3
shards them and gathers them by private calls: refused. Tested with deepspeed 0.19.8 on the CPU; see docs/hosts.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradreg._install import how

try:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_grad
except ImportError as error:
    raise ImportError(f"gradreg.integrations.deepspeed needs deepspeed: {how('deepspeed')}") from error

from gradreg import _vectors as vectors
from gradreg.functional.ascents import Ascent, resolve_ascent
from gradreg.functional.schemes import Scheme, resolve_scheme
from gradreg.training.anatomy import Anatomy
from gradreg.training.calls import check_loss_fn, checked
from gradreg.training.defaults import default_epsilon, default_gamma
from gradreg.training.ranks import compare
from gradreg.training.replay import Moment
from gradreg.training.schedule import Schedule, Strength, check, name_of, strength_at
from gradreg.training.selection import Rules, Selection
from gradreg.training.target import Dial, target_in

__all__ = ["DeepSpeedRegularizer"]


class DeepSpeedRegularizer:
    r"""Minimizes $L + \frac\gamma2 \|\nabla L\|^2$ of each accumulation window, under ZeRO-1 or ZeRO-2.

    The loss of a window is DeepSpeed's: the sum over its micro-batches, each divided by `gradient_accumulation_steps`,
    averaged over ranks. Costs a second pass, and on every rank one full copy of weights and gradients beside the
    model, the gradients in float32. γ = 0 costs nothing.

    Args:
        engine: what `deepspeed.initialize` returned. The loss must call it.
        gamma: strength γ ≥ 0, a number, a function of the step (a window is one step) or a `TargetRatio`; None is
            `TargetRatio()`.
        epsilon: step length ε > 0, a number or a function of the step; None is one that suits the ascent.
        scheme: `forward` or `backward`.
        ascent: `gradient`, `normalized`, `adaptive`, or an `Ascent`.
        include: shell-style patterns over parameter names, module types, or predicates; None selects all.
        exclude: the same; taken away.

    Raises:
        TypeError: `engine` is no DeepSpeedEngine.
        ValueError: `zero_optimization.stage` other than 1 or 2, offloading, pipelines, tensor parallelism, experts,
            Muon, schemes of several replays, and rules, γ or ε that `GradientRegularizer` would refuse.
    """

    def __init__(
        self,
        engine: Any,
        gamma: Schedule | None = None,
        epsilon: Schedule | None = None,
        *,
        scheme: str | Scheme = "forward",
        ascent: str | Ascent = "gradient",
        include: Rules | None = None,
        exclude: Rules = (),
    ) -> None:
        gamma = default_gamma() if gamma is None else gamma
        epsilon = default_epsilon(ascent) if epsilon is None else epsilon
        check("gamma", gamma)
        check("epsilon", epsilon)
        self._scheme, self._ascent = resolve_scheme(scheme), resolve_ascent(ascent)
        if self._scheme.is_exact or len(self._scheme.stencil) > 1:
            raise ValueError(f'scheme="{self._scheme.name}" is not for DeepSpeed: use "forward" or "backward".')
        _check_engine(engine)
        self.engine = engine
        self.gamma, self.epsilon = gamma, epsilon
        rule = target_in(gamma)
        self._dial = None if rule is None else Dial(rule)
        self.selection = Selection(engine.module, include, exclude)
        self.step = 0
        self._have_agreed = False
        self._anatomy = Anatomy(engine.module)
        self._counts = {"active_steps": 0, "skipped_steps": 0}
        self._measured = {name: torch.tensor(torch.nan) for name in ("grad_norm", "penalty_ratio", "cosine")}

    def backward(self, loss_fn: Callable[[Any], Tensor], batches: Iterable[Any]) -> Tensor:
        """Run a window, leave ĝ in the partitions that `engine.step()` reads, and return L(θ), detached.

        Args:
            loss_fn: runs the engine's forward pass on a micro-batch and returns the loss, a scalar.
            batches: the micro-batches of the window. `engine.step()` follows once; it takes every window for whole,
                whatever `gradient_accumulation_steps` says.

        Raises:
            ValueError: an empty window, ranks that were built differently, a loss that is not a scalar or has no
                graph. Weights, buffers and random state are then what they were; gradients are to be discarded.
            TypeError: a loss in the place of its function, or a function that does not return a tensor.
        """
        check_loss_fn(loss_fn)
        window = list(batches)
        if not window:
            raise ValueError("batches must hold at least one micro-batch, got none.")
        if self._anatomy.follow():
            self.selection.read(self.engine.module)
        self._agree()
        find = strength_at if self._dial is None else self._dial.strength_at
        strength = find(self.gamma, self.epsilon, self.step)
        before = Moment(self._anatomy)
        try:
            loss = self._play(loss_fn, window)
            if strength is not None:
                self._regularize(lambda: self._play(loss_fn, window), strength, before)
                if self._dial is not None:  # gradients are whole on every rank, and so are their ratios
                    self._dial.follow(self._measured["penalty_ratio"] if self._dial.is_due else None)
        except BaseException:
            before.restore()
            raise
        self.step += 1
        return loss

    def _agree(self) -> None:
        """Compare the configuration with the other ranks', once."""
        if self._have_agreed:
            return
        self._have_agreed = True
        configuration = {
            "gamma": name_of(self.gamma),
            "epsilon": name_of(self.epsilon),
            "scheme": self._scheme.name,
            "ascent": repr(self._ascent),
            "the selected parameters": ", ".join(self.selection.named),
            "the step": str(self.step),
        }
        compare(configuration)

    def _play(self, loss_fn: Callable[[Any], Tensor], window: Sequence[Any]) -> Tensor:
        losses = []
        for k, batch in enumerate(window, 1):
            self.engine.set_gradient_accumulation_boundary(k == len(window))
            losses.append(self.engine.backward(checked(loss_fn(batch))).detach())
        return torch.stack(losses).sum()

    def _regularize(self, replay: Callable[[], Any], strength: Strength, before: Moment) -> None:
        trained = [p for p in self.selection.all if p.requires_grad]
        first = {p: _gradient(p) for p in trained}
        mine = self.selection.parameters
        norm = vectors.norm([first[p] for p in mine])
        scale = float(self.engine.optimizer.loss_scale)
        self._measured = {"grad_norm": norm / scale, "penalty_ratio": norm * 0, "cosine": norm * torch.nan}
        if not bool(vectors.has_direction(norm)):  # no direction: `.grad` stays g1, and a loss scaler sees it
            self._counts["skipped_steps"] += 1
            return
        [(node, weight)] = self._scheme.stencil
        after = Moment(self._anatomy)
        try:
            with self._displaced(mine, [first[p] for p in mine], node * strength.epsilon, scale):
                before.restore()
                for p in trained:  # with fp32 accumulation of a bf16 model the next pass would add to what is there
                    safe_set_full_grad(p, torch.zeros_like(first[p]))
                replay()
        finally:
            after.restore()
        is_finite = self._combine(first, set(mine), strength.ratio * weight, norm)
        self._counts["active_steps" if is_finite else "skipped_steps"] += 1

    @contextmanager
    def _displaced(self, parameters: Sequence[Any], first: list[Tensor], radius: float, scale: float) -> Iterator[None]:
        """The weights at θ + εd, rounded once, from the masters."""
        with torch.no_grad():
            masters = [_master(p) for p in parameters]
            direction, length = self._ascent(masters, first, scale)
            kept = [p.data.clone() for p in parameters]
            try:
                for p, master, d in zip(parameters, masters, direction):
                    p.data.copy_(master + radius * length * d)
                del masters, direction
                torch.clear_autocast_cache()
                with torch.enable_grad():
                    yield
            finally:
                for p, weight in zip(parameters, kept):
                    p.data.copy_(weight)
                torch.clear_autocast_cache()

    def _combine(self, first: dict[Any, Tensor], mine: set[Any], ratio: float, norm: Tensor) -> bool:
        """ĝ = g1 + ratio · (g2 − g1) for what is selected, g1 for the rest; whether g2 is finite."""
        seconds, distances = [], []
        for p, g1 in first.items():
            if p not in mine:
                safe_set_full_grad(p, g1)
                continue
            g2 = _gradient(p)
            difference = g2 - g1
            if ratio != 1:  # else ĝ is g2 itself
                safe_set_full_grad(p, g1 + ratio * difference)
            seconds.append(vectors.squared(g2))
            distances.append(vectors.squared(difference))
        second, distance = vectors.total(seconds), vectors.total(distances)
        self._measured["penalty_ratio"] = abs(ratio) * distance.sqrt() / norm
        self._measured["cosine"] = (norm.square() + second - distance) / (2 * norm * second.sqrt())
        return bool(second.isfinite())

    def diagnostics(self) -> dict[str, Tensor]:
        """`grad_norm`, `penalty_ratio` and `cosine` of the last step with γ > 0, and how many steps were active; γ of
        that step, where it follows a target."""
        gamma = {} if self._dial is None else {"gamma": torch.tensor(self._dial.gamma, dtype=torch.float64)}
        return {**self._measured, **gamma, **{name: torch.tensor(count) for name, count in self._counts.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The step, the counters and what a `TargetRatio` has measured: `engine.save_checkpoint(folder,
        client_state={"gradreg": ...})` keeps them."""
        target = {} if self._dial is None else {"target": self._dial.state_dict()}
        return {"step": self.step, **self._counts, **target}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: missing or unknown keys, or a value that is not an integer ≥ 0; nothing is changed.
        """
        expected = set(self.state_dict())
        if set(state_dict) != expected:
            raise ValueError(f"state_dict must have the keys {sorted(expected)}, got {sorted(state_dict)}.")
        for name in ("step", *self._counts):
            value = state_dict[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"state_dict[{name!r}] must be an integer ≥ 0, got {value!r}.")
        if self._dial is not None:
            self._dial.load_state_dict(state_dict["target"])
        self.step = state_dict["step"]
        self._counts = {name: state_dict[name] for name in self._counts}


def _gradient(p: Any) -> Tensor:
    """The averaged gradient of a parameter, whole, as DeepSpeed keeps it: times its loss scale, in float32."""
    gradient = safe_get_full_grad(p)
    assert gradient is not None
    return gradient.to(torch.float32, copy=True)


def _master(p: Any) -> Tensor:
    master = safe_get_full_fp32_param(p)
    assert master is not None
    return master


def _check_engine(engine: Any) -> None:
    """Refuse what would leave the second pass at other weights, or another gradient than the one that is stepped."""
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(f"engine must be what deepspeed.initialize returned, got {type(engine).__name__}.")
    stage = engine.zero_optimization_stage()
    if stage == 3:
        raise ValueError(
            "zero_optimization.stage=3 shards the weights, so that a displacement would be ignored silently: use stage "
            "1 or 2, or FSDP2 (torch.distributed.fsdp.fully_shard) with gradreg.GradientRegularizer."
        )
    if stage not in (1, 2):
        raise ValueError(
            f"zero_optimization.stage must be 1 or 2, got {stage}: without ZeRO use DistributedDataParallel and "
            "gradreg.GradientRegularizer."
        )
    module: nn.Module = engine.module  # pyright: ignore[reportAssignmentType]
    refused = {
        "a pipeline (PipelineModule)": type(engine) is not DeepSpeedEngine,
        f"{type(engine.optimizer).__name__} in place of DeepSpeedZeroOptimizer (bf16 with float32 accumulation needs "
        "stage 2)": type(engine.optimizer) is not DeepSpeedZeroOptimizer,
        "zero_optimization.offload_optimizer": bool(getattr(engine.optimizer, "cpu_offload", False)),
        "mpu (tensor parallelism)": engine.mpu is not None,
        "expert layers": bool(engine.has_moe_layers),
        "managed_gradient_accumulation=false": not engine.managed_gradient_accumulation(),
        "Muon": any(getattr(p, "use_muon", False) for p in module.parameters()),
    }
    found = [name for name, present in refused.items() if present]
    if found:
        raise ValueError(
            f"DeepSpeedRegularizer does not support {', '.join(found)}: use plain ZeRO-1 or ZeRO-2, with data "
            "parallelism only."
        )
