import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from printed import tables_fit

from gradreg.cli import main
from gradreg.lab import stats
from gradreg.lab.batched.speed import ALL_THREADS, BATCHED, EACH_CORE, GridSpeed
from gradreg.lab.config import RunConfig
from gradreg.lab.cost import report as cost_report
from gradreg.lab.cost import steps as costs
from gradreg.lab.cost.figure import figure
from gradreg.lab.cost.grid import GridPlan, run_grid, verdict
from gradreg.lab.cost.measure import CASES, COMPARED, LEAST_ROUNDS, PREDICTED, Plan, mlp_case, run_cost
from gradreg.lab.page import tell
from gradreg.lab.tables import WIDTH
from gradreg.lab.tasks import trained

LAST = torch.channels_last


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Results and folder of a real measurement of two small cases."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch:
        gpt = CASES["gpt"]
        small = replace(gpt, config=replace(gpt.config, width=16, depth=1, batch_size=2), num_classes=9)
        patch.setitem(CASES, "gpt", small)
        return run_cost(Plan(models=("mlp", "gpt"), depths=(2, 3), rounds=6), folder), folder


def test_the_folder_holds_what_was_measured(toy):
    results, folder = toy
    assert {path.name for path in folder.iterdir()} == {"config.json", "results.json", "cost.svg", "report.html"}
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(results))
    assert [case["name"] for case in stored["cases"]] == ["MLP, 2 layers", "MLP, 3 layers", "GPT, 4 layers"]
    assert stored["command"].startswith("gradreg cost --models mlp,gpt --depths 2,3 --rounds 6 --threads 1")
    assert "CPU cores" in stored["machine"]
    assert stored["clock"] == "processor time"
    for case in stored["cases"]:
        assert set(case["methods"]) == set(COMPARED)
        for row in (*(row["time"] for row in case["methods"].values()), case["db_over_f_gr"]):
            assert 0 < row["low"] <= row["median"] <= row["high"]


def test_flops_are_those_of_counting_products(toy):
    results, _ = toy
    two, three, _ = results["cases"]
    rows, width, classes = 128, 512, 10
    # Forward and the gradients of weights: 4 for each weight; of the inputs: 2, but not in the first layer.
    first, middle, last = width * width, width * width, width * classes
    assert two["methods"]["SGD"]["flops"] == rows * (4 * first + 6 * last)
    assert three["methods"]["SGD"]["flops"] == rows * (4 * first + 6 * middle + 6 * last)
    for case in results["cases"]:
        for name in ("F-GR", "B-GR", "Central", "SAM"):
            assert case["methods"][name]["flops_ratio"] == PREDICTED[name]
    assert results["cases"][-1]["methods"]["DB"]["flops_ratio"] == pytest.approx(3, abs=0.15)


def test_memory_holds_weights_gradients_momentum_and_one_more_copy(toy):
    results, _ = toy
    for case in results["cases"][:2]:
        weights = 4 * case["parameters"]
        peak = {name: row["peak_bytes"] for name, row in case["methods"].items()}
        assert peak["SGD"] > 3 * weights
        assert 0.9 * weights < peak["SAM"] - peak["SGD"] < 2.1 * weights  # small models may hold one copy more
        assert peak["DB"] > peak["SAM"]


def test_the_page_has_the_figure_with_labels_and_a_sentence(toy):
    results, folder = toy
    text = (folder / "cost.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for part in (
        "layers",
        "time of a step, over SGD's",
        "peak memory of a step",
        "counting products",
    ):
        assert part in text
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.count("<svg") == 1
    assert "A step of F-GR takes" in report
    for model in ("mlp", "gpt"):
        alone = {**results, "cases": [case for case in results["cases"] if case["model"] == model]}
        assert figure(alone).count("<svg") == 1


