"""Reports of tasks of the user's own: another score, which may be better where it is lower."""

import json
import math
import random
import re
import textwrap
from dataclasses import asdict, replace

import pytest
import yaml
from lab_folders import ABOUT, EPSILONS, HOSTILE, RHOS
from lab_pages import Reader, svg_texts

from gradreg import cli
from gradreg.lab import stats
from gradreg.lab.config import RunConfig, from_mapping
from gradreg.lab.folder import append_line, write_json
from gradreg.lab.metric import Metric
from gradreg.lab.report.figures import grid_of, heat_maps, scale_of
from gradreg.lab.report.folders import read
from gradreg.lab.report.page import page
from gradreg.lab.report.plots import Cell, Grid, Offer, Scale, front, heat_map
from gradreg.lab.report.snippets import as_python, as_yaml
from gradreg.lab.report.text import compare, findings, headline, heat_sentence
from gradreg.lab.words import gap, score

RMSE, AUC = Metric("rmse", higher_is_better=False), Metric("auc", higher_is_better=True)
OWN = RunConfig(file="mine.py:task", epochs=5)
RATIOS = (0.05, 0.1, 0.3, 1.0)
COSTS = {"SGD": 1.0, "F-GR": 2.0, "SAM": 2.1}


def rmse(config, part="validation"):
    """Least at a ratio of 0.3 and a large ε; SAM's lies above SGD's."""
    noise = random.Random(f"{config.seed}").gauss(0, 0.002) + random.Random(f"{config}{part}").gauss(0, 0.001)
    lift = {"SGD": 0.0, "F-GR": 0.1, "SAM": -0.05}[config.method]
    lift -= 0.02 * math.log((config.ratio or 0.3) / 0.3) ** 2 - 0.01 * math.log((config.epsilon or 1) / 1)
    lift -= 0.01 * math.log((config.rho or 0.1) / 0.1) ** 2
    return 1.3 - lift + noise


def configs():
    for seed in range(3):
        yield replace(OWN, seed=seed)
        for rho in RHOS:
            yield replace(OWN, method="SAM", rho=rho, seed=seed)
        for ratio in RATIOS:
            for epsilon in EPSILONS:
                yield replace(OWN, method="F-GR", ratio=ratio, epsilon=epsilon, seed=seed)


def line(config, part, value, **more):
    measured = {"train_loss": 0.5, "grad_norm": 0.1, "diverged": False, "seconds": 2.0, "trace": []}
    return {**asdict(config), "task": config.task, "scored_on": part, "score": value, **measured, **more}


def sweep_of(folder, metric=RMSE, of=rmse):
    folder.mkdir(parents=True)
    about = {"command": "gradreg sweep a.yaml --task mine.py", **ABOUT, "base": asdict(OWN), "metric": metric.as_row()}
    write_json(folder / "config.json", {**about, "axes": {"ratio": RATIOS, "epsilon": EPSILONS}, "seeds": [0, 1, 2]})
    for config in configs():
        append_line(folder / "runs.jsonl", line(config, "validation", of(config)))
        if config.ratio in (None, 0.3) and config.epsilon in (None, 1.0) and config.rho in (None, 0.1):
            append_line(folder / "runs.jsonl", line(config, "test", of(config, "test")))
    results = {**json.loads((folder / "config.json").read_text()), "seconds": 9.0, "costs": COSTS}
    write_json(folder / "results.json", results)
    return folder


def train_of(folder, config, metric=RMSE):
    folder.mkdir(parents=True)
    about = {"command": "gradreg train mine.py", **ABOUT, "config": asdict(config), "metric": metric.as_row()}
    found = {"train_loss": 0.4, "grad_norm": 0.2, "seconds": 3.0}
    write_json(folder / "config.json", about)
    for epoch in range(1, 6):
        row = {"epoch": epoch, "step": 10 * epoch, "validation_score": rmse(config) + 1 / epoch, **found}
        append_line(folder / "metrics.jsonl", row)
    scores = {"validation_score": rmse(config), "test_score": rmse(config, "test")}
    write_json(folder / "results.json", {**about, **found, **scores, "diverged": False})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sweep_of(tmp_path_factory.mktemp("scores") / "sweep")


@pytest.fixture(scope="module")
def study(folder):
    (found,) = read(folder)
    return found


def told(html):
    """The text of a page, without the one share that is no score."""
    return Reader(html).text.replace("95% interval", "").replace("at 95%", "")


