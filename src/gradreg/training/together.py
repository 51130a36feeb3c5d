"""Which values of the four nouns go together; what does not is refused with the nearest choice that does."""

from __future__ import annotations

from gradreg.functional.ascents import Adaptive, Normalized
from gradreg.functional.schemes import SCHEMES
from gradreg.training.batch import Fraction, Split
from gradreg.training.directions import Ahead, Momentum, Previous
from gradreg.training.plan import Method
from gradreg.training.schedule import LargeGradients, Schedule, Strength
from gradreg.training.target import target_in


def check_together(
    method: Method, gamma: Schedule, epsilon: Schedule, when: LargeGradients | None, ascent_sync: str
) -> None:
    """
    Raises:
        ValueError: a combination that means nothing.
        TypeError: `batch` or `when` of the wrong type.
    """
    batch, scheme = method.batch, method.scheme
    if batch is not None and not isinstance(batch, (Fraction, Split)):
        raise TypeError(f"batch must be gradreg.Fraction(share), gradreg.Split() or None, got {batch!r}.")
    if when is not None and not isinstance(when, LargeGradients):
        raise TypeError(f"when must be gradreg.LargeGradients(...) or None, got {when!r}.")
    if ascent_sync == "local" and (method.needs_whole or len(scheme.stencil) != 1):
        raise ValueError(
            'ascent_sync="local" combines each gradient before the ranks average it, which cap, nonfinite="first" '
            'and the schemes "central" and "exact" cannot: leave them out, or use ascent_sync="global".'
        )
    if method.at is not None and not isinstance(method.at, Ahead):
        raise TypeError(f"at must be gradreg.Ahead(direction, rho) or None, got {method.at!r}.")
    is_known = isinstance(method.ascent, (Momentum, Previous))
    if is_known and scheme != SCHEMES["forward"]:
        raise ValueError(
            f'scheme must be "forward" with ascent={method.ascent}, got {scheme.name!r}: the other side has the other '
            "sign."
        )
    if method.at is not None and (is_known or isinstance(batch, Split)):
        raise ValueError(
            f"at={method.at} moves all passes, and ascent={method.ascent}, batch={batch} has moved its pass already: "
            'use ascent="gradient" with at, on the whole batch or a Fraction of it.'
        )
    if isinstance(batch, Fraction) and scheme.is_exact:
        raise ValueError(f'scheme must not be "exact" with batch={batch}: use scheme="forward", or the whole batch.')
    if isinstance(batch, Split) and scheme != SCHEMES["forward"]:
        raise ValueError(
            f'scheme must be "forward" with batch=Split(), got {scheme.name!r}: its weights must be convex.'
        )
    if method.is_one_pass or isinstance(batch, Split):
        what = f"batch={batch}" if batch is not None else f"ascent={method.ascent}"
        if method.needs_whole:
            raise ValueError(
                f'cap and nonfinite="first" compare with the first gradient of the whole batch, and {what} runs one '
                "pass in all: leave them out, or use two passes."
            )
        if when is not None:
            raise ValueError(
                f"when tests the first gradient of the whole batch, and {what} runs one pass in all: leave it out, or "
                "use bernoulli(gamma, probability)."
            )
    if when is not None and (scheme.is_exact or isinstance(batch, Fraction) or ascent_sync == "local"):
        raise ValueError(
            'when needs the first gradient of the whole batch before the second pass, which scheme="exact", '
            'batch=Fraction and ascent_sync="local" do not have: leave one of them out.'
        )
    if target_in(epsilon) is not None:
        raise ValueError(
            f"epsilon must be a number or a function of the step, got {epsilon}, which finds γ and no length: pass it "
            "as gamma."
        )
    if target_in(gamma) is not None and (method.is_one_pass or isinstance(batch, Split)):
        what = f"batch={batch}" if batch is not None else f"ascent={method.ascent}"
        raise ValueError(
            f"gamma must be a number or a function of the step with {what}, whose one pass has no ratio to measure, "
            f"got {gamma} (which is also what no gamma means): "
            + ("use gamma=epsilon/2." if batch else "use gamma=epsilon.")
        )
    if not callable(gamma) and not callable(epsilon) and gamma != 0:
        check_step(method, Strength(float(gamma), float(epsilon)), None)


def check_step(method: Method, strength: Strength, step: int | None) -> None:
    """
    Raises:
        ValueError: γ and ε that the mode has no use for.
    """
    when = "" if step is None else f" at step {step}"
    gamma, epsilon = strength.gamma, strength.epsilon
    if method.is_one_pass and gamma != epsilon:
        raise ValueError(
            f"gamma must equal epsilon with ascent={method.ascent}, since a step is the one pass at θ + εd, got "
            f"{gamma} and {epsilon}{when}: use gamma=epsilon={epsilon}, or batch=Split() for gamma < epsilon."
        )
    if isinstance(method.batch, Split) and gamma >= epsilon:
        raise ValueError(
            "gamma must be below epsilon with batch=Split(), which displaces a share γ/ε of the batch, got "
            f"{gamma} and {epsilon}{when}: use gamma={epsilon / 2}, or leave out batch."
        )


def check_stage(method: Method, when: LargeGradients | None) -> None:
    """For a stage of a pipeline.

    Raises:
        ValueError: what needs a norm of the whole model, of which a stage knows its own part.
    """
    refused = {
        f"ascent={method.ascent}": isinstance(method.ascent, (Normalized, Adaptive, Momentum, Previous)),
        f"at={method.at}": method.at is not None,
        f"cap={method.cap}": method.cap is not None,
        'nonfinite="first"': method.fall_back,
        f"when={when}": when is not None,
    }
    for argument, is_refused in refused.items():
        if is_refused:
            raise ValueError(
                f"{argument} needs the norm of the whole model, and this process knows that of its pipeline stage: use "
                'ascent="gradient" without cap, when, at and nonfinite="first", or a data-parallel model (FSDP2).'
            )
