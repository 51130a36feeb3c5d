"""A comparison from Python: `gradreg.lab.compare`, and what it returns."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradreg.lab import tasks
from gradreg.lab.comparison import report, run
from gradreg.lab.comparison.plan import DEFAULT_METHODS, DEFAULT_SEEDS, DEFAULT_TRIALS, Effort, Plan, checked_methods
from gradreg.lab.comparison.result import leader
from gradreg.lab.config import from_mapping
from gradreg.lab.folder import BadInput, new_folder, shown
from gradreg.lab.metric import Metric
from gradreg.lab.page import fragment, publish
from gradreg.lab.player import default_workers
from gradreg.lab.study.storage import Place
from gradreg.lab.task import Loop, Task
from gradreg.lab.task_names import fields_of

if TYPE_CHECKING:
    import pandas


def compare(
    task: Task | Loop | Callable[[Any], Mapping[str, float]] | str,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    trials: int = DEFAULT_TRIALS,
    seeds: int = DEFAULT_SEEDS,
    workers: int | None = None,
    by: str = "ratio",
    search_epochs: int = 0,
    opponent: bool = True,
    budget: str | None = None,
    first_seed: int = 0,
    folder: str | Path | None = None,
    storage: str | None = None,
    **fields: Any,
) -> Comparison:
    """Compare methods with plain training on a task.

    The baseline's learning rate and weight decay are tuned first, and tried again where the methods come to others,
    as these are where it ends; each method has `trials` candidates, by validation rows; the choice of each is trained
    with `seeds` seeds and read on test rows, once.

    Args:
        task: a `Task`, a function of a `Run` or a `Loop`, the name of a built-in task, or a file, `mine.py:task`.
        methods: names of the laboratory's methods, of the task's own, or `cheap`; `F-GR:epsilon=0.01` holds a field.
        trials: candidates of each method; of the baseline up to three times as many, for as long as it finds better.
        seeds: of the test, paired.
        workers: processes of one thread; by default two. With 1 all is done here.
        by: what is searched for in the place of γ: `ratio`, that γ shall keep, or `gamma`.
        search_epochs: of a candidate, of which the best three then train for all epochs; 0 trains each for all.
        opponent: also train plainly for twice as long, which is what the time of two passes buys.
        budget: a time such as `30m` that decides trials and seeds.
        first_seed: of the test's consecutive seeds.
        folder: where all is kept, new, or that of the same comparison, which goes on; by default a temporary one.
        storage: URL of a database to share the work by, as `gradreg compare` takes it.
        fields: of a run's configuration, such as `epochs=5` or `device="cpu"`; they win over the task's numbers.

    Raises:
        BadInput: what cannot be compared; nothing was made.

    Example:
        >>> from gradreg.lab import compare
        >>> found = compare("digits", ["F-GR"], trials=2, seeds=2, workers=1, opponent=False, epochs=1, width=8)
        >>> [row["name"] for row in found.rows]
        ['SGD', 'F-GR']
    """
    plan = _plan(task, methods, Effort(trials, seeds, search_epochs=search_epochs), by, opponent, first_seed, fields)
    count = workers or default_workers()
    place_of = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="gradreg-compare-"))
    try:
        if folder is not None and (place_of / "config.json").exists():
            known, place = run.known(place_of, storage)
            plan = known if budget is not None else plan
            if known != plan:
                raise BadInput(f"folder must be that of the same comparison, or a new one, got {shown(place_of)}.")
        else:
            plan, place = _begun(plan, place_of, storage, budget, count)
        results = run.carry_out(plan, place_of, place, count)
        publish(report.page(results), place_of)
        runs = (place_of / "runs.jsonl").read_text(encoding="utf-8")
        return Comparison(results, runs)
    finally:
        if folder is None:
            shutil.rmtree(place_of, ignore_errors=True)


def _plan(
    task: Any, methods: Sequence[str], effort: Effort, by: str, opponent: bool, first_seed: int, fields: dict[str, Any]
) -> Plan:
    if by not in ("ratio", "gamma"):
        raise BadInput(f"by must be ratio or gamma, got {by!a}.")
    for name, value, low in (
        ("trials", effort.trials, 1),
        ("seeds", effort.seeds, 2),
        ("first_seed", first_seed, 0),
        ("search_epochs", effort.search_epochs, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise BadInput(f"{name} must be a whole number from {low}, got {value!r}.")
    if isinstance(task, str):
        own, digest = fields_of(task), None
    else:
        source = tasks.from_object(task)
        own, digest = {"file": source.reference, **tasks.find(source.reference).defaults}, ""
    config = from_mapping({**own, **fields})
    digest = (tasks.digest_of(config.file) or "") if digest is None else digest
    names = checked_methods([methods] if isinstance(methods, str) else list(methods), by)
    return Plan(config, names, effort, first_seed, by, opponent, digest)


def _begun(plan: Plan, folder: Path, storage: str | None, budget: str | None, workers: int) -> tuple[Plan, Place]:
    run.check(plan)
    said: list[str] = []
    if budget is not None:
        bought = run.afforded(plan, run.seconds_of(budget), workers)
        plan = replace(plan, effort=bought.effort)
        said = bought.not_afforded
    if any(folder.iterdir()) if folder.is_dir() else True:
        new_folder(folder, "compare")
    place = Place(folder.name, url=storage) if storage else Place("compare", folder.resolve())
    run.begin(plan, folder, place, "gradreg.lab.compare", workers, said)
    return plan, place


@dataclass(frozen=True)
class Choice:
    """What the search has come to for a method."""

    method: str
    learning_rate: float
    weight_decay: float
    settings: Mapping[str, float]
    text: str

    def snippet(self) -> str:
        """The method around a loop of one's own, to copy."""
        return self.text


