"""A page: a list of blocks, made once from results, shown as HTML that stands alone and as Markdown.

Text is plain but for `code`, **strong**, *emphasis* and [links](https://...); what comes from outside goes through
`plain` or `code`. Headings and the cells of tables have no markup at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from gradreg.lab.figures import INK
from gradreg.lab.folder import BadInput, shown, write_text
from gradreg.lab.stats import BETTER, WORSE
from gradreg.lab.tables import Table, console, escaped, literal, markdown_table, say


@dataclass(frozen=True)
class Heading:
    """The page's title is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Items:
    """A bullet list."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """SVG of figures.py, and what to see in it."""

    name: str
    """Of its file, and of its ids on the page: letters, digits, `_` and `-`."""
    svg: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str
    language: str = ""


_SHORT, _LONG = 14, 36
"""In letters: of headings that are not broken into lines, and of cells that are."""
Block = str | Heading | Items | Table | Figure | Code
"""A string is a paragraph."""


@dataclass(frozen=True)
class Page:
    """What a reader is told, from top to bottom."""

    title: str
    blocks: Sequence[Block]
    made_by: str = "gradreg"
    """The command that writes it, and may write over it."""

    @property
    def figures(self) -> list[Figure]:
        return [block for block in self.blocks if isinstance(block, Figure)]


def html(page: Page) -> str:
    """One file that loads nothing: light and dark, for a phone and for a desk."""
    body = Markup("\n").join(_html(block) for block in (Heading(page.title, 1), *page.blocks))
    return render("gradreg.lab", "blocks.html", {}, title=page.title, generator=page.made_by, body=body)


def markdown(page: Page, figures: str = "figures/") -> str:
    """The same blocks; `figures` comes before the names of the figures' files."""
    blocks = [_markdown(block, figures) for block in page.blocks]
    return _in_utf8("\n\n".join([f"# {escaped(page.title)}", _mark(page.made_by), *blocks]) + "\n")


def publish(page: Page, folder: Path, *written: Path) -> None:
    """report.html; and each of `written` as Markdown with its figures in figures/, or else the figures as files."""
    write_text(folder / "report.html", html(page))
    if not written:
        _write_figures(page, folder)
    for path in written:
        write_page(page, path)


def write_page(page: Page, path: Path) -> None:
    """As Markdown, with its figures in figures/ beside it."""
    _write_figures(page, path.parent / "figures", f"{path.stem}-")
    write_text(path, markdown(page, f"figures/{path.stem}-"))


def _write_figures(page: Page, folder: Path, prefix: str = "") -> None:
    folder.mkdir(exist_ok=True)
    for figure in page.figures:
        write_text(folder / f"{prefix}{figure.name}.svg", figure.svg)


def tell(blocks: Sequence[Block], results: Mapping[str, Any], folder: Path) -> None:
    """On the terminal: paragraphs, lists and tables, and where the page is."""
    out = console()
    for block in blocks:
        if isinstance(block, Table):
            block.print(out)
        else:
            say(out, *_lines(block))
        say(out, "")
    seconds, of_what = _time(results)
    say(out, f"{seconds:.0f} s{of_what}. Page: {folder / 'report.html'}; figures and data beside it.")


def _lines(block: Block) -> list[str]:
    if isinstance(block, Items):
        return [f"- {text}" for text in block.texts]
    return (block.text if isinstance(block, Code | Heading) else str(block)).split("\n")


def check_page(path: Path, made_by: str) -> None:
    """For `--write`: a new page, or one that the command made, in a folder that exists and can be written to.

    Raises:
        BadInput: another path.
    """
    if path.suffix != ".md" or not str(path).isprintable():
        raise BadInput(f"--write must be the path of a page that ends in .md, got {shown(path)}.")
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise BadInput(f"--write must be a page in a folder that exists and can be written to, got {shown(path)}.")
    try:
        is_ours = _mark(made_by) in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (IsADirectoryError, UnicodeDecodeError):
        is_ours = False
    except OSError as error:
        raise BadInput(f"--write must be a page that can be written, got {shown(path)}: {error.strerror}.") from error
    if not is_ours:
        raise BadInput(f"--write must be a new page or one that {made_by} made, got {shown(path)}, which it did not.")


def _mark(made_by: str) -> str:
    return f"<!-- Made by `{made_by}`: edit the command, not this page. -->"


# Text.


_SPANS = re.compile(
    r"\\(?P<escaped>.)|`(?P<code>[^`]+)`|\*\*(?P<strong>(?:\\.|[^\\*])+)\*\*|\*(?P<em>(?:\\.|[^\\*\s])(?:\\.|[^\\*])*)\*"
    r"|\[(?P<link>[^\[\]]+)\]\((?P<to>https://[^\s()]+|\w[\w./#-]*)\)"
)


