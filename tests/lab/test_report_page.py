import json
import math
import re
from base64 import b64encode
from dataclasses import asdict, replace
from hashlib import sha256

import pytest
import torch
import yaml
from lab_folders import BASE, COSTS, EPSILONS, GAMMAS, HOSTILE, hostile_folder, sweep_folder, train_folder
from lab_pages import Reader, svg_texts

from gradreg import cli
from gradreg.lab import stats
from gradreg.lab.attach import attach
from gradreg.lab.config import RunConfig, from_mapping
from gradreg.lab.folder import BadInput, json_line, write_json
from gradreg.lab.methods import ASCENTS, METHODS
from gradreg.lab.records import sealed
from gradreg.lab.report.figures import costs_of, grid_of, line_of, scale_of
from gradreg.lab.report.folders import read
from gradreg.lab.report.page import page
from gradreg.lab.report.plots import Cell, Grid, Offer, Scale, cost_figure, front, heat_map, scatter_map
from gradreg.lab.report.snippets import as_python, as_yaml, configuration
from gradreg.lab.report.studies import number, share, text
from gradreg.lab.report.text import compare, findings, headline, heat_sentence

SAM = replace(BASE, method="SAM", rho=0.1)
F_GR = replace(BASE, method="F-GR", gamma=0.1, epsilon=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sweep_folder(tmp_path_factory.mktemp("report") / "sweep")


@pytest.fixture(scope="module")
def study(folder):
    (found,) = read(folder)
    return found


@pytest.fixture(scope="module")
def html(folder):
    return page(folder)


def lines(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


# What is read


def test_a_point_is_the_mean_of_its_runs(folder, study):
    rows = lines(folder)
    for point in study.points:
        same = [
            r["accuracy"]
            for r in rows
            if all(r[k] == v for k, v in point.config.items() if k != "seed") and r["scored_on"] == "validation"
        ]
        assert len(same) == 3
        assert point.validation == stats.mean_interval(same)


def test_the_best_is_the_highest_on_validation_and_the_test_numbers_are_its(folder, study):
    assert list(study.best) == ["SGD", "F-GR", "B-GR", "SAM"]
    for method, point in study.best.items():
        assert point.validation.mean == max(p.validation.mean for p in study.points if p.method == method)
        assert point.test == stats.mean_interval(
            [r["accuracy"] for r in lines(folder) if r["method"] == method and r["scored_on"] == "test"]
        )


def test_differences_are_paired_by_seed(folder, study):
    accuracy = {(r["method"], r["seed"]): r["accuracy"] for r in lines(folder) if r["scored_on"] == "test"}
    for row in compare(study, COSTS)[1:]:
        by_hand = stats.mean_interval([accuracy[row.method, s] - accuracy["SGD", s] for s in (2, 0, 1)])
        assert row.difference.mean == pytest.approx(by_hand.mean)
        assert row.difference.low == pytest.approx(by_hand.low)
        assert row.verdict == stats.verdict(by_hand)


def test_seeds_that_sgd_lacks_are_not_compared(folder, tmp_path):
    kept = [r for r in lines(folder) if not (r["scored_on"] == "test" and r["method"] == "SGD" and r["seed"] > 0)]
    study = reread(folder, kept, tmp_path)
    row = compare(study, {})[1]
    assert row.verdict == "one seed: undecided"
    assert math.isnan(row.difference.low)
    assert "With one seed there is no interval" in " ".join(findings(study, compare(study, {})))


def reread(folder, rows, tmp_path):
    """The study of other lines."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (found,) = read(tmp_path)
    return found


def test_a_run_that_is_there_twice_counts_once(folder, study, tmp_path):
    assert len(reread(folder, lines(folder) + lines(folder)[:5], tmp_path).runs) == len(study.runs)


def test_a_torn_line_is_left_out_and_noted(folder, study, tmp_path):
    whole = (folder / "runs.jsonl").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_text(whole[:-40], encoding="utf-8")
    (torn,) = read(tmp_path)
    assert len(torn.runs) == len(study.runs) - 1
    assert "runs.jsonl: line" in page(tmp_path)
    assert "left out, torn" in page(tmp_path)


def test_tasks_are_not_compared_with_each_other(tmp_path):
    sweep_folder(tmp_path / "a", methods=("SGD", "SAM"), seeds=range(2))
    sweep_folder(tmp_path / "b", methods=("SGD", "SAM"), seeds=range(2))
    train_folder(tmp_path / "c", SAM)
    train_folder(tmp_path / "d", replace(SAM, seed=1))
    train_folder(tmp_path / "e", replace(SAM, width=7))
    studies = read(tmp_path)
    assert [(s.name, len(s.runs)) for s in studies] == [("a", 18), ("b", 18), ("2 train runs", 2), ("e", 1)]
    assert studies[2].winner.test.mean == pytest.approx(sum(run.test for run in studies[2].runs) / 2)
    assert "4 studies in" in page(tmp_path)


def test_a_train_run_that_has_not_ended_is_drawn_and_not_compared(tmp_path):
    train_folder(tmp_path / "a", SAM)
    train_folder(tmp_path / "b", replace(SAM, seed=1), ended=False)
    (study,) = read(tmp_path)
    assert [math.isnan(run.validation) for run in study.runs] == [False, True]
    assert study.winner.validation.mean == study.runs[0].validation
    assert "it is drawn, but not compared" in page(tmp_path)
    assert "No run has been scored yet" in page(tmp_path / "b")


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.9", [1], {}, True, 10**400, -math.inf])
def test_what_is_not_a_number_is_nan(value):
    assert math.isnan(number(value))


def test_an_accuracy_lies_from_0_to_1():
    assert share(1) == 1
    assert math.isnan(share(1.01))
    assert math.isnan(share(-0.1))


def test_a_text_that_cannot_be_printed_is_escaped_and_a_long_one_cut():
    assert text("a\u202eb\ud800\n") == "a\\u202eb\\ud800\\n"
    assert len(text("x" * 5000)) == 201


# What is said


def test_the_headline_is_the_verdict(tmp_path, study):
    assert re.fullmatch(
        r"F-GR is better than tuned SGD by \d\.\d points of test accuracy", headline(study, compare(study, {}))
    )
    cases = {
        "none": ({"gain": -0.3}, "No method is ahead of SGD on validation rows"),
        "unread": ({"test": False}, "F-GR leads on validation rows; the test rows were not read"),
        "alone": ({"methods": ("SGD",)}, "Nothing was compared with SGD"),
    }
    for name, (options, expected) in cases.items():
        (found,) = read(sweep_folder(tmp_path / name, **options))
        assert headline(found, compare(found, {})) == expected
    (found,) = read(sweep_folder(tmp_path / "without", methods=("SAM",)))
    assert headline(found, compare(found, {})).endswith("there is no SGD to compare with")


def test_a_winner_on_validation_that_loses_on_test_is_called_worse(folder, tmp_path):
    rows = [
        {**r, "accuracy": r["accuracy"] - 0.2} if r["scored_on"] == "test" and r["method"] == "F-GR" else r
        for r in lines(folder)
    ]
    study = reread(folder, rows, tmp_path)
    assert headline(study, compare(study, {})) == "F-GR, best on validation rows, is worse than tuned SGD on test rows"


def test_a_difference_that_may_be_zero_is_not_called_better(folder, tmp_path):
    rows = [
        {**r, "accuracy": 0.7 + 0.1 * (r["seed"] % 2) * (r["method"] == "F-GR")} if r["scored_on"] == "test" else r
        for r in lines(folder)
    ]
    study = reread(folder, rows, tmp_path)
    assert headline(study, compare(study, {})).startswith("No difference is shown between F-GR")


def test_the_heat_map_has_every_cell_and_names_the_edge(study):
    grid = grid_of(study, "F-GR")
    assert (len(grid.rows), len(grid.columns)) == (len(GAMMAS), len(EPSILONS))
    for (row, column), cell in grid.cells.items():
        (point,) = (
            p
            for p in study.points
            if (p.method, p.config["gamma"], p.config["epsilon"]) == ("F-GR", GAMMAS[row], EPSILONS[column])
        )
        assert cell.mean == point.validation.mean
    assert grid.best[1] == len(EPSILONS) - 1
    said = heat_sentence(grid, study.best["SGD"].validation.mean)
    assert f"ε {EPSILONS[-1]:g}" in said
    assert "at the largest ε: the best may lie beyond" in said
    assert "1 with runs that diverged" in said
    assert grid_of(study, "SGD") is None


def test_a_method_of_ones_own_has_a_map_of_what_it_was_given(folder, tmp_path):
    rows = [{**r, "method": "bounded" if r["method"] == "F-GR" else r["method"]} for r in lines(folder)]
    grid, same = grid_of(reread(folder, rows, tmp_path), "bounded"), grid_of(read(folder)[0], "F-GR")
    assert {at: cell.mean for at, cell in grid.cells.items()} == {at: cell.mean for at, cell in same.cells.items()}
    (tmp_path / "three").mkdir()
    three = [{**r, "rho": 0.1} for r in rows]
    assert grid_of(reread(folder, three, tmp_path / "three"), "bounded") is None  # three settings are no plane


def test_cells_that_were_not_run_are_dashed(folder, tmp_path):
    kept = [r for r in lines(folder) if not (r["method"] == "F-GR" and r["gamma"] > 0.15 and r["epsilon"] > 0.5)]
    grid = grid_of(reread(folder, kept, tmp_path), "F-GR")
    assert len(grid.cells) == len(GAMMAS) * len(EPSILONS) - 2
    assert svg_texts(heat_map(grid, Scale(0.5, 0.9))).count("–") == 2


def test_the_ends_of_the_ranges_of_a_search_are_no_cells(folder, tmp_path):
    study = reread(folder, lines(folder), tmp_path)
    axes = study.sources[0].about["axes"]
    axes["gamma"] = [0.001, 10.0]
    assert grid_of(study, "F-GR").rows == [text(gamma) for gamma in GAMMAS]


def test_where_more_varied_a_cell_is_the_best(folder, tmp_path):
    rows = [
        {**r, "learning_rate": rate, "accuracy": r["accuracy"] - 0.1 * (rate != 0.1)}
        for r in lines(folder)
        for rate in (0.05, 0.1, 0.5)
        if r["method"] == "F-GR"
    ]
    grid, same = grid_of(reread(folder, rows, tmp_path), "F-GR"), grid_of(read(folder)[0], "F-GR")
    assert {at: cell.mean for at, cell in grid.cells.items()} == {at: cell.mean for at, cell in same.cells.items()}
    assert "Where learning rate varied as well" in page(tmp_path)


def test_the_figures_hold_the_numbers_and_no_image():
    grid = Grid("F-GR", "γ", "ε", ["0.1", "1"], ["0.3"], {(0, 0): Cell(0.712), (1, 0): Cell(math.nan, 2)}, (0, 0))
    svg = heat_map(grid, Scale(0.7, 0.8))
    assert {"71.2", "NaN", "γ", "ε", "0.3"} <= set(svg_texts(svg))
    assert "<image" not in svg
    many = {(k, k): Cell(0.7 + k / 100, k == 3) for k in range(9)}
    values = [f"{10 ** (k - 4):g}" for k in range(9)]
    points = Grid("F-GR", "γ", "ε", values, values, many, (8, 8))
    assert points.is_sparse
    assert not grid.is_sparse
    assert "<image" not in scatter_map(points, Scale(0.7, 0.8))


def test_colors_reach_from_the_lowest_to_the_highest_but_for_what_diverged():
    assert scale_of([0.7, 0.75, 0.8], sgd=0.65) == Scale(0.65, 0.8)
    assert scale_of([0.1] + [0.5 + k / 64 for k in range(20)], sgd=0.75) == Scale(0.5 + 1 / 64, 0.5 + 19 / 64)


def test_curves_are_means_over_the_runs_that_did_not_diverge(study):
    point = study.best["F-GR"]
    line = line_of("F-GR", point, "train_loss")
    losses = [run.curve[-1]["train_loss"] for run in point.runs]
    assert line.steps[-1] == 1200
    last = line.intervals[-1]
    assert last["mean"] == pytest.approx(math.exp(sum(map(math.log, losses)) / len(losses)))
    assert (last["low"], last["high"]) == (min(losses), max(losses))
    assert line_of("F-GR", point, "validation_accuracy") is None
    (broken,) = (p for p in study.points if p.num_diverged and p.method == "F-GR")
    assert line_of("F-GR", broken, "train_loss").steps[-1] == 1200


def test_curves_come_from_the_runs_that_recorded_most(folder, tmp_path):
    rows = [{**r, "trace": r["trace"][-1:]} if r["scored_on"] == "validation" else r for r in lines(folder)]
    study = reread(folder, rows, tmp_path)
    assert len(line_of("SGD", study.best["SGD"], "grad_norm").steps) == 11
    assert "recorded nothing on the way" not in page(tmp_path)
    reread(folder, [{**r, "trace": r["trace"][-1:]} for r in rows], tmp_path)
    assert "recorded nothing on the way" in page(tmp_path)


def test_the_front_is_what_nothing_beats():
    offers = [Offer(str(k), cost, mean, mean - 1, mean + 1) for k, (cost, mean) in enumerate(SCATTER)]
    dominated = {
        a.method
        for a in offers
        for b in offers
        if (b.cost <= a.cost and b.mean > a.mean) or (b.cost < a.cost and b.mean >= a.mean)
    }
    assert {offer.method for offer in front(offers)} == {offer.method for offer in offers} - dominated
    assert "<image" not in cost_figure(offers, "test accuracy (%)")


SCATTER = [(1, 70), (2, 75), (2.5, 75), (2.1, 74), (3, 75), (3, 76), (1.5, 60), (0.9, 70.5)]


def test_costs_are_the_sweeps_or_roughly_those_of_whole_train_runs(study, tmp_path):
    assert costs_of(study)[0] == {method: COSTS[method] for method in study.methods}
    train_folder(tmp_path / "a", SAM)
    train_folder(tmp_path / "b", BASE)
    costs, how = costs_of(read(tmp_path)[0])
    assert costs == {"SGD": 1.0, "SAM": pytest.approx(COSTS["SAM"])}
    assert "rough" in how


# What can be copied


CHEAP = {
    "ahead of a fraction": {"method": "F-GR", "fraction": 0.25, "lookahead": 0.5, "start": 0.4, "probability": 0.9},
    "SAM, every 2nd, ahead": {"method": "SAM", "lookahead": 0.5, "period": 2},
    "large gradients": {"method": "B-GR", "threshold": 0.5},
    "MSAM, late": {"method": "MSAM", "start": 0.3},
    "split, momentum": {"method": "Split", "ascent": "momentum"},
    "split, previous": {"method": "Split", "ascent": "previous"},
}
SNIPPETS = {
    **{method: {"method": method} for method in METHODS},
    **{f"{method}, normalized": {"method": method, "ascent": "normalized"} for method in ASCENTS},
    **CHEAP,
}


@pytest.mark.parametrize("name", SNIPPETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_python_snippet_trains_as_a_run_does(name, optimizer):
    values = {"gamma": 0.1, "epsilon": 0.5, "rho": 0.05, "level": 0.1}
    needs = {key: values[key] for key in METHODS[SNIPPETS[name]["method"]].needs}
    config = RunConfig(optimizer=optimizer, epochs=2, learning_rate=0.01, **SNIPPETS[name], **needs)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    names = {
        "model": model,
        "loader": [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(3)],
        "criterion": torch.nn.functional.cross_entropy,
    }
    exec(as_python(config), names)
    assert names["schedule"].last_epoch == 6
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    attached = attach(model, 6, config, names["optimizer"]).regularizer
    if attached is not None:
        found = names["regularizer"]
        attached.step, found.epsilon = 6, found.epsilon if callable(found.epsilon) else float(found.epsilon)
        assert repr(found) == repr(attached)


def test_the_yaml_is_the_configuration(html, study):
    reader = re.search(r'<code id="s1-yaml">(.*?)</code>', html, re.DOTALL)
    config = from_mapping(yaml.safe_load(reader[1]))
    assert config == configuration(study.winner)
    assert (config.method, config.gamma, config.seed) == ("F-GR", study.winner.config["gamma"], 0)
    assert from_mapping(yaml.safe_load(as_yaml(F_GR))) == F_GR


# The page


def test_the_page_loads_nothing_and_runs_its_own_script_alone(html):
    reader = Reader(html)
    for _, attrs in reader.tags:
        assert not any(name.startswith("on") for name in attrs)
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("xlink:href", "#").startswith("#")
        assert not {"src", "srcset", "action"} & attrs.keys()
    assert not {"link", "img", "image", "iframe", "object"} & {tag for tag, _ in reader.tags}
    (script,) = reader.scripts
    digest = b64encode(sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_sections_come_in_order(html):
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert titles == [
        "Validation accuracy over the settings",
        "Along training",
        "Accuracy against cost",
        "All points",
        "The best run",
        "Where the numbers come from",
    ]


def test_every_run_is_in_the_table(html, study):
    assert html.count('<tr data-method="') == len(study.points)
    assert html.count("<li>seed ") == len(study.runs)


def test_hostile_texts_and_numbers_stay_text(tmp_path):
    html = page(hostile_folder(tmp_path / '<img src=x onerror="alert(1)">'))
    reader = Reader(html)
    assert not {"img", "b", "image"} & {tag for tag, _ in reader.tags}
    assert len(reader.scripts) == 1
    assert HOSTILE[0] in reader.text
    assert HOSTILE[1] in reader.text
    assert "{{ 7 * 7 }}" in reader.text
    assert "\\u202eevil" in reader.text
    assert "\u202e" not in html
    assert "x" * 1000 not in html
    html.encode("utf-8")


def test_a_configuration_that_no_run_can_have_is_refused_and_not_offered(folder, tmp_path):
    rows = [{**r, "momentum": 7} for r in lines(folder)]
    reread(folder, rows, tmp_path)
    html = page(tmp_path)
    assert "momentum must be a number from 0 to 0.9999" in html
    assert "<pre" not in html


def test_a_thousand_runs_fit_in_a_megabyte(folder, tmp_path):
    rows = [{**r, "weight_decay": k / 1e4} for k in range(8) for r in lines(folder)]
    study = reread(folder, rows, tmp_path)
    assert len(study.runs) >= 1000
    assert len(page(tmp_path).encode()) < 1_000_000


def test_what_is_too_much_for_a_page_is_counted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gradreg.lab.report.page.MOST_POINTS", 10)
    monkeypatch.setattr("gradreg.lab.report.page.MOST_RUNS", 20)
    html = page(folder)
    assert html.count('<tr data-method="') == 10
    assert html.count("<li>seed ") == 20
    assert "37 points and 133 runs more are in the files" in html


# The command


def test_the_command_writes_one_page_and_replaces_only_its_own(folder, tmp_path, capsys):
    copy = tmp_path / "sweep"
    copy.mkdir()
    for name in ("config.json", "runs.jsonl", "results.json"):
        (copy / name).write_bytes((folder / name).read_bytes())
    assert cli.main(["report", str(copy)]) == 0
    assert "one page that stands alone" in capsys.readouterr().out
    assert {path.name for path in copy.iterdir()} == {"config.json", "runs.jsonl", "results.json", "report.html"}
    assert cli.main(["report", str(copy)]) == 0
    assert cli.main(["report", str(copy), "--out", str(tmp_path / "b.html")]) == 0
    (copy / "report.html").write_text("<p>mine</p>", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["report", str(copy)]) == 2
    assert "gradreg report did not make" in capsys.readouterr().err
    assert (copy / "report.html").read_text(encoding="utf-8") == "<p>mine</p>"


def test_bad_input_is_one_line_and_writes_nothing(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.html").write_text("x", encoding="utf-8")
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "report.html").touch()
    cases = {
        "DIR must be a folder of gradreg sweep": [str(tmp_path / "empty")],
        "which has its page already: ": [str(tmp_path / "demo")],
        "DIR must be a folder that can be read": [str(tmp_path / "nowhere")],
        "Not a directory": [str(tmp_path / "file.html")],
        "DIR must hold a finished run": [str(started)],
        "--out must end in .html": [str(folder), "--out", str(folder / "results.json")],
        "--out must lie in a folder that exists": [str(folder), "--out", str(tmp_path / "no" / "a.html")],
        "did not make": [str(folder), "--out", str(tmp_path / "file.html")],
    }
    before = sorted(tmp_path.rglob("*"))
    for expected, tokens in cases.items():
        assert cli.main(["report", *tokens]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert not (folder / "report.html").exists()


def test_the_fixture_is_what_a_run_writes(folder):
    """So that these tests say something about real folders."""
    expected = {
        *asdict(BASE),
        "task",
        "scored_on",
        "accuracy",
        "train_loss",
        "grad_norm",
        "trace",
        "diverged",
        "seconds",
        "num_scored",
    }
    assert set(lines(folder)[0]) == expected


@pytest.mark.parametrize(
    ("num_scored", "expected"), [(None, stats.BETTER), (10_000, stats.BETTER), (3, stats.UNDECIDED)]
)
def test_a_difference_within_a_test_row_is_none(num_scored, expected, tmp_path):
    folder = sweep_folder(tmp_path / "sweep", methods=("SGD", "F-GR"), gain=3.0)
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "runs.jsonl").write_text("".join(json_line({**row, "num_scored": num_scored}) for row in rows))
    (study,) = read(folder)
    assert [row.verdict for row in compare(study, {})] == ["", expected]


def changed(path, old, new):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


@pytest.fixture
def sealed_train(tmp_path):
    """A train run whose files carry their checks."""
    folder = train_folder(tmp_path / "runs" / "a", replace(BASE, epochs=3))
    train_folder(tmp_path / "runs" / "b", replace(BASE, epochs=3, seed=1))
    for name in ("config.json", "results.json"):
        write_json(folder / name, sealed(json.loads((folder / name).read_text(encoding="utf-8"))))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json_line(sealed(row)) for row in rows), encoding="utf-8")
    return folder


def notes_of(folder):
    return [note for study in read(folder) for source in study.sources for note in source.notes]


def test_records_with_a_check_are_read_as_those_without(sealed_train):
    (study,) = read(sealed_train.parent)
    assert notes_of(sealed_train.parent) == []
    assert [len(run.curve) for run in study.runs] == [3, 3]


def test_a_changed_line_is_left_out_and_noted(sealed_train):
    changed(sealed_train / "metrics.jsonl", b'"epoch": 2', b'"epoch": 7')
    assert notes_of(sealed_train) == ["metrics.jsonl: line 2 is left out, torn, changed or not a run; 2 are read."]
    assert [len(run.curve) for study in read(sealed_train) for run in study.runs] == [2]


def test_a_byte_that_is_no_text_spoils_its_line_alone(sealed_train):
    changed(sealed_train / "metrics.jsonl", b'"epoch": 1', b'"ep\xffch": 1')
    assert notes_of(sealed_train) == ["metrics.jsonl: line 1 is left out, torn, changed or not a run; 2 are read."]


def test_changed_results_are_left_out_and_noted(sealed_train):
    changed(sealed_train / "results.json", b'"test_accuracy": 0.', b'"test_accuracy": 0.9')
    (note,) = notes_of(sealed_train)
    assert note == "results.json was changed after it was written: its check does not fit; it is left out."
    assert all(run.test != run.test for study in read(sealed_train) for run in study.runs)


def test_of_a_changed_configuration_the_results_say_what_it_was(sealed_train):
    changed(sealed_train / "config.json", b'"epochs": 3', b'"epochs": 4')
    (study,) = read(sealed_train)
    assert study.runs[0].config["epochs"] == 3
    assert notes_of(sealed_train)[0].startswith("config.json was changed")


@pytest.mark.parametrize("content", [b"[]", b"\xff", b""])
def test_a_run_that_cannot_be_told_is_noted_beside_the_others(content, sealed_train):
    for name in ("config.json", "results.json"):
        (sealed_train / name).write_bytes(content)
    (study,) = read(sealed_train.parent)
    assert [run.seed for run in study.runs] == [1]
    assert [note.split()[0] for note in notes_of(sealed_train.parent)] == ["config.json", "results.json"]
    assert "config.json is not" in page(sealed_train.parent)
    with pytest.raises(BadInput, match=r"holds none\. config\.json is not"):
        read(sealed_train)


def test_a_page_that_does_not_fit_on_the_disk_leaves_nothing(sealed_train, monkeypatch, capsys):
    def full(handle):
        raise OSError(28, "No space left on device")

    before = sorted(sealed_train.iterdir())
    monkeypatch.setattr("gradreg.lab.folder.os.fsync", full)
    assert cli.main(["report", str(sealed_train)]) == 2
    assert "--out must be a file that can be written" in capsys.readouterr().err
    assert sorted(sealed_train.iterdir()) == before