def test_the_tables_show_each_case_and_what_counting_predicts(toy, capsys):
    results, folder = toy
    with tables_fit():
        tell(cost_report.told(results), results, folder)
    printed = capsys.readouterr().out
    for case in results["cases"]:
        assert printed.count(case["name"]) >= 3
        assert f"{case['db_over_f_gr']['median']:.2f}" in printed
    assert "counting products" in printed
    assert max(map(len, printed.replace(str(folder), "").splitlines())) <= WIDTH


def test_the_sentence_says_where_db_costs_less(toy):
    results, _ = toy
    by_ratio = [(0.5, 0.9), (1.1, 1.2), (0.9, 1.1)]
    cases = [
        {**case, "db_over_f_gr": {"median": (low + high) / 2, "low": low, "high": high}}
        for case, (low, high) in zip(results["cases"], by_ratio)
    ]
    says = cost_report.sentence({**results, "cases": cases})
    assert "more than F-GR in 1 of 3 cases, less in 1 (MLP, 2 layers)" in says


def test_rounds_are_paired_and_the_order_rotates():
    now, order = [0.0], []

    def step(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    steps = {"a": step("a", 1), "b": step("b", 2), "c": step("c", 4)}
    seconds = costs.paired_seconds(steps, 3, lambda: now[0], warm_up=2)
    assert seconds == {"a": [1] * 3, "b": [2] * 3, "c": [4] * 3}
    rounds = ["".join(order[k : k + 3]) for k in range(0, 15, 3)]
    assert rounds == ["bca", "cab", "abc", "bca", "cab"]


def test_the_interval_of_the_median_holds_what_it_promises():
    """Of medians of 15 exponential ratios, 95% of the intervals hold the true median, ln 2."""
    held = 0
    for seed in range(60):
        torch.manual_seed(seed)
        found = stats.median_ratio(torch.empty(15).exponential_().tolist(), [1.0] * 15)
        held += found.low <= 0.6931 <= found.high
    assert 50 <= held < 60


def test_peak_memory_counts_what_is_held_and_what_is_passing():
    def make():
        kept = []

        def step():
            if not kept:
                kept.append(torch.empty(1000))
            passing = torch.empty(500)
            del passing
            torch.empty(300)

        return step

    assert costs.peak_bytes(make) == 4 * 1500


def test_the_models_are_those_that_are_named():
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in c.task(0).build(0).parameters()) for name, c in CASES.items()}
    assert 11.1e6 < sizes["resnet18"] < 11.2e6
    assert 36.4e6 < sizes["wideresnet"] < 36.6e6
    assert len({*sizes.values()}) == len(CASES)


@pytest.mark.parametrize("model", ["vit", "gpt"])
def test_a_step_of_every_method_moves_the_weights(model):
    case = CASES[model]
    config = replace(case.config, depth=1, width=16, batch_size=2)
    task = replace(case, config=config).task(0)
    for name, settings in COMPARED.items():
        step = costs.make_step(replace(config, method=name, **settings), task)
        assert costs.count_flops(step) > 0


def test_a_step_is_made_in_the_precision_and_layout_of_its_run_and_on_what_is_compiled(monkeypatch):
    found, called = [], []
    monkeypatch.setattr(torch, "compile", lambda model: called.append(model) or model)
    config = RunConfig(data="digits", model="cnn", width=4, batch_size=10, channels_last=True)
    for precision, is_compiled in (("fp32", True), ("bf16", False)):
        task = trained(config)

        def loss(model, batch, task=task):
            found.append((model(batch[0]).dtype, next(model.parameters()).is_contiguous(memory_format=LAST)))
            return task.objective.loss(model, batch)

        task = replace(task, loss=loss)
        costs.make_step(replace(config, precision=precision, compile=is_compiled), task)()
    assert found == [(torch.float32, True), (torch.bfloat16, True)]
    assert len(called) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["SGD", "F-GR", "SAM", "DB"])
