"""The page builder: the same blocks as HTML that loads nothing and as Markdown, whatever the names are."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure as Drawing
from printed import tables_fit

from gradreg.lab import figures, page
from gradreg.lab.figures import LOOKS, as_svg, band, interval, legend, logarithmic, look, panels, rows_of
from gradreg.lab.folder import BadInput
from gradreg.lab.page import Code, Figure, Heading, Items, Page, check_page, html, markdown, plain, publish, tell
from gradreg.lab.tables import WIDTH, Table, console

HOSTILE = "<script>alert(1)</script> \"quoted\" & 'single' | `code` **bold** *em* [link](https://x.y) \\ # \ud800"
LONG = "w" * 4000


@as_svg
def drawing(title):
    figure = Drawing(figsize=(4, 3))
    axes = figure.subplots()
    axes.set_title(title)
    axes.plot([1, 2], [3, 4])
    return figure


def everything(text):
    """A page with the text in every place that takes one."""
    return Page(
        text,
        [
            plain(text),
            Heading(text, 3),
            Items([plain(text), f"**{plain(text)}** and `code`"]),
            Table(text, ("a", text), [("b", text), (text, "1.5")]),
            Figure("drawn", drawing(text.encode("utf-8", "replace").decode()), plain(text)),
            Code(text),
        ],
        "gradreg test",
    )


class Read(HTMLParser):
    """Tags, attributes and the text outside of the style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text += f"{data} "


@pytest.mark.parametrize("text", [HOSTILE, LONG, "# h", "- item", "1. item", "=====", "|---|", "\\", "*"])
def test_whatever_the_text_is_the_page_has_the_same_tags_and_shows_it(text):
    found, usual = Read(html(everything(text))), Read(html(everything("name")))
    shown = " ".join(text.replace("\ud800", "?").split())
    assert found.tags == usual.tags
    assert " ".join(found.text.split()).count(shown) >= 10


@pytest.mark.parametrize("text", [HOSTILE, LONG])
def test_the_html_loads_nothing_and_runs_nothing(text):
    found = Read(html(everything(text)))
    assert not {"script", "link", "img", "image", "iframe", "object", "form"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "action", "srcset")}
    targets = [value for name, value in found.attributes if name.endswith("href")]
    assert all(value.startswith("#") for value in targets)
    (policy,) = [value for name, value in found.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'")


def test_the_markdown_of_hostile_texts_is_text():
    usual, text = markdown(everything("name")), markdown(everything(HOSTILE))
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert "<script" not in outside
    assert "](https://x.y)" not in outside.replace("\\](https", "")
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [3] * 4
    assert len(text.splitlines()) == len(usual.splitlines())
    text.encode("utf-8")


@pytest.mark.parametrize("start", ["# h", "- a", "+ a", "1. a", "2) a", "===", "---", "~~~", "> q", "```"])
def test_no_paragraph_becomes_another_block(start):
    (line,) = markdown(Page("t", [plain(start)])).splitlines()[4:]
    assert not re.match(r"(#+ |[-+*] |\d+[.)] |[=~>-]|```)", line)


def test_both_renderings_have_the_same_words_in_the_same_order():
    made = Page(
        "Title",
        [
            "With `some code`, **strong words**, *a stress*, [a page](https://example.org/a) and [here](near.md).",
            Heading("Part"),
            Items(["one", "two `three`"]),
            Table("Numbers", ("name", "value"), [("a_b", "1.2 ± 0.3"), ("c", "−4")]),
            Figure("drawn", drawing("t"), "What to *see*."),
            Code("run --it", "bash"),
        ],
    )
    text, shown = markdown(made), html(made)
    words = re.findall(r"\w+", re.sub(r"!\[.*?\]|\]\([^)]*\)|\([^ )]*svg\)|<!--.*?-->|```bash|\\", "", text))
    body = re.sub(r"<svg.*?</svg>", "", shown[shown.index("<body>") :], flags=re.DOTALL)
    assert words == re.findall(r"\w+", Read(body).text)
    assert "`some code`, **strong words**, *a stress*, [a page](https://example.org/a) and [here](near.md)" in text
    assert "<code>some code</code>, <strong>strong words</strong>, <em>a stress</em>" in shown
    assert 'href="https://example.org/a"' in shown
    assert "near.md" not in shown  # it does not lie beside the page
    assert "| a\\_b | 1.2 ± 0.3 |" in text
    assert "![What to *see*.](figures/drawn.svg)" in text
    assert "```bash\nrun --it\n```" in text


@pytest.mark.parametrize("link", ["[x](javascript:alert(1))", "[x](http://a.b)", "[x](//a.b)", "[x](/etc/passwd)"])
def test_a_link_leads_to_the_web_or_beside_the_page(link):
    assert "href" not in html(Page("t", [link]))
    assert "](" not in markdown(Page("t", [link])).replace("\\](", "")


def test_words_go_left_and_numbers_right_on_the_page_and_the_terminal(capsys):
    table = Table("", ("name", "value", "says"), [("a", "1.5 (1 to 2)", "better"), ("b", "−20", "–"), ("c", "", "")])
    assert [table.is_of_words(k) for k in range(3)] == [True, False, True]
    text = html(Page("t", [table]))
    assert '<td class="right">−20</td>' in text
    assert '<td class="left"><strong>better</strong></td>' in text
    table.print(console())
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("b") and line.index("−20") > line.index("b") + 8 for line in lines)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_where_a_table_is_too_wide_headings_are_in_lines_then_intervals_below_their_number(columns, capsys):
    headings = ("method", *["test error, relative"] * columns, "how it was found")
    row = ("F-GR", *["0.05 [0.031, 0.055]"] * columns, "by descent and then by a search")
    with tables_fit():
        Table("", headings, [row]).print(console())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= WIDTH
    assert printed.count("test error, relative") == (columns if columns <= 2 else 0)
    assert printed.count("0.05 [0.031, 0.055]") == (columns if columns <= 2 else 0)
    assert printed.count("0.031, 0.055") == columns


