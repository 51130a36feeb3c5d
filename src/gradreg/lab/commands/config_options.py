"""An option for every field of a run's configuration, made from the field's metadata."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field
from typing import Annotated, Any

from cyclopts import Parameter

from gradreg.lab.config import FIELDS, SHORT, checked
from gradreg.lab.folder import BadInput


def with_fields(*, leaving_out: Collection[str] = ("file",)) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command with its `**given` replaced by one option for each field; `given` holds those that were given."""
    return lambda function: _with_fields(function, leaving_out)


def _with_fields(function: Callable[..., None], leaving_out: Collection[str]) -> Callable[..., None]:
    def command(*words: Any, **options: Any) -> None:
        function(*words, **{name: value for name, value in options.items() if value is not None or name not in FIELDS})

    signature = inspect.signature(function, eval_str=True)
    words = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    own = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(spec))
        for name, spec in FIELDS.items()
        if name not in leaving_out
    ]
    command.__signature__ = signature.replace(parameters=[*words, *options, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*words, *options, *own]}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(spec: Field[Any]) -> Any:
    about = spec.metadata
    if about.get("type") is bool:
        return Annotated[
            bool | None, Parameter(name=flag(spec.name), negative=f"--no-{spec.name}", help=about["about"])
        ]

    def convert(_: Any, tokens: Sequence[Any]) -> Any:
        try:
            return checked(spec, tokens[0].value)
        except BadInput as error:
            raise BadInput(str(error).replace(spec.name, tokens[0].keyword, 1)) from None

    allowed = f" One of {', '.join(about['choices'])}." if "choices" in about else ""
    default = "" if spec.default is None else f" [{spec.default}]"
    meaning = f"{about['about']}{allowed}{default}"
    names = [flag(name) for name in (spec.name, SHORT.get(spec.name)) if name is not None]
    parameter = Parameter(name=names, converter=convert, help=meaning, allow_leading_hyphen=True)
    kind = about.get("type", str)  # of what `convert` returns: with pydantic installed, cyclopts checks it
    return Annotated[kind | None, parameter]