class Comparison:
    """What came out: prints as the table, shows as a part of a page in a notebook.

    Attributes:
        results: all numbers, as results.json has them.
        verdict: the answer in a sentence.
        rows: of the table, a mapping for each arm.
    """

    def __init__(self, results: dict[str, Any], runs: str = "") -> None:
        self.results = results
        self._runs = runs

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """From a folder of `gradreg compare`, or of `save`.

        Raises:
            BadInput: it is none, or has not ended.
        """
        from gradreg.lab.records import read_record

        try:
            results = read_record(Path(folder) / "results.json")
            runs = (Path(folder) / "runs.jsonl").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadInput(f"folder must be that of a finished comparison, got {shown(folder)}: {error}.") from None
        if results.get("kind") != "compare":
            raise BadInput(f"folder must be that of a comparison, got {shown(folder)}.")
        return cls(results, runs)

    @property
    def verdict(self) -> str:
        return self.results["verdict"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.results["arms"]

    def best(self, method: str | None = None) -> Choice:
        """The choice of a method; by default of the one that is best on validation rows.

        Raises:
            BadInput: no such row.
        """
        if method is None:
            row = leader(self.rows, Metric.from_row(self.results["metric"]))
        else:
            row = next((row for row in self.rows if row["name"].lower() == method.lower()), None)
            if row is None:
                names = ", ".join(repr(row["name"]) for row in self.rows)
                raise BadInput(f"method must be one of {names}, got {method!a}.")
        text = report.snippet(self.results, row)
        return Choice(row["name"], row["learning_rate"], row["weight_decay"], row["settings"], text)

    def to_frame(self) -> pandas.DataFrame:
        """A row for each arm; needs pandas.

        Raises:
            BadInput: pandas is not there.
        """
        try:
            import pandas
        except ImportError as error:
            raise BadInput("to_frame needs the package pandas: pip install pandas") from error
        nothing = {"mean": math.nan, "low": math.nan, "high": math.nan}
        table = []
        for row in self.rows:
            test, gap, cost = (row.get(key) or nothing for key in ("test", "difference", "cost"))
            line = {"method": row["name"], "test": test["mean"], "test_low": test["low"], "test_high": test["high"]}
            line |= {"validation": row["validation"], "difference": gap["mean"]}
            line |= {"difference_low": gap["low"], "difference_high": gap["high"], "verdict": row.get("verdict", "")}
            line |= {"cost": cost.get("median", math.nan), "learning_rate": row["learning_rate"]}
            line |= {"weight_decay": row["weight_decay"], **row["settings"], "failed": len(row["failed"])}
            table.append(line)
        return pandas.DataFrame(table).set_index("method")

    def save(self, folder: str | Path) -> Path:
        """Write results.json, runs.jsonl and report.html into a new or empty folder.

        Raises:
            BadInput: the folder is neither.
        """
        from gradreg.lab.folder import write_json, write_text
        from gradreg.lab.records import sealed

        try:
            place = new_folder(Path(folder), "compare")
        except BadInput as error:
            raise BadInput(str(error).replace("--out", "folder", 1)) from None
        write_json(place / "results.json", sealed(self.results))
        write_text(place / "runs.jsonl", self._runs)
        publish(report.page(self.results), place)
        return place / "report.html"

    def __str__(self) -> str:
        return report.text(self.results)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return fragment(report.page(self.results).blocks[:3])
