"""What a trainer of policies (GRPO and its kin) takes from the weights as if it were data, and pins for the replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradreg.integrations._trainer import GradientRegularizationMixin, MicroBatch


def embeddings_and_head(model: nn.Module) -> list[str]:
    """Patterns for the parameters of every embedding and of the output head, also inside adapters.

    Example:
        >>> embeddings_and_head(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)))
        ['0.*']
    """
    getters = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    found = [getter() for getter in getters if getter is not None]
    return [
        f"{name}.*"
        for name, module in model.named_modules()
        if name and (isinstance(module, nn.Embedding) or any(module is m for m in found))
    ]


class PolicyRegularizationMixin(GradientRegularizationMixin):
    """`GradientRegularizationMixin` for trainers that ask `_get_per_token_logps_and_entropies` for their loss.

    The old log-probabilities, where the host leaves them to be those of the present weights, and the mask of
    high-entropy tokens are those of θ in both passes. Embeddings and output head keep g1 unless `exclude` says
    otherwise.

    Raises:
        ValueError: an adaptive entropy coefficient, which changes between the passes.
        RuntimeError: a version of TRL whose log-probabilities cannot be pinned.
    """

    def _take_up(self) -> None:
        self._log_probabilities: list[Tensor] = []
        self._masks: list[Tensor] = []
        super()._take_up()

    def _check_host(self) -> None:
        super()._check_host()
        if getattr(self, "use_adaptive_entropy", False):
            raise ValueError(
                "use_adaptive_entropy is not supported: the coefficient changes at the end of the first pass, and the "
                "second would see another loss. Use a fixed entropy_coef."
            )

    def default_exclude(self, model: nn.Module) -> Sequence[str]:
        return embeddings_and_head(getattr(model, "module", model))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self._log_probabilities.clear()
        self._masks.clear()
        return super().training_step(model, inputs, num_items_in_batch)

    # No public method hands the log-probabilities out. Those of generation are made without a graph.
    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        host: Any = super()
        found = host._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._is_recording and torch.is_grad_enabled():
            self._log_probabilities.append(found[0].detach())
        return found

    def get_high_entropy_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._replayed is not None:
            return self._replayed.inputs["gradreg_entropy_mask"]
        host: Any = super()
        mask = host.get_high_entropy_mask(*args, **kwargs)
        if self._is_recording:
            self._masks.append(mask)
        return mask

    def pin(self, micro_batch: MicroBatch) -> None:
        if self._masks:
            micro_batch.inputs["gradreg_entropy_mask"] = self._masks[-1]
        if micro_batch.inputs.get("old_per_token_logps") is not None:
            return
        if len(self._log_probabilities) != 1:
            raise RuntimeError(
                f"compute_loss of {type(self).__name__} did not ask for the log-probabilities once, as GRPOTrainer of "
                "TRL 1.16 does, so those of the first pass cannot be pinned: install a version of TRL that is "
                "supported."
            )
        micro_batch.inputs["old_per_token_logps"] = self._log_probabilities[0]
