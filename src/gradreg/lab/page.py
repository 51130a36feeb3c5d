"""Pages that stand alone: every text escaped, figures inlined in the colors of the page, nothing loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from gradreg.lab.figures import INK


def render(package: str, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template of a package, filled in, on the frame of `base.html`.

    Half a surrogate pair, which UTF-8 cannot hold, becomes `?`.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: source("gradreg.lab" if name == "base.html" else package, name)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(values).encode("utf-8", "replace").decode("utf-8")


def source(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def inline(name: str, svg: str, keeps_size: bool = False) -> Markup:
    """An SVG element fit for a page: no XML header, no metadata, ids of its own, colored by the page, and sized by it
    unless the figure keeps the size that it was drawn in."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    if not keeps_size:
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    return Markup(svg.replace(INK, "currentColor").replace("#ffffff", "var(--paper)"))
