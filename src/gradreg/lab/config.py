"""The configuration of a run: typed, checked when it is made, the same on the command line and in a YAML file.

Every field says in its metadata what it means and which values it may take; the checks, the options of
`gradreg train` and `gradreg sweep`, and the messages for bad input are all made from that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from gradreg.lab.folder import BadInput
from gradreg.lab.methods import METHODS, check_together
from gradreg.lab.names import meant, one_of, suggestion

DATA = ("mnist1d", "digits", "fashion-mnist", "cifar10", "cifar100", "idx", "images", "hub", "text")
MODELS = ("mlp", "cnn", "resnet18", "wideresnet", "vit", "gpt")
ASCENTS = ("gradient", "normalized", "adaptive", "momentum", "previous")
ACTIVATIONS = ("relu", "silu")
OPTIMIZERS = ("sgd", "adam", "adamw")
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
BUILT_IN = (
    "data",
    "path",
    "num_train",
    "random_labels",
    "augment",
    "shrink",
    "model",
    "depth",
    "width",
    "activation",
    "patch",
)
"""The fields that make a built-in task; a task of the user's own has none of them."""
SETTINGS = ("gamma", "ratio", "epsilon", "rho", "level")
"""The fields of which a method needs some and refuses the others."""
SHORT = {"learning_rate": "lr", "weight_decay": "wd"}
"""Other names of fields, on the command line and in YAML."""
SWEEP_KEYS = ("base", "grid", "search", "trials", "first_seed", "seeds")
"""Of the configuration of a sweep, whose base is that of its runs."""


def _choice(default: str, choices: Collection[str], about: str) -> Any:
    return field(default=default, metadata={"about": about, "choices": choices})


def _whole(default: int | None, low: int, high: int, about: str) -> Any:
    return field(default=default, metadata={"about": about, "type": int, "low": low, "high": high})


def _number(default: float | None, low: float, high: float, about: str, above: bool = False) -> Any:
    """`above`: larger than `low`, not equal to it."""
    return field(default=default, metadata={"about": about, "type": float, "low": low, "high": high, "above": above})


def _switch(about: str) -> Any:
    return field(default=False, metadata={"about": about, "type": bool})


def _text(about: str) -> Any:
    return field(default=None, metadata={"about": about, "type": str})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run.

    Raises:
        BadInput: a value outside of its range, or a setting that the method does not have or lacks; the one-line
            message names the field, the value and what is allowed.

    Example:
        >>> RunConfig(method="f-gr", gamma=0.1, epsilon=0.3).task
        'mnist1d, MLP, clean labels'
        >>> RunConfig(method="f-gr", gamma=0.1)
        Traceback (most recent call last):
        gradreg.lab.folder.BadInput: epsilon must be given with method F-GR, which needs gamma, epsilon.
    """

    file: str | None = _text("Task of your own, FILE.py:NAME; the command line must name it too.")
    data: str = _choice("mnist1d", DATA, "Data set.")
    path: str | None = _text("CIFAR archive, folder of IDX files or of images, or the name of a data set on the hub.")
    num_train: int | None = _whole(None, 2, 10**9, "Training rows; by default all that there are.")
    random_labels: float = _number(0.0, 0, 0.9, "Share of the training labels that are replaced by another class.")
    augment: bool = _switch("Shift and mirror the training images, as in the paper.")
    shrink: int = _whole(1, 1, 64, "Side of the squares of pixels that images are averaged over.")
    model: str = _choice("mlp", MODELS, "Model.")
    depth: int | None = _whole(None, 1, 1000, "Layers or blocks; by default the model's own.")
    width: int | None = _whole(None, 1, 65536, "Units, channels or features; by default the model's own.")
    activation: str = _choice("relu", ACTIVATIONS, "Of mlp, cnn, resnet18 and wideresnet; silu is smooth.")
    patch: int | None = _whole(None, 1, 10**4, "Side of vit's patches; by default it cuts the shorter side in about 8.")
    method: str = _choice("SGD", METHODS, "What the optimizer is given in the place of the gradient.")
    gamma: float | None = _number(None, 0, 1e6, "Strength γ of the penalty.")
    ratio: float | None = _number(None, 0, 1e3, "Penalty ratio that γ shall follow, in place of gamma.", above=True)
    epsilon: float | None = _number(None, 0, 1e6, "Step length ε of the finite difference.", above=True)
    rho: float | None = _number(None, 0, 1e6, "Radius ρ of SAM, ASAM, MSAM, Previous.", above=True)
    level: float | None = _number(None, 0, 1e6, "Flood level.")
    ascent: str = _choice("gradient", ASCENTS, "Direction of the displacement, for F-GR, B-GR, Central and Split.")
    warmup: float = _number(0.3, 0, 1, "Share of the steps over which γ, or ρ of a step in one pass, rises from 0.")
    fraction: float = _number(1.0, 0, 1, "Share of the batch that the penalty is taken on.", above=True)
    lookahead: float = _number(0.0, 0, 1e6, "Radius ρ of MSAM, to whose point the whole step of a penalty is moved.")
    period: int = _whole(1, 1, 10**6, "A penalty in every so many steps only.")
    start: float = _number(0.0, 0, 1, "Share of the steps before the penalty begins.")
    probability: float = _number(1.0, 0, 1, "Share of the steps, drawn at random, that have a penalty.", above=True)
    threshold: float | None = _number(None, -1e6, 1e6, "Penalty only where ‖∇L‖² is so many deviations above its mean.")
    optimizer: str = _choice("sgd", OPTIMIZERS, "Optimizer.")
    learning_rate: float = _number(0.1, 0, 1e3, "The first, and highest, of the cosine schedule.", above=True)
    weight_decay: float = _number(0.0, 0, 1e3, "Weight decay, applied by the optimizer.")
    momentum: float = _number(0.9, 0, 0.9999, "Momentum of SGD.")
    batch_size: int = _whole(100, 1, 10**7, "Rows in a step, over all processes.")
    epochs: int = _whole(30, 1, 10**6, "Passes over the training rows.")
    precision: str = _choice("fp32", PRECISIONS, "Arithmetic of the forward pass: autocast, fp16 with a scaler.")
    compile: bool = _switch("Compile the model.")
    channels_last: bool = _switch("Keep the channels of images last in memory, which GPUs prefer with bf16.")
    device: str = _choice("auto", DEVICES, "Where to run; auto takes a GPU if there is one.")
    seed: int = _whole(0, 0, 2**31 - 1, "Decides initialization, order of the batches and which labels are random.")

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, checked(spec, getattr(self, spec.name)))
        self._check_settings()
        check_together(self)
        if self.file is not None:
            for name in BUILT_IN:
                if getattr(self, name) != FIELDS[name].default:
                    raise BadInput(
                        f"{name} must be left out with a task of your own, got {str(getattr(self, name))!a}."
                    )

    def _check_settings(self) -> None:
        method = METHODS[self.method]
        has = f"method {self.method}, which needs {', '.join(method.needs) or 'none of these settings'}"
        follows = self.ratio is not None and method.follows_ratio
        if follows and self.gamma is not None:
            raise BadInput("gamma must be left out with ratio, which it follows.")
        for name in SETTINGS:
            given = getattr(self, name) is not None
            if given and name not in method.needs and not (name == "ratio" and follows):
                other = METHODS["F-GR"] if name == "ratio" else next(m for m in METHODS.values() if name in m.needs)
                way_out = f"method {other.name} (--method {other.name}) has it, and needs {', '.join(other.needs)}"
                raise BadInput(f"{name} must be left out with {has}; {way_out}.")
            if not given and name in method.needs and not (name == "gamma" and follows):
                raise BadInput(f"{name} must be given with {has}.")

    @property
    def settings(self) -> dict[str, float]:
        """γ or its ratio, ε, ρ or a level: what the method was given."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}

    @property
    def task(self) -> str:
        """Data, model and labels, in words; of a task of the user's its reference."""
        if self.file is not None:
            return self.file
        labels = f"{self.random_labels:.0%} random labels" if self.random_labels else "clean labels"
        return f"{self.data}, {self.model.upper()}, {labels}"