def test_a_captured_step_is_the_step_itself(method):
    device, config = torch.device("cuda"), RunConfig(data="digits", model="cnn", width=4, batch_size=10, warmup=0.0)
    config = replace(config, method=method, **COMPARED[method])
    models, task = [], trained(config)

    def keeping():
        models.append(task.model())
        return models[-1]

    own = replace(task, model=keeping)
    plain, in_a_graph = (costs.make_step(config, own, device) for _ in range(2))
    for _ in range(costs.WARM_UP + 2):
        plain()
    replay = costs.captured(in_a_graph)  # its warm-up is made, the captured one is not
    replay(), replay()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_quick_takes_a_quarter_of_the_batch_except_for_the_mlp():
    full, quick = Plan(), Plan(is_quick=True)
    for a, b in zip(full.cases, quick.cases):
        expected = a.config.batch_size if a.config.model == "mlp" else max(2, a.config.batch_size // 4)
        assert b.config.batch_size == expected
    assert min(case.rounds for case in full.cases) >= LEAST_ROUNDS
    assert {case.rounds for case in Plan(rounds=9).cases} == {9}
    assert mlp_case(7).config.depth == 7


def speed(width, low, high, device="cpu"):
    rates = {ALL_THREADS: 10.0, EACH_CORE: 12.0, BATCHED: 40.0}
    return GridSpeed(width, 16, 10, 1, device, rates, EACH_CORE, (low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("given", "target", "says"),
    [
        (speed(64, 3.1, 4), 3, "reached"),
        (speed(64, 2.9, 4), 3, "undecided"),
        (speed(256, 1.2, 1.4), 1.5, "missed"),
        (speed(256, 9, 9.5, "cuda"), 10, "missed"),
    ],
)
def test_a_grid_is_held_against_its_target(given, target, says):
    assert verdict(given) == {"target": target, "verdict": says}


def test_the_grid_table(tmp_path, capsys):
    asked = []

    def measure(*sizes):
        asked.append(sizes)
        return speed(sizes[0], 3.5, 3.7)

    with tables_fit():
        results = run_grid(GridPlan(is_quick=True), tmp_path, measure)
    assert asked == [(64, 16, 10, 6), (256, 16, 10, 6)]
    printed = capsys.readouterr().out
    assert "3.60 (3.50 to 3.70)" in printed
    assert printed.count("reached") == 2
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["grids"] == results["grids"]
    assert "3.60 times as many at width 64 (reached)" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "mlp,alexnet"], "--models must be some of mlp, resnet18, wideresnet, vit, gpt"),
        (["--models", ""], "--models must be some of"),
        (["--depths", "2,x"], "--depths must be whole numbers from 1 to 256"),
        (["--depths", "0"], "--depths must be whole numbers from 1 to 256"),
        (["--depths", "-3"], "--depths must be whole numbers from 1 to 256"),
        (["--models", "gpt", "--depths", "2"], "--depths must be left out without the model mlp"),
        (["--rounds", "5"], "--rounds must be a whole number from 6"),
        (["--threads", "0"], "--threads must be a whole number from 1"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--grid", "--models", "mlp"], "--models must be left out with --grid"),
        (["--grid", "--depths", "2"], "--depths must be left out with --grid"),
        (["--grid", "--device", "cpu"], "--device must be left out with --grid"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_folder(options, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["cost", *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_penalty_in_every_third_step_costs_the_mean_of_three(monkeypatch):
    """A median over steps would call it free."""
    made = []
    monkeypatch.setattr(costs, "make_step", lambda config, task, device: made.append(config) or (lambda: None))
    seconds = {1: 3.0, 10**6: 1.2}

    def paired(steps, rounds, clock, warm_up):
        return {
            name: [1.0 if config.method == "SGD" else seconds[config.period]] * rounds
            for name, config in zip(steps, made)
        }

    monkeypatch.setattr(costs, "paired_seconds", paired)
    base = RunConfig(data="digits", model="mlp")
    third = replace(base, method="F-GR", gamma=0.1, epsilon=0.1, period=3)
    found = costs.step_costs({"SGD": base, "F-GR": replace(third, period=1), "cheap": third})
    assert (found["SGD"].median, found["F-GR"].median) == (1.0, 3.0)
    assert found["cheap"].median == pytest.approx((3.0 + 2 * 1.2) / 3)
