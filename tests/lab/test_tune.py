import json
from dataclasses import replace

import pytest

from gradreg.lab.commands import LAST_SEED
from gradreg.lab.runs import Result
from gradreg.studies import runs
from gradreg.studies.demo.tasks import TASKS
from gradreg.studies.demo.tune import FACTOR, FIRST_SEED, GRIDS, SHIPPED, START, around, of_method, of_sgd, tune

TASK = next(iter(TASKS.values()))


def test_what_is_shipped_covers_every_task_and_method():
    shipped = json.loads(SHIPPED.read_text(encoding="utf-8"))
    assert shipped["command"].startswith("gradreg tune")
    assert min(shipped["seeds"]) >= FIRST_SEED > LAST_SEED
    assert shipped["tasks"].keys() == TASKS.keys()
    for methods in shipped["tasks"].values():
        assert methods.keys() == GRIDS.keys()
        for name, chosen in methods.items():
            assert chosen["settings"] in GRIDS[name]
            assert chosen["trials"] <= methods["SGD"]["trials"]


def test_every_method_but_sgd_has_as_many_settings():
    assert {len(grid) for name, grid in GRIDS.items() if name != "SGD"} == {6}


def test_a_lattice_point_is_itself_again_on_the_way_back():
    there = next(p for p in around(START, FACTOR) if p["learning_rate"] < START["learning_rate"])
    assert START in around(there, FACTOR)
    assert len(set(map(str, around(START, FACTOR)))) == 8


def test_the_first_among_equals_wins():
    search = of_sgd()
    points = search.ask()
    for point in points:
        search.tell(point, [0.5])
    assert search.best == points[0] == START
    assert of_method("SAM", START).ask()[0] == {**START, "rho": 0.01}


@pytest.fixture
def landscape(monkeypatch):
    """Runs that are not trained: accuracy falls with the distance to a known best point."""
    asked = []

    def run_all(jobs, workers):
        asked.extend(jobs)
        for k, config in enumerate(job.config for job in jobs):
            distance = abs(config.learning_rate - 0.018 / 3) + abs(config.weight_decay - 2.7e-3 * 9)
            bonus = 0.1 if config.settings in ({"gamma": 0.2}, {"rho": 0.4}) else 0.0
            yield k, Result(0.8 - distance + bonus, 0.0, 0.0, [], False, 0.0)

    monkeypatch.setattr(runs, "run_all", run_all)
    return asked


def test_the_climb_finds_a_best_point_off_the_first_nine(landscape, tmp_path):
    choice = tune([TASK], [FIRST_SEED, FIRST_SEED + 1], tmp_path, 1, lambda *_: None)
    chosen = choice["tasks"][TASK.task]
    assert (chosen["SGD"]["learning_rate"], chosen["SGD"]["weight_decay"]) == pytest.approx((0.006, 0.0243))
    assert chosen["DB"]["settings"] == {"gamma": 0.2}
    assert chosen["SAM"]["settings"] == {"rho": 0.4}
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8")) == choice
    assert len((tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()) == len(landscape)


def test_tuning_scores_validation_rows_only(landscape, tmp_path):
    tune([TASK], [FIRST_SEED], tmp_path, 1, lambda *_: None)
    assert {job.scored_on for job in landscape} == {"validation"}
    assert {job.config.seed for job in landscape} == {FIRST_SEED}
    tried = [
        (c.method, c.learning_rate, c.weight_decay, *c.settings.items()) for c in (job.config for job in landscape)
    ]
    assert len(set(tried)) == len(tried), "nothing is tried twice"


def test_a_toy_task_is_tuned_for_real(tmp_path):
    choice = tune([replace(TASK, epochs=1, num_train=100)], [FIRST_SEED], tmp_path, 1, lambda *_: None)
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text(encoding="utf-8").splitlines()]
    of_sgd = [trial["accuracy"] for trial in trials if trial["method"] == "SGD"]
    assert choice["tasks"][TASK.task]["SGD"]["validation_accuracy"] == pytest.approx(max(of_sgd), abs=1e-4)