def test_the_best_is_the_lowest(study):
    assert study.metric == RMSE
    for method, point in study.best.items():
        assert point.validation.mean == min(p.validation.mean for p in study.points if p.method == method)
    assert study.winner.method == "F-GR"
    rows = compare(study, COSTS)
    assert [row.verdict for row in rows] == ["", stats.BETTER, stats.WORSE]
    assert rows[1].difference.mean < 0
    assert re.fullmatch(r"F-GR is better than SGD by 0\.\d+ in test rmse", headline(study, rows))
    said = " ".join(findings(study, rows))
    assert "Compared on mine.py:task, 5 epochs: SGD, F-GR and SAM" in said
    assert re.search(r"Difference to SGD, seed by seed: −0\.\d+ \(−0\.\d+ to −0\.\d+\): better\.", said)
    assert re.search(
        r"Better than SGD: F-GR \(−0\.\d+\); worse than SGD: SAM \(\+0\.\d+\) \(rmse minus SGD's 1\.3", said
    )


def test_the_page_speaks_of_the_score_alone(folder):
    html = page(folder)
    assert "%" not in told(html)
    assert "accuracy" not in told(html).lower()
    assert re.findall(r"<h3>(.*?)</h3>", html)[:3] == [
        "Validation rmse over the settings",
        "Along training",
        "rmse against cost",
    ]
    assert "nothing to its left reaches as low" in html
    assert 'aria-sort="ascending">validation rmse</th>' in html
    assert "the plain loss" not in html  # no curves in this sweep
    rows = [float(value) for value in re.findall(r'<bdi>[^<]*</bdi></td><td data-value="([^"]*)"', html)]
    assert rows == sorted(rows)


def test_the_map_of_a_ratio_is_framed_and_bright_at_the_lowest(study):
    grid = grid_of(study, "F-GR")
    assert (grid.row_label, grid.column_label) == ("ratio", "ε")
    assert grid.rows == ["0.05", "0.1", "0.3", "1"]
    assert len(grid.cells) == len(RATIOS) * len(EPSILONS)
    assert grid.cells[grid.best].mean == min(cell.mean for cell in grid.cells.values())
    assert "ratio" in study.columns
    said = heat_sentence(grid, study.best["SGD"].validation.mean)
    assert re.search(r"Best at ratio 0\.3, ε 1 \(1\.\d\d\), at the largest ε.*; \d+ of 16 below SGD's 1\.3\d", said)
    maps = heat_maps(study, "s")
    assert "lower is better" in maps.reading
    assert {f"{cell.mean:#.3g}" for cell in grid.cells.values()} <= set(svg_texts(heat_map(grid, Scale(1.4, 1.2))))


def test_the_bright_end_of_the_colors_is_the_better_one():
    scale = scale_of([0.7, 0.75, 0.8], 0.65, RMSE)
    assert scale == Scale(0.8, 0.65)
    luminance = [sum(scale.color(mean)) for mean in (0.8, 0.72, 0.65)]
    assert luminance == sorted(luminance)
    assert scale_of([90.0] + [0.5 + k / 64 for k in range(20)], 0.75, RMSE) == Scale(0.5 + 18 / 64, 0.5)


def test_the_front_goes_down_where_lower_is_better():
    offers = [Offer("a", 1, 0.7, 0.7, 0.7), Offer("b", 2, 0.8, 0.8, 0.8), Offer("c", 3, 0.6, 0.6, 0.6)]
    assert [offer.method for offer in front(offers, RMSE)] == ["a", "c"]
    assert [offer.method for offer in front(offers, AUC)] == ["a", "b"]


def test_higher_may_be_better_and_a_score_may_be_negative(tmp_path):
    html = page(sweep_of(tmp_path / "a", AUC, lambda *of: -rmse(*of)))
    assert re.search(r"F-GR is better than SGD by 0\.\d+ in test auc", html)
    assert "nothing to its left reaches as high" in html
    assert 'aria-sort="descending">validation auc</th>' in html
    assert "−1.2" in html
    assert "%" not in told(html)


