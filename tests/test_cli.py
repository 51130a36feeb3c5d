"""The command line: what it prints, and what it refuses before any work."""

import subprocess
import sys

import pytest
from lab_folders import train_folder

import gradreg
from gradreg import cli
from gradreg.lab.config import RunConfig
from gradreg.studies.demo import run as demo

WHOLE = "must be a whole number from"
REFUSED = [
    ("demo --seeds abc", f"--seeds {WHOLE} 2 to 100, got 'abc'"),
    ("demo --seeds 1", f"--seeds {WHOLE} 2 to 100, got '1'"),
    ("demo --seeds -3", f"--seeds {WHOLE} 2 to 100, got '-3'"),
    ("demo --seeds 2.5", f"--seeds {WHOLE} 2 to 100, got '2.5'"),
    ("demo --seeds", "--seeds requires an argument"),
    ("demo --seed 1000000", f"--seed {WHOLE} 0 to 999999, got '1000000'"),
    ("demo --seed 999999", f"--seed {WHOLE} 0 to 999994 with 6 seeds, got '999999'"),
    ("demo --workers 0", f"--workers {WHOLE} 1 to 64, got '0'"),
    ("demo --quick=maybe", "--quick"),
    ("demo --nonsense", "Unknown option: --nonsense"),
    ("demo stray", "stray"),
    ("demo --out full", "--out must be a new or empty folder, got 'full'"),
    ("demo --out full/file", "--out must be a new or empty folder, got 'full/file'"),
    ("demo --out full/file/below", "--out must be a folder that can be written to, got 'full/file/below'"),
    ("demo --out a\x1bb", "--out must be a path of printable characters, got 'a\\x1bb'"),
    ("tune --seeds 99", f"--seeds {WHOLE} 2 to 20, got '99'"),
    ("tune --out full", "--out must be a new or empty folder, got 'full'"),
    ("nonsense", 'Unknown command "nonsense"'),
    ("trian", 'Unknown command "trian". Did you mean "train"?'),
    ("help trian", 'Unknown command "trian". Did you mean "train"?'),
    ("cost --models mlp,resnet", "got 'resnet'. Did you mean resnet18?"),
    ("sharpness full --part tests", "--part must be one of train, validation, test, got 'tests'. Did you mean test?"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious", encoding="utf-8")


@pytest.mark.parametrize(("line", "expected"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_input_is_refused_in_one_line(line, expected, capsys, tmp_path):
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/file"]


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{gradreg.__version__}\n"


@pytest.mark.parametrize("command", ["", "demo", "tune"])
def test_help(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert f"Usage: gradreg {command}".strip() in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", "train", "sweep"])
def test_help_is_a_word_too(command, capsys):
    printed = []
    for line in (f"{command} --help", f"help {command}"):
        assert cli.main(line.split()) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


WITHOUT_TORCH = {
    "--help": 0,
    "help": 0,
    "--version": 0,
    **{f"{command} --help": 0 for command in ("train", "sweep", "report", "cost", "sharpness", "demo", "claims")},
    "trian": 2,
    "train --gama 1": 2,
    "train --gamma 1": 2,
    "train --method fgrr": 2,
    "train --config full/file": 2,
    "report full": 2,
    "report run": 0,
}


def test_who_asks_mistypes_or_reads_does_not_wait_for_torch(tmp_path):
    train_folder(tmp_path / "run", RunConfig(epochs=2))
    code = (
        "import sys; from gradreg.cli import main\n"
        f"for line, status in {WITHOUT_TORCH!r}.items():\n"
        "    assert (main(line.split()), 'torch' in sys.modules) == (status, False), line"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("line", "seeds", "num_tasks"),
    [
        ("demo", range(6), 4),
        ("demo --quick", range(3), 1),
        ("demo --quick --seed 7 --seeds 4", range(7, 11), 1),
    ],
)
def test_the_plan_of_a_demo(line, seeds, num_tasks, monkeypatch):
    plans = []
    monkeypatch.setattr(demo, "run_demo", lambda plan, folder, workers: plans.append(plan))
    assert cli.main([*line.split(), "--out", "new"]) == 0
    assert plans[0].seeds == tuple(seeds)
    assert len(plans[0].tasks) == num_tasks


def test_an_interrupt_says_where_the_finished_runs_are(monkeypatch, capsys):
    def interrupt(plan, folder, workers):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert cli.main(["demo", "--out", "new"]) == 130
    assert "new/runs.jsonl" in capsys.readouterr().err


def test_a_missing_extra_names_the_install_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_NEEDED", ("no_such_package",))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err.strip().endswith("in a clone of gradreg, pip install '.[lab]'")


LONG = "x" * 5000
TOO_LONG = [
    ("demo --out {long}", "--out must be a folder that can be written to"),
    ("demo --out new/below/{name}", "--out must be a folder that can be written to"),
    ("train --config {long}", "--config must be a YAML file that can be read"),
    ("train --resume {long}", "--resume must be the folder of a run of gradreg train"),
    ("train --out {long}", "--out must be a folder that can be written to"),
    ("train --data cifar10 --path {long}", "path must be cifar-10-binary.tar.gz or the folder that holds it"),
    ("train --data idx --path {long}", "path must be a folder with IDX files"),
    ("train --data images --path {long}", "path must be a folder with one subfolder of images for each class"),
    ("sweep {long}", "CONFIG must be a YAML file that can be read"),
    ("sweep --resume {long}", "--resume must be the folder of a sweep"),
    ("report {long}", "DIR must be a folder that can be read"),
    ("report full --out {long}.html", "DIR must be a folder of gradreg sweep"),
    ("report full --out {long}/a.html", "--out must lie in a folder that exists"),
    ("sharpness {long}", "the path must be the folder of a run"),
    ("claims --write {name}.md", "--write must be a page that can be written"),
    ("frontier --write {long}/a.md", "--write must be a page in a folder that exists"),
]


@pytest.mark.parametrize(("line", "expected"), TOO_LONG, ids=[line for line, _ in TOO_LONG])
def test_a_path_that_is_too_long_is_one_line(line, expected, capsys, tmp_path):
    pytest.importorskip("PIL")
    assert cli.main(line.format(long=LONG, name="x" * 300).split()) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["full", "full/file"]


def test_a_full_disk_is_one_line_and_says_what_is_kept(monkeypatch, capsys):
    def full(plan, folder, workers):
        raise OSError(28, "No space left on device", "new/.results.json.partial")

    monkeypatch.setattr(demo, "run_demo", full)
    assert cli.main(["demo", "--out", "new"]) == 1
    said = "gradreg: No space left on device; finished runs are kept in new/runs.jsonl.\n"
    assert capsys.readouterr().err == said


def test_what_the_system_refuses_is_one_line(monkeypatch, capsys):
    def refuse(tokens):
        raise PermissionError(13, "Permission denied", "a\nb")

    monkeypatch.setattr(cli, "_run", refuse)
    assert cli.main([]) == 1
    assert capsys.readouterr().err == "gradreg: Permission denied ('a\\nb').\n"


@pytest.mark.parametrize("module", ["gradreg.cli", "gradreg.lab.output", "cyclopts", "torch"])
def test_an_interrupt_while_modules_are_read_is_one_line(module, tmp_path):
    """As Python raises it at any line: here at the import of a module."""
    code = (
        "import builtins, runpy, sys\n"
        "real = builtins.__import__\n"
        "def interrupt(name, *rest, **named):\n"
        f"    if name == {module!r}:\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *rest, **named)\n"
        "builtins.__import__ = interrupt\n"
        "sys.argv = ['gradreg', 'demo', '--out', 'new']\n"
        "runpy.run_module('gradreg', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "gradreg: interrupted; nothing was started.\n")
    assert not (tmp_path / "new").exists()