FIELDS: dict[str, Field[Any]] = {spec.name: spec for spec in fields(RunConfig)}


def configure(task: RunConfig, method: str, chosen: Mapping[str, Any], seed: int) -> RunConfig:
    """A task with a method, at the learning rate, weight decay and settings that were chosen for it."""
    hyper_parameters = {key: chosen[key] for key in ("learning_rate", "weight_decay")}
    return replace(task, method=method, seed=seed, **hyper_parameters, **chosen["settings"])


def from_mapping(values: Mapping[str, Any], where: str = "configuration") -> RunConfig:
    """A configuration from a YAML or JSON mapping; an unknown key is an error."""
    if not isinstance(values, Mapping):
        raise BadInput(f"{where} must be a mapping of fields to values, got {type(values).__name__}.")
    return RunConfig(**by_field(values, where))


def by_field(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Values by the names of their fields, which may be written in short (`lr`) or with hyphens.

    Raises:
        BadInput: a name that no field has, or two that are the same one's; the message begins with `where`.

    Example:
        >>> by_field({"lr": 0.1, "batch-size": 50}, "configuration")
        {'learning_rate': 0.1, 'batch_size': 50}
    """
    known = {name: name for name in FIELDS} | {short: name for name, short in SHORT.items()}
    keys: dict[str, str] = {}
    for key in values:
        name = meant(key, known)
        if name is None:
            hint = suggestion(key, known)
            raise BadInput(f"{where} has the unknown field {str(key)!a}; the fields are {', '.join(FIELDS)}.{hint}")
        field = known[name]
        if field in keys:
            raise BadInput(f"{where} must have one of {keys[field]!a} and {key!a}, which are the same field.")
        keys[field] = key
    return {field: values[key] for field, key in keys.items()}


def checked(spec: Field[Any], value: Any) -> Any:
    """The value of a field in its own type, from Python, YAML or the text of an option."""
    about = spec.metadata
    if value is None and spec.default is None:
        return None
    if "choices" in about:
        return one_of(spec.name, value, about["choices"])
    if about["type"] is bool:
        if isinstance(value, bool):
            return value
        raise BadInput(f"{spec.name} must be true or false, got {str(value)!a}.")
    if about["type"] is str:
        if isinstance(value, str) and value and value.isprintable():
            return value
        raise BadInput(f"{spec.name} must be a printable text, got {str(value)!a}.")
    return _checked_number(spec, value)


def _plain(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _checked_number(spec: Field[Any], value: Any) -> Any:
    kind, low, high = (spec.metadata[key] for key in ("type", "low", "high"))
    try:
        number = kind(value)
        if isinstance(value, bool) or not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high or (spec.metadata.get("above") and number == low):
        what = "a whole number" if kind is int else "a number"
        span = f"above {low} and at most {high:g}" if spec.metadata.get("above") else f"from {low} to {_plain(high)}"
        raise BadInput(f"{spec.name} must be {what} {span}, got {str(value)!a}.")
    return number