def test_train_runs_have_curves_of_the_score_and_metrics_are_not_mixed(tmp_path):
    sam = replace(OWN, method="SAM", rho=0.1)
    for k, config in enumerate([OWN, replace(OWN, seed=1), sam, replace(sam, seed=1)]):
        train_of(tmp_path / f"a{k}", config)
    (study,) = read(tmp_path)
    assert study.winner.method == "SGD"
    html = page(tmp_path)
    assert "Validation rmse</h4>" in html
    assert "the plain loss, on logarithmic axes" in html
    assert re.search(r"Ends lowest with SGD \(1\.\d+\), highest with SAM \(1\.\d+\)", html)
    assert "%" not in told(html)
    assert "accuracy" not in told(html).lower()
    (tmp_path / "a3" / "results.json").unlink()  # one that has not ended is of the same study
    assert [math.isnan(run.validation) for run in read(tmp_path)[0].runs] == [False, False, False, True]
    train_of(tmp_path / "b", OWN, AUC)
    train_of(tmp_path / "c", replace(OWN, file="mine.py:other"))
    assert [(s.metric.name, s.task["file"], len(s.runs)) for s in read(tmp_path)] == [
        ("rmse", "mine.py:task", 4),
        ("auc", "mine.py:task", 1),
        ("rmse", "mine.py:other", 1),
    ]


def test_a_point_with_a_run_without_a_score_is_not_the_best(folder, tmp_path):
    rows = [json.loads(text) for text in (folder / "runs.jsonl").read_text().splitlines()]
    best = [r for r in rows if (r["method"], r["ratio"], r["epsilon"], r["seed"]) == ("F-GR", 0.3, 1.0, 1)]
    assert [r["scored_on"] for r in best] == ["validation", "test"]
    for row in best:
        row |= {"score": None, "train_loss": None, "diverged": True}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (study,) = read(tmp_path)
    spoiled = study.best["F-GR"]  # the one that was read on test rows
    assert (spoiled.validation, spoiled.test) == (None, None)
    assert study.winner.method == "SGD"
    assert {row.method: row.verdict for row in compare(study, {})}["F-GR"] == "no score"
    grid = grid_of(study, "F-GR")
    assert (grid.rows[grid.best[0]], grid.columns[grid.best[1]]) != ("0.3", "1")
    assert "no score; 1 diverged" in page(tmp_path)


@pytest.mark.parametrize("name", [*HOSTILE, "", None, 7, ["a"], "$\\frac{1"])
def test_a_hostile_name_of_a_score_stays_text(name, tmp_path):
    folder = sweep_of(tmp_path / "a", Metric(name, higher_is_better=False))
    reader = Reader(page(folder))
    assert len(reader.scripts) == 1
    assert not {"img", "b", "image"} & {tag for tag, _ in reader.tags}
    assert not any(key.startswith("on") for _, attrs in reader.tags for key in attrs)
    if name == HOSTILE[0]:
        assert HOSTILE[0][:40] in reader.text
    assert "x" * 50 not in reader.text


@pytest.mark.parametrize("value", [1e299, -1e299, "0.5", [1], True, 10**400])
def test_scores_of_any_size_make_a_page(value, folder, tmp_path):
    rows = [json.loads(text) for text in (folder / "runs.jsonl").read_text().splitlines()]
    rows[3]["score"] = value
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "rmse" in page(tmp_path)


def test_what_is_copied_names_the_file_and_no_data():
    config = replace(OWN, method="F-GR", ratio=0.3, epsilon=1.0)
    text = as_yaml(config)
    assert text.startswith(
        "# The file is named on the command line:\n# gradreg train mine.py --config best.yaml\nfile: mine.py:task\n"
    )
    assert from_mapping(yaml.safe_load(text)) == config
    assert not {"data", "model", "augment", "random_labels"} & yaml.safe_load(text).keys()
    assert "gradreg train mine.py:other --config" in as_yaml(replace(config, file="mine.py:other"))
    python = as_python(config)
    assert "gradreg.TargetRatio(0.3" in python
    assert "torch.optim" not in python  # the optimizer is the task's own


def test_a_method_of_the_users_own_is_shown_and_not_offered(folder, tmp_path):
    rows = [json.loads(text) for text in (folder / "runs.jsonl").read_text().splitlines()]
    rows = [{**r, "method": "bounded", "gamma": 0.1} if r["method"] == "F-GR" else r for r in rows]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = page(tmp_path)
    assert "bounded is better than SGD" in html
    assert "its configuration is not one that <code>gradreg train</code> takes: method must be one of" in html


