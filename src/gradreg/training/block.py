"""The block of the second door: what `with regularizer.perturbed():` enters and leaves.

A class and not a generator: an interrupt between a generator's `yield` and the block would leave weights displaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradreg.training.calls import explain_kept_graph
from gradreg.training.engine import Engine
from gradreg.training.selection import bare_class

if TYPE_CHECKING:
    from gradreg.training.regularizer import GradientRegularizer
    from gradreg.training.schedule import Strength
    from gradreg.training.second_pass import SecondPass


class Block:
    """One displaced pass that someone else runs.

    Args:
        regularizer: whose second door this is.
        grad_scale: the loss scale that `.grad` carries.
        replays_random_numbers: the block starts each forward from the random state of the first pass by itself.
        may_call: the model may be called to check that it gives the same again.
    """

    _engine: Engine | None = None  # while it is entered

    def __init__(
        self,
        regularizer: GradientRegularizer,
        grad_scale: float | Tensor,
        replays_random_numbers: bool = False,
        may_call: bool = True,
    ) -> None:
        self._regularizer = regularizer
        self._grad_scale = grad_scale
        self._replays = replays_random_numbers
        self._may_call = may_call
        self._strength: Strength | None = None
        self._second: SecondPass | None = None

    def __enter__(self) -> None:
        regularizer = self._regularizer
        engine = regularizer._enter()
        self._engine = engine
        try:
            self._strength = strength = regularizer._strength()
            if regularizer._method.is_one_pass:
                self._refuse_gradients()
                engine.open_one_pass(strength)
            else:
                self._require_first_pass(engine)
                self._second = engine.open_block(strength, self._grad_scale, self._replays, self._may_call)
        except BaseException:
            self._end(engine)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        del trace
        engine = self._engine
        assert engine is not None
        try:
            explain_kept_graph(error)
            if kind is None and self._second is None:
                engine.close_one_pass(self._strength)
            elif kind is None and self._second is not None:
                engine.close_block(self._second)
        finally:
            self._end(engine)

    def _end(self, engine: Engine) -> None:
        try:
            engine.end()
        finally:  # an interrupt may strike in the first
            engine.end()
        self._engine = None

    def __del__(self) -> None:
        if self._engine is not None:  # entered and never left; else there is nothing to do
            self._engine.end()

    def _refuse_gradients(self) -> None:
        regularizer = self._regularizer
        if any(p.grad is not None for p in regularizer.selection.parameters):
            raise ValueError(
                f"perturbed() with ascent={regularizer._method.ascent} is the one pass of a step, and .grad holds a "
                "gradient already: run no pass before, call zero_grad(set_to_none=True), and put a whole window into "
                "the block."
            )

    def _require_first_pass(self, engine: Engine) -> None:
        regularizer = self._regularizer
        if all(p.grad is None for p in regularizer.selection.parameters):
            raise ValueError(
                "perturbed() starts from the gradient of the first pass, and no selected parameter has one: run "
                "loss.backward() before, and zero_grad() before that, not in between."
            )
        was_attached = engine.watch.attach()
        if not engine.watch.has_seen:
            how = (
                "call the model itself, not its parts"
                if was_attached
                else "call compile() before the regularizer is made"
            )
            raise ValueError(
                f"perturbed() saw no forward of the model ({bare_class(regularizer.model)}) in the first pass, so it "
                f"cannot replay its random numbers: {how} (if you train torch.compile(model), give the regularizer "
                "that one), or use backward(loss_fn)."
            )