def plain(text: object) -> str:
    """Text that stays text in a paragraph, an item or a caption, on one line."""
    return re.sub(r"([\\`*\[])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """The same, as code."""
    return f"`{' '.join(str(text).split()).replace('`', '')}`"


def made(results: Mapping[str, Any]) -> str:
    """Where the numbers come from: command, date, machine and versions, as `about.provenance` has them."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    seconds, of_what = _time(results)
    took = f"{seconds / 60:.1f} minutes" if seconds >= 100 else f"{seconds:.0f} s"
    return f"Made by {code(results['command'])} on {plain(results['date'])}, in {took}{of_what}; " + plain(
        f"{results['machine']}; {versions}."
    )


def _time(results: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds from start to end; or, of runs that workers shared, whenever and wherever, of all together."""
    if "training_seconds" in results:
        return results["training_seconds"], " of training"
    return results["seconds"], ""


def _spans(text: str) -> Iterator[tuple[str, str, str]]:
    """Kind, text, and where it leads."""
    text, at = " ".join(text.split()), 0
    for found in _SPANS.finditer(text):
        yield "text", text[at : found.start()], ""
        kind, at = found.lastgroup or "", found.end()
        kind = "link" if kind == "to" else kind
        inner = found[kind] if kind == "code" else re.sub(r"\\(.)", r"\1", found[kind])
        yield ("text" if kind == "escaped" else kind), inner, found["to"] or ""
    yield "text", text[at:], ""


def _inline_html(text: str) -> Markup:
    """Only links to the web lead anywhere: the page may lie where others do not."""
    shown = Markup()
    for kind, inner, to in _spans(text):
        if kind in ("code", "strong", "em"):
            shown += Markup(f"<{kind}>{{}}</{kind}>").format(inner)
        else:
            shown += Markup('<a href="{}">{}</a>').format(to, inner) if to.startswith("https://") else escape(inner)
    return shown


def _inline_markdown(text: str) -> str:
    around = {"code": "`", "strong": "**", "em": "*"}
    parts = []
    for kind, inner, to in _spans(text):
        around_it = around.get(kind, "")
        inner = inner if kind == "code" else literal(inner)
        parts.append(f"[{inner}]({to})" if to else f"{around_it}{inner}{around_it}")
    return re.sub(r"^(\d*)([-+=~.)])", r"\1\\\2", "".join(parts))  # no list, rule or heading by its first letters


# Blocks.


def _html(block: Block) -> Markup:
    if isinstance(block, str):
        return Markup("<p>{}</p>").format(_inline_html(block))
    if isinstance(block, Heading):
        return Markup(f"<h{block.level}>{{}}</h{block.level}>").format(block.text)
    if isinstance(block, Items):
        return Markup("<ul>\n{}\n</ul>").format(
            Markup("\n").join(Markup("<li>{}</li>").format(_inline_html(text)) for text in block.texts)
        )
    if isinstance(block, Figure):
        caption = _inline_html(block.caption)
        return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(
            _scrolled(inline(block.name, block.svg), "figure"), caption
        )
    if isinstance(block, Code):
        return Markup('<pre tabindex="0"><code>{}</code></pre>').format(block.text)
    return _html_table(block)


def _html_table(table: Table) -> Markup:
    sides = ["left" if table.is_of_words(k) else "right" for k in range(len(table.headings))]
    widths = [
        max((len(line) for row in table.rows for line in row[k].split("\n")), default=0) for k in range(len(sides))
    ]
    wide = [width > _LONG for width in widths]
    wordy = [len(heading) > max(width, _SHORT) for heading, width in zip(table.headings, widths)]

    def row(tag: str, cells: Sequence[str], are_broken: Sequence[bool], more: str = "") -> Markup:
        kinds = [side + " broken" * is_broken for side, is_broken in zip(sides, are_broken)]
        shown = [Markup(f'<{tag}{more} class="{kind}">{{}}</{tag}>').format(_cell(c)) for kind, c in zip(kinds, cells)]
        return Markup("<tr>{}</tr>").format(Markup().join(shown))

    whole = Markup("<table>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody>\n</table>").format(
        row("th", table.headings, wordy, ' scope="col"'),
        Markup("\n").join(row("td", cells, wide) for cells in table.rows),
    )
    title = Markup('<p class="title">{}</p>\n').format(table.title) if table.title else Markup()
    return title + _scrolled(whole, table.title or "table")


def _cell(text: str) -> Markup:
    """Line by line; a difference that is shown stands out."""
    lines = Markup("<br>").join(text.split("\n"))
    return Markup("<strong>{}</strong>").format(lines) if text.startswith((BETTER, WORSE)) else lines


def _scrolled(inside: Markup, label: str) -> Markup:
    """What is wider than the page is scrolled by itself, with the keyboard too."""
    return Markup('<div class="scroll" tabindex="0" role="region" aria-label="{}">{}</div>').format(label, inside)


def _markdown(block: Block, figures: str) -> str:
    if isinstance(block, str):
        return _inline_markdown(block)
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escaped(block.text)}"
    if isinstance(block, Items):
        return "\n".join(f"- {_inline_markdown(text)}" for text in block.texts)
    if isinstance(block, Figure):
        caption = _inline_markdown(block.caption)
        return f"![{caption}]({figures}{block.name}.svg)\n\n{caption}"
    if isinstance(block, Code):
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", block.text))])
        return f"{fence}{block.language}\n{block.text.rstrip()}\n{fence}"
    title = f"*{escaped(block.title)}*\n\n" if block.title else ""
    return title + markdown_table(block.headings, block.rows)


# Files.


def render(package: str, template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """A template of a package, filled in, on the frame of `base.html`: every text escaped, nothing loaded."""
    environment = Environment(
        loader=FunctionLoader(lambda name: source("gradreg.lab" if name == "base.html" else package, name)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return _in_utf8(environment.get_template(template).render(values))


def source(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def inline(name: str, svg: str) -> Markup:
    """An SVG element fit for a page: no XML header, no metadata, ids of its own, colored by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    return Markup(svg.replace(INK, "currentColor").replace("#ffffff", "var(--paper)"))


def _in_utf8(text: str) -> str:
    """Half a surrogate pair, which UTF-8 cannot hold, becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def fragment(blocks: Sequence[Block]) -> str:
    """Some blocks as HTML in a page of somebody else's, such as a notebook's."""
    return str(Markup("\n").join(_html(block) for block in blocks))