def test_words_of_a_score_without_an_interval():
    one = stats.Interval(0.0773, math.nan, math.nan)
    assert (score(one, RMSE), gap(one, RMSE)) == ("0.0773", "+0.077")
    assert score(stats.Interval(-1.5, -1.6, -1.4), AUC) == "−1.50 ± 0.10"
    grid = Grid("SAM", "", "ρ", [""], ["1"], {(0, 0): Cell(math.nan)}, None, RMSE)
    assert heat_sentence(grid, None) == "No cell has a validation rmse."


MINE = """
    import torch
    from torch import nn
    from torch.nn import functional as F
    from gradreg.lab import Task

    def rmse(outputs, targets):
        return (outputs - targets).square().mean().sqrt()

    def task():
        x = torch.randn(60, 4)
        y = x.sum(1, keepdim=True)
        return Task(model=lambda: nn.Linear(4, 1), train=(x[:40], y[:40]), validation=(x[40:50], y[40:50]),
                    test=(x[50:], y[50:]), loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]),
                    score=rmse, higher_is_better=False, epochs=2, batch_size=10, learning_rate=0.05)
"""
GRID = """
grid:
- {method: SGD, learning_rate: [0.01, 0.05]}
- {method: F-GR, ratio: [0.1, 0.3], epsilon: [0.1, 1]}
seeds: 2
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "grid.yaml").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_and_a_run_of_a_file_are_reported(mine, capsys):
    assert cli.main(["sweep", "grid.yaml", "--task", "mine.py", "--workers", "1", "--out", "s"]) == 0
    assert cli.main(["train", "mine.py", "--method", "F-GR", "--ratio", "0.3", "--epsilon", "0.1", "--out", "t"]) == 0
    assert json.loads((mine / "s" / "config.json").read_text())["metric"] == RMSE.as_row()
    assert json.loads((mine / "t" / "config.json").read_text())["metric"] == RMSE.as_row()
    for name in ("s", "t"):
        assert cli.main(["report", name]) == 0
        text = told((mine / name / "report.html").read_text(encoding="utf-8"))
        assert "rmse" in text
        assert "%" not in text
        assert "accuracy" not in text.lower()
    (study,) = read(mine / "s")
    ended = json.loads((mine / "s" / "results.json").read_text())
    for method, point in study.best.items():
        assert point.validation.mean == pytest.approx(ended["best"][method]["validation_score"]["mean"])
        assert point.test.mean == pytest.approx(ended["test"][method]["score"]["mean"])
    (mine / "best.yaml").write_text(
        re.search(r'id="s1-yaml">(.*?)</code>', (mine / "t" / "report.html").read_text(), re.S)[1]
    )
    assert cli.main(["train", "mine.py", "--config", "best.yaml", "--out", "again"]) == 0
    capsys.readouterr()


# Comparisons


def test_the_page_of_a_comparison_is_written_anew(mine, capsys):
    options = ["--methods", "F-GR", "--trials", "2", "--seeds", "2", "--workers", "1", "--no-opponent"]
    assert cli.main(["compare", "mine.py", *options, "--out", "c"]) == 0
    written = (mine / "c" / "report.html").read_text(encoding="utf-8")
    (mine / "c" / "report.html").write_text(written.replace("<h1>", "<h1>Old: "), encoding="utf-8")
    assert cli.main(["report", "c"]) == 0
    assert (mine / "c" / "report.html").read_text(encoding="utf-8") == written
    assert cli.main(["report", "c", "--out", "d.html"]) == 0
    assert (mine / "d.html").read_text(encoding="utf-8") == written
    train_of(mine / "t", OWN)
    capsys.readouterr()
    assert cli.main(["report", "t", "--out", "d.html"]) == 2  # a comparison's page is replaced by its own alone
    assert "did not make" in capsys.readouterr().err

    changed = (mine / "c" / "results.json").read_text(encoding="utf-8").replace('"num_runs": ', '"num_runs": 1')
    (mine / "c" / "results.json").write_text(changed, encoding="utf-8")
    assert cli.main(["report", "c"]) == 2
    assert "whose results.json was changed" in capsys.readouterr().err
    (mine / "c" / "results.json").unlink()
    assert cli.main(["report", "c"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "DIR must be a comparison that has ended, got 'c': go on with: gradreg compare mine.py --resume c" in error
    assert cli.main(["compare", "mine.py", "--resume", "c", "--workers", "1"]) == 0
    assert cli.main(["report", "c"]) == 0