def test_a_table_that_fits_in_no_way_is_printed_in_parts_each_with_its_first_column(capsys):
    headings = ("arm", *[f"measure{k}" for k in range(17)])
    rows = [(name, *[f"{k}.{k}" for k in range(17)]) for name in ("SGD", "SGD, twice as long")]
    with tables_fit():
        Table("All", headings, rows).print(console())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[0] for line in lines if line.strip()] == ["All", *["arm", "SGD", "SGD,"] * 4]
    said = " ".join(lines).split()
    assert all(said.count(heading) == 1 and said.count(cell) == 2 for heading, cell in zip(headings[1:], rows[0][1:]))


def test_a_page_is_published_with_its_figures_and_may_write_over_its_own_alone(tmp_path):
    made, target = everything("name"), tmp_path / "docs" / "study.md"
    (tmp_path / "plain").mkdir()
    target.parent.mkdir()
    publish(made, tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"report.html", "drawn.svg"}
    publish(made, tmp_path, target)
    assert target.read_text(encoding="utf-8") == markdown(made, "figures/study-")
    assert (tmp_path / "docs" / "figures" / "study-drawn.svg").exists()
    assert not (tmp_path / "drawn.svg").exists()
    check_page(target, "gradreg test")
    with pytest.raises(BadInput, match="which it did not"):
        check_page(target, "gradreg other")


def test_the_terminal_is_told_the_same_and_where_the_page_is(tmp_path, capsys):
    blocks = [
        "One\ntwo.",
        Items(["three"]),
        Heading("Seven"),
        Code("five\n  six", "bash"),
        Table("Four", ("a", "b"), [("c", "1")]),
    ]
    tell(blocks, {"seconds": 5.2}, tmp_path)
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.startswith("One two.  - three  Seven  five   six  Four")
    assert str(tmp_path / "report.html") in said
    assert "5 s. Page" in said
    tell([], {"training_seconds": 7.2}, tmp_path)
    assert "7 s of training. Page" in capsys.readouterr().out.replace("\n", " ")


# Figures.


def test_a_title_that_is_wider_than_its_panel_is_broken():
    _, (long, short) = figures.panels(["word " * 16, "ResNet\nten"], 5.4, 2.0)
    lines = long.get_title().split("\n")
    assert len(lines) == 2
    assert max(map(len, lines)) <= figures.LETTERS * 5.4
    assert short.get_title() == "ResNet\nten"


def test_a_figure_is_the_same_in_every_run_and_takes_the_colors_of_the_page():
    assert drawing("t") == drawing("t")
    shown = html(Page("t", [Figure("a", drawing("t"), ""), Figure("b", drawing("t"), "")]))
    assert "currentColor" in shown
    assert "var(--paper)" in shown
    ids = [value for name, value in Read(shown).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_method_has_a_look_of_its_own():
    assert len({of.color for of in LOOKS.values()}) == len({of.marker for of in LOOKS.values()}) == len(LOOKS)
    assert look("nothing known").marker not in {of.marker for of in LOOKS.values()}


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.9), (1e-9, 10.0)])
def test_a_logarithmic_axis_has_ticks(low, high):
    @as_svg
    def draw():
        figure, (axes,) = panels(["t"], 4, 3)
        band(
            axes, [0, 1], [{"mean": low, "low": low, "high": low}, {"mean": high, "low": low, "high": high}], look("x")
        )
        logarithmic(axes.yaxis)
        assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2
        return figure

    draw()


def test_a_legend_fits_its_figure():
    @as_svg
    def draw():
        figure, (axes,) = panels(["t"], 4, 3)
        rows_of(axes, ["a"])
        interval(axes, 0, {"low": 0, "mean": 1, "high": 2}, look("SGD"))
        legend(figure, [look(name).mark(f"{name}, tuned") for name in LOOKS])
        figure.draw_without_rendering()
        assert figure.legends[0].get_window_extent().width <= figure.bbox.width
        return figure

    draw()


def test_the_blocks_are_all_rendered():
    kinds = [kind for kind in page.Block.__args__ if kind is not str]
    assert {type(block) for block in everything("x").blocks} == {*kinds, str}
