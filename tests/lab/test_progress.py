"""Progress where there is no terminal: rare plain lines, and one line in a notebook."""

import sys
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from gradreg.lab import progress
from gradreg.lab.progress import Lines, progress_bar


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def lines(said, clock):
    return Lines(said.append, 30, clock)


def test_the_first_line_comes_after_half_a_minute_and_then_one_in_each(lines, said, clock):
    for done in range(101):  # a step a second
        lines.show("training, best 71.2%", done, 1000)
        clock.now += 1
    assert said == [
        "training, best 71.2%: 30 of 1000, 0:00:30 elapsed, 0:16:10 left",
        "training, best 71.2%: 60 of 1000, 0:01:00 elapsed, 0:15:40 left",
        "training, best 71.2%: 90 of 1000, 0:01:30 elapsed, 0:15:10 left",
    ]


def test_what_was_done_before_does_not_count_for_the_time_that_is_left(lines, said, clock):
    lines.show("sweep", 90, 100)  # gone on with
    clock.now += 5
    lines.show("sweep", 90, 100)  # asked again before the first has ended
    clock.now += 5
    lines.show("sweep", 91, 100)
    clock.now += 20
    lines.show("sweep", 92, 100)
    lines.show("test rows", 0, 10)
    clock.now += 30
    lines.show("test rows", 5, 10)
    assert said == [
        "sweep: 92 of 100, 0:00:30 elapsed, 0:02:00 left",
        "test rows: 5 of 10, 0:01:00 elapsed, 0:00:30 left",
    ]


def test_a_step_that_takes_long_is_told_of_too(lines, said, clock):
    lines.show("sweep", 0, 100)
    for _ in range(70):
        clock.now += 1
        lines.say_now_and_then()
    assert said == ["sweep: 0 of 100, 0:00:30 elapsed", "sweep: 0 of 100, 0:01:00 elapsed"]


def test_a_pipe_gets_plain_lines_on_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    progress._of_this_process.cache_clear()
    with progress_bar() as show:
        show("training", 1, 2)
    progress._of_this_process.cache_clear()
    printed = capsys.readouterr()
    assert printed.err.startswith("gradreg: training: 1 of 2, 0:00:00 elapsed")
    assert "\x1b" not in printed.err
    assert printed.out == ""


def test_a_notebook_has_one_line_in_which_the_last_stays(monkeypatch, capsys):
    pages = []

    def display(content, raw, display_id):
        pages.append(content)
        return SimpleNamespace(update=lambda content, raw: pages.__setitem__(-1, content))

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "Lines", lambda write, every: Lines(write, 0.0))
    with progress_bar() as show:
        for done in range(4):
            show("training", done, 3)
    assert [list(page) for page in pages] == [["text/plain"]]
    assert pages[0]["text/plain"].startswith("training: 3 of 3")
    assert capsys.readouterr() == ("", "")


def test_on_80_columns_a_long_word_gives_way_and_not_the_numbers():
    page = StringIO()
    with progress._bar(Console(file=page, width=80, force_terminal=True, color_system=None)) as show:
        show("epoch 300 of 300, best 70.2%, and more than there is room for", 300, 300)
    assert "300/300 0:00:00 left 0:00:00" in page.getvalue()
    assert "epoch 300 of 300, best 70.2%" in page.getvalue()


def test_a_shell_of_ipython_is_a_terminal_or_a_pipe(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not progress._is_in_notebook()
