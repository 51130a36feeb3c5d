"""Tasks of the user's own: any data, loss and score, in the loop that the built-in ones train in."""

import math
import random
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import gradreg
from gradreg import cli
from gradreg.lab import attach, tasks
from gradreg.lab.config import RunConfig, from_mapping
from gradreg.lab.data.parts import Part
from gradreg.lab.folder import BadInput
from gradreg.lab.methods import METHODS
from gradreg.lab.metric import ACCURACY, Metric
from gradreg.lab.objective import accuracy, cross_entropy, evaluate, gradient_norm
from gradreg.lab.randomness import random_state, seeded
from gradreg.lab.rows import DatasetRows, LoaderRows, TensorRows, count, moved, shared_out
from gradreg.lab.runs import Job, run
from gradreg.lab.task import Loop, Task
from gradreg.lab.train.checkpoint import read, write
from gradreg.lab.train.trainer import Trainer

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.tensor([1.0, -2.0, 0.5, 0.0])).unsqueeze(1)
LABELS = (Y.squeeze(1) > 0).long()


class Rows(Dataset):
    """Dictionaries; `noise` is drawn anew for every look, as an augmentation is."""

    def __init__(self, x, y, noise=0.0):
        self.x, self.y, self.noise = x, y, noise

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        x = self.x[k]
        if self.noise:
            x = x + self.noise * (torch.rand(4) + random.random() + float(np.random.rand()))
        return {"x": x, "y": self.y[k]}


def mse(model, batch):
    return F.mse_loss(model(batch["x"]), batch["y"])


def rmse(model, loader):
    squares = [(model(batch["x"]) - batch["y"]).square().flatten() for batch in loader]
    return torch.cat(squares).mean().sqrt()


def auc(outputs, targets):
    positive, negative = outputs[targets == 1], outputs[targets == 0]
    return (positive[:, None] > negative[None, :]).float().mean()


def net(width=1):
    return lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, width))


def regression(noise=0.0, **more):
    parts = (Rows(X[:40], Y[:40], noise), Rows(X[40:50], Y[40:50]), Rows(X[50:], Y[50:]))
    own = {"loss": mse, "score": rmse, "higher_is_better": False, "batch_size": 10, "epochs": 3}
    return Task(model=net(), train=parts[0], validation=parts[1], test=parts[2], **{**own, **more})


def tensors(**more):
    parts = [(X[a:b], LABELS[a:b]) for a, b in ((0, 40), (40, 50), (50, 60))]
    return Task(model=net(2), train=parts[0], validation=parts[1], test=parts[2], **{"batch_size": 10, **more})


def with_loader(**more):
    part = TensorDataset(X[:40], Y[:40].squeeze(1))
    held_out = DataLoader(TensorDataset(X[40:], LABELS[40:].float()), 7)

    def loss(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch[0]).squeeze(1), (batch[1] > 0).float())

    train = DataLoader(part, 8, shuffle=True)
    return Task(model=net(), train=train, validation=held_out, test=held_out, loss=loss, score=auc, epochs=2, **more)


@pytest.fixture
def config(request):
    """A configuration of a task: `config(task, **fields)`."""

    def make(task, **fields):
        reference = tasks.from_object(task).reference
        return from_mapping({"file": reference, **tasks.find(reference).defaults, "learning_rate": 0.1, **fields})

    return make


def play(config, scored_on="test"):
    return run(Job(config, scored_on))


# What is trained.


def test_a_run_is_the_loop_that_one_would_write(config):
    """SGD with momentum and a cosine, written here; bit for bit."""
    found = play(config(tensors(epochs=2)))
    with seeded(0):
        model = net(2)()
    with seeded(0):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        order = torch.Generator().manual_seed(0)
        for _ in range(2):
            for rows in torch.randperm(40, generator=order).split(10):
                optimizer.zero_grad()
                F.cross_entropy(model.train()(X[rows]), LABELS[rows]).backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        logits = model.eval()(X[50:])
    assert found.score == pytest.approx((logits.argmax(1) == LABELS[50:]).float().mean().item())
    assert found.train_loss == pytest.approx(F.cross_entropy(model(X[:40]), LABELS[:40]).item(), rel=1e-6)


def test_what_holds_the_rows_makes_no_difference(config):
    of_tensors = play(config(tensors(epochs=2)))
    parts = [TensorDataset(X[a:b], LABELS[a:b]) for a, b in ((0, 40), (40, 50), (50, 60))]
    of_dataset = play(
        config(Task(model=net(2), train=parts[0], validation=parts[1], test=parts[2], batch_size=10, epochs=2))
    )
    assert (of_dataset.score, of_dataset.num_scored) == (of_tensors.score, of_tensors.num_scored)
    assert of_dataset.train_loss == pytest.approx(of_tensors.train_loss, rel=1e-6)


@pytest.mark.parametrize("make", [regression, tensors, with_loader])
@pytest.mark.parametrize("method", ["SGD", "F-GR"])
def test_a_run_is_the_same_twice_and_another_with_another_seed(make, method, config):
    own = {"gamma": 0.05, "epsilon": 0.1} if method == "F-GR" else {}
    first, again, other = (play(config(make(), method=method, seed=seed, **own)) for seed in (0, 0, 1))
    assert (first.score, first.train_loss, first.grad_norm) == (again.score, again.train_loss, again.grad_norm)
    assert first.train_loss != other.train_loss
    assert first.trace[0]["train_loss"] > first.train_loss  # it learns


def test_a_score_of_the_model_and_one_of_outputs(config):
    task = regression()
    with seeded(0):
        model = task.build(0)
    found = evaluate(model, task.test, of=task.objective)
    with torch.no_grad():
        error = (model.eval()(X[50:]) - Y[50:]).square().mean()
    assert found.score == pytest.approx(error.sqrt().item(), rel=1e-6)
    assert found.loss == pytest.approx(error.item(), rel=1e-6)
    assert 0.5 < play(config(with_loader(), epochs=20)).score <= 1


def test_without_a_score_the_loss_is_it():
    task = regression(score=None, higher_is_better=None)
    assert task.metric == Metric("loss", higher_is_better=False)
    model = task.build(0)
    found = evaluate(model, task.validation, of=task.objective)
    assert found.score == found.loss


def test_cross_entropy_has_accuracy():
    assert tensors().metric == ACCURACY
    assert tensors(loss=cross_entropy, score=accuracy).metric == ACCURACY


def test_whole_data_is_measured_row_by_row():
    """Chunks of any size, tensors or a Dataset: the mean over rows."""
    task = regression()
    model = task.build(0).eval()
    expected = F.mse_loss(model(X[:40]), Y[:40])
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(model.parameters()))]).norm().item()
    for rows in (1, 7, 40, None):
        loss, found = gradient_norm(model, task.train, rows, of=task.objective)
        assert (loss, found) == pytest.approx((expected.item(), norm), rel=1e-5)


def test_measuring_draws_nothing_and_sees_the_same_each_time():
    task = regression(noise=1.0)
    model = task.build(0)
    before = random_state(torch.device("cpu"))
    first = gradient_norm(model, task.train, of=task.objective)
    after = random_state(torch.device("cpu"))
    assert torch.equal(before["torch"], after["torch"])
    assert (before["python"], before["numpy"]) == (after["python"], after["numpy"])
    assert gradient_norm(model, task.train, of=task.objective) == first


# Stopping within an epoch.


@pytest.mark.parametrize("num_steps", [3, 4, 6])
@pytest.mark.parametrize("make", [lambda: regression(noise=0.5), with_loader], ids=["draws", "loader"])
def test_data_that_draws_goes_on_bit_for_bit(make, num_steps, config, tmp_path):
    own = config(make(), epochs=3, method="F-GR", gamma=0.05, epsilon=0.1)

    def whole():
        with seeded(0):
            trainer = Trainer(own)
            while trainer.place.epoch < 3:
                trainer.epoch()
            return trainer, random_state(trainer.device)

    def in_parts():
        with seeded(0):
            first = Trainer(own)
            while first.step < num_steps:
                first.epoch(lambda: first.step >= num_steps)
            write(tmp_path / "state", first.state_dict())
        with seeded(9):
            second = Trainer(own)
            second.load_state_dict(read(tmp_path / "state"))
            while second.place.epoch < 3:
                second.epoch()
            return second, random_state(second.device)

    (a, state_a), (b, state_b) = whole(), in_parts()
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert torch.equal(state_a["torch"], state_b["torch"])
    assert state_a["python"] == state_b["python"]


# Data.


def test_data_of_any_kind_becomes_rows():
    assert isinstance(tensors().train, Part)
    assert isinstance(regression().train, DatasetRows)
    assert isinstance(with_loader().train, LoaderRows)
    three = Task(model=net(), train=(X, X, Y), validation=(X, X, Y), test=(X, X, Y), loss=lambda m, b: m(b[0]).mean())
    assert isinstance(three.train, TensorRows)
    assert len(three.train[:7]) == 7


def test_a_collate_function_and_workers_are_the_dataset_s(config):
    def collate(examples):
        return {"x": torch.stack([e["x"] for e in examples]), "y": torch.stack([e["y"] for e in examples])}

    plain = play(config(regression()))
    assert play(config(regression(collate=collate))).train_loss == plain.train_loss
    assert (
        play(config(regression(num_workers=1), epochs=1)).train_loss == play(config(regression(), epochs=1)).train_loss
    )


def test_a_batch_is_counted_moved_and_shared_out():
    batch = {"x": torch.arange(6).view(3, 2), "more": [torch.arange(3)], "name": "a"}
    assert count(batch) == 3
    assert moved(batch, torch.device("cpu"))["name"] == "a"
    halves = [shared_out({"x": torch.arange(5)}, rank, 2)["x"].tolist() for rank in (0, 1)]
    assert halves == [[0, 2, 4], [1, 3]]
    with pytest.raises(BadInput, match="batches must be tensors with one row for each example"):
        shared_out(batch, 0, 2)


def test_a_transform_augments_the_whole_batch(config):
    seen = []

    def transform(batch, generator):
        seen.append(torch.rand(1, generator=generator).item())
        return batch

    task = tensors(transform=transform, epochs=1)
    with seeded(0):
        Trainer(config(tensors(epochs=1)), task).epoch()
    assert len(set(seen)) == 4


# Methods and optimizers of one's own.


def test_an_optimizer_of_one_s_own_is_used(config):
    made = []

    def adam(parameters, lr, weight_decay):
        made.append((lr, weight_decay))
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)

    task = tensors(optimizer=adam, learning_rate=0.01, weight_decay=0.1, epochs=1)
    Trainer(from_mapping({"epochs": 1, "batch_size": 10, "learning_rate": 0.01, "weight_decay": 0.1}), task)
    assert made == [(0.01, 0.1)]


def test_a_method_of_one_s_own_is_trained_with(config, monkeypatch):
    monkeypatch.setattr(attach, "_OWN", {})
    monkeypatch.setattr("gradreg.lab.methods.METHODS", METHODS)

    def sign(params, grads, grad_scale=1.0):
        return [g.sign() for g in grads], 1.0

    def own(model, gamma, epsilon):
        """GR along the sign."""
        return gradreg.GradientRegularizer(model, gamma, epsilon, ascent=sign)

    try:
        found = play(config(tensors(methods={"sign": own}, epochs=2), method="sign", gamma=0.01, epsilon=0.01))
        assert METHODS["sign"].about == "GR along the sign."
        assert math.isfinite(found.score)
        with pytest.raises(BadInput, match="epsilon must be given with method sign"):
            RunConfig(method="sign", gamma=0.1)
    finally:
        METHODS.pop("sign", None)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"F-GR": lambda model, gamma: None}, "methods must have names of their own, got 'F-GR'"),
        ({"own": lambda model, strength: None}, "must be a function of the model and of any of gamma"),
        ({"own": 3}, "methods must be functions by name"),
    ],
)
def test_a_method_that_cannot_be_attached_is_refused(methods, message, config):
    with pytest.raises(BadInput, match=message):
        config(tensors(methods=methods))


def test_a_ratio_stands_in_the_place_of_gamma(config):
    own = config(tensors(epochs=30), method="F-GR", ratio=0.2, epsilon=0.5, warmup=0.0)
    with seeded(0):
        trainer = Trainer(own, follows_penalty=True)
        for _ in range(30):
            trainer.epoch()
    assert trainer.penalty_ratio == pytest.approx(0.2, rel=0.5)
    with pytest.raises(BadInput, match="gamma must be left out with ratio"):
        RunConfig(method="F-GR", gamma=0.1, ratio=0.1, epsilon=0.1)
    with pytest.raises(BadInput, match="ratio must be left out with method DB"):
        RunConfig(method="DB", gamma=0.1, ratio=0.1)


# A loop of one's own.


def test_a_loop_is_given_its_settings_and_its_method(config):
    def train(run):
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay)
        method = run.attach(model, optimizer, num_steps=20)
        for _ in range(20):
            optimizer.zero_grad()
            method.backward(lambda batch: F.mse_loss(model(batch[0]), batch[1]), [(X, Y)])
            optimizer.step()
        return {"validation": 1.0, "test": F.mse_loss(model(X), Y).item()}

    plain = play(config(Loop(train, higher_is_better=False)))
    penalized = play(config(Loop(train, higher_is_better=False), method="F-GR", gamma=0.05, epsilon=0.1))
    assert plain.score != penalized.score < 5
    assert math.isnan(plain.train_loss)
    assert not plain.diverged


def test_the_options_of_a_run_make_the_same_regularizer(config):
    from gradreg.lab.loop import Run

    own = config(tensors(), method="SAM", rho=0.1)
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    gradients = []
    run_ = Run(own, "test")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for make in (
        lambda: run_.attach(model, optimizer, 10),
        lambda: gradreg.GradientRegularizer(model, **run_.options(10)),
    ):
        model.zero_grad()
        make().backward(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), [(X, LABELS)])
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with pytest.raises(BadInput, match="optimizer must be given for a direction along its momentum"):
        Run(config(tensors(), method="MSAM", rho=0.1), "test").options(10)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return {'validation': score, 'test': score}, got NoneType"),
        ({"validation": 1.0}, "got the keys validation"),
        ({"validation": 1.0, "test": "good"}, "must return a number as its test score, got str"),
    ],
)
def test_what_a_loop_returns_is_checked(returned, message, config):
    with pytest.raises(BadInput, match=message):
        play(config(lambda run: returned))


def test_a_run_whose_code_raises_is_kept_as_failed(config):
    def broken(model, batch):
        raise ZeroDivisionError("no rows of that kind")

    found = play(config(tensors(loss=broken)))
    assert math.isnan(found.score)
    assert found.error.strip().splitlines()[-1] == "ZeroDivisionError: no rows of that kind"
    assert "Traceback" in found.error


# What is refused.

PART = (X, LABELS)
REFUSED = [
    ({"validation": None}, "validation must be given: split some of the training rows off"),
    ({"test": None}, "test must be given"),
    ({"train": (X, LABELS[:3])}, "train must be tensors of one length above 0, got 60, 3"),
    ({"train": 5}, "train must be a map-style Dataset, a DataLoader, or a tuple of tensors, got int"),
    ({"train": Rows(X[:0], Y[:0])}, "train must have rows, got an empty Rows"),
    ({"model": nn.Linear(1, 1)}, "model must be a function that makes a model"),
    ({"model": 3}, "model must be a function, got int"),
    ({"loss": 3}, "loss must be a function, got int"),
    ({"higher_is_better": True}, "higher_is_better must be left out without a score"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_task_that_cannot_be_is_refused(changes, message):
    with pytest.raises(BadInput, match=message):
        Task(**{"model": net(2), "train": PART, "validation": PART, "test": PART, **changes})


CHECKED = [
    ({"loss": lambda model, batch: model(batch[0])}, r"loss must return a scalar tensor, .* got \(10, 2\)"),
    ({"loss": lambda model, batch: 3.0}, "loss must return a scalar tensor, .* got float"),
    ({"loss": lambda model, batch: torch.ones(())}, "loss must depend on the parameters"),
    ({"model": lambda: 3}, "model must make a torch.nn.Module, got int"),
    ({"model": lambda: nn.Linear(4, 2).requires_grad_(False)}, "model must have parameters that train"),
    ({"score": lambda model, loader: math.nan}, "score must be a number, got NaN"),
    ({"score": lambda model, loader: "good"}, "score must return a number, got str"),
    ({"score": lambda outputs, targets: outputs}, "score must return a number, got Tensor"),
    ({"batch_size": 100}, "batch_size must be a whole number from 1 to 60"),
    ({"model": lambda: nn.Linear(7, 2)}, "must be a task that runs, and raised RuntimeError"),
]


@pytest.mark.parametrize(("changes", "message"), CHECKED, ids=[str(k) for k in range(len(CHECKED))])
def test_a_task_that_does_not_run_is_refused_before_anything_is_made(changes, message, config):
    task = Task(**{"model": net(2), "train": PART, "validation": PART, "test": PART, "batch_size": 10, **changes})
    with pytest.raises(BadInput, match=message):
        tasks.check(config(task))


def test_a_batch_is_100_rows_or_all_where_there_are_fewer():
    parts = {"model": net(2), "validation": PART, "test": PART}
    many = (X.repeat(2, 1), LABELS.repeat(2))
    assert Task(train=PART, **parts).defaults == {"batch_size": 60}
    assert Task(train=many, **parts).defaults == {}
    assert Task(train=PART, batch_size=7, **parts).defaults == {"batch_size": 7}
    assert Task(train=DataLoader(TensorDataset(*PART), batch_size=9), **parts).defaults == {}


def test_checking_changes_nothing(config):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = random_state(torch.device("cpu"))
    tensors().check(model, torch.device("cpu"), 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(state["torch"], random_state(torch.device("cpu"))["torch"])


# Files.

FILE = """
import torch
from gradreg.lab import Task, Loop
from neighbor import WIDTH

DRAWN = torch.rand(1).item()

def task():
    x = torch.randn(30, 4)
    part = (x, (x.sum(1) > 0).long())
    parts = {"train": part, "validation": part, "test": part}
    return Task(model=lambda: torch.nn.Linear(4, WIDTH), epochs=2, batch_size=10, **parts)

def train(run):
    return {"validation": run.learning_rate, "test": run.learning_rate}

def broken():
    return Task(model=lambda: 3, train=None)

def other():
    return 5

def raises():
    return 1 / 0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(FILE), encoding="utf-8")
    (tmp_path / "neighbor.py").write_text("WIDTH = 2\n", encoding="utf-8")
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n", encoding="utf-8")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.setattr(tasks, "_SOURCES", {})
    return tmp_path


def words(*more):
    return ["train", *map(str, more)]


def test_a_file_is_trained_with_its_own_numbers_and_resumed_by_naming_it(folder, capsys):
    assert cli.main(words("mine.py", "--out", "a")) == 0
    assert "ended after 2 epochs, 6 steps" in capsys.readouterr().out
    assert cli.main(["sharpness", "a", "--task", "mine.py", "--probes", "0", "--eigenvalues", "1"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_the_same_task_is_made_in_every_process(folder):
    first = tasks.find(tasks.from_file("mine.py").reference)
    tasks._made.cache_clear()
    torch.rand(3)
    again = tasks.find("mine.py:task")
    assert torch.equal(first.train.x, again.train.x)


BAD_FILES = [
    ("nowhere.py", "TASK must be a Python file that can be read, got 'nowhere.py': No such file"),
    ("bad.py", "TASK must be a file that can be imported, got bad.py: ModuleNotFoundError: No module named"),
    (
        "mine.py:nothing",
        "TASK must name a function of mine.py, got 'nothing'; it has task, train, broken",
    ),
    ("mine.py:broken", "mine.py:broken: train must be given"),
    ("mine.py:other", "mine.py:other must be a Task, or a function of a run, got int"),
    (
        "mine.py:raises",
        "must return a task, and raised ZeroDivisionError: division by zero (mine.py, line",
    ),
    ("mine.py:train", "mine.py:train must be a Task here: a function of a run has a loop of its own; use compare"),
    ("digitz", "Did you mean digits?"),
    (".", "TASK must be FILE.py, FILE.py:NAME, or one of"),
]


@pytest.mark.parametrize(("word", "message"), BAD_FILES, ids=[word for word, _ in BAD_FILES])
def test_a_file_without_a_task_is_refused_in_one_line(word, message, folder, capsys):
    assert cli.main(words(word, "--out", "a")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folder / "a").exists()


def test_code_is_loaded_from_the_command_line_alone(folder, capsys):
    (folder / "run.yaml").write_text("file: mine.py\n", encoding="utf-8")
    assert cli.main(words("--config", "run.yaml", "--out", "a")) == 2
    assert "file must be named on the command line too" in capsys.readouterr().err
    assert cli.main(words("mine.py", "--config", "run.yaml", "--out", "a")) == 0
    tasks._SOURCES.clear()
    for command in (["sharpness", "a"], words("--resume", "a")):
        assert cli.main(command) == 2
    assert "add mine.py" in capsys.readouterr().err


def test_a_file_that_has_changed_does_not_go_on(folder, capsys, monkeypatch):
    assert cli.main(words("mine.py", "--out", "a")) == 0
    (folder / "a" / "results.json").unlink()
    capsys.readouterr()
    with (folder / "mine.py").open("a", encoding="utf-8") as file:
        file.write("# a change\n")
    assert cli.main(words("mine.py", "--resume", "a")) == 2
    assert "mine.py:task has changed" in capsys.readouterr().err


def test_a_built_in_task_is_named_by_its_data(folder, capsys):
    assert cli.main(words("digits", "--epochs", 1, "--width", 8, "--out", "a")) == 0
    assert "digits, MLP, clean labels" in capsys.readouterr().out
    assert cli.main(words("digits", "--data", "mnist1d", "--out", "b")) == 2
    assert "data must be left out with TASK, or be the same" in capsys.readouterr().err


def test_a_window_of_micro_batches_is_one_call_for_plain_training_too(config):
    from gradreg.lab.loop import Run

    halves = [(X[:30], LABELS[:30]), (X[30:], LABELS[30:])]

    def gradient(own, call):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        method = Run(config(tensors(), **own), "test").attach(model, torch.optim.SGD(model.parameters(), 0.1), 10)
        loss = call(method, lambda batch: F.cross_entropy(model(batch[0]), batch[1]) / 2)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    for own in ({}, {"method": "Flooding", "level": 0.0}):
        loss, together = gradient(own, lambda method, loss_fn: method.backward(loss_fn, halves))
        whole, alone = gradient(own, lambda method, loss_fn: method.backward(lambda: 2 * loss_fn((X, LABELS))))
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize("method", ["F-GR", "B-GR", "Central", "DB"])
def test_without_a_penalty_every_method_is_plain_training_bit_for_bit(method, config):
    """Line 1 of the contract, for a task, through what the weights, BatchNorm and the masks of dropout lead to."""

    def model():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))

    def found(**own):
        task = tensors(epochs=2, score=lambda outputs, targets: outputs.double().norm().item())
        result = play(config(replace(task, model=model), **own))
        assert not result.error
        return result.score

    epsilon = {} if method == "DB" else {"epsilon": 0.1}
    assert found() == found(method=method, gamma=0.0, **epsilon) != found(method=method, gamma=0.1, **epsilon)


SHARED = nn.Linear(4, 2)
MORE_REFUSED = [
    ({"model": lambda: SHARED}, "model must make a model with weights of its own each time"),
    ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, r"optimizer must be a function of \(parameters, lr"),
    ({"optimizer": torch.optim.LBFGS}, r"optimizer must be a function of .*weight_decay"),
    ({"optimizer": lambda p, lr, weight_decay: 3}, "optimizer must make a torch.optim.Optimizer, got int"),
]


@pytest.mark.parametrize(("changes", "message"), MORE_REFUSED, ids=[str(k) for k in range(len(MORE_REFUSED))])
def test_models_and_optimizers_that_would_fail_in_every_run_are_refused(changes, message, config):
    with pytest.raises(BadInput, match=message):
        tasks.check(
            config(
                Task(**{"model": net(2), "train": PART, "validation": PART, "test": PART, "batch_size": 10, **changes})
            )
        )


def test_an_optimizer_option_beside_one_of_the_task_s_own_is_refused(config):
    own = config(tensors(optimizer=torch.optim.AdamW), optimizer="adam")
    with pytest.raises(BadInput, match="optimizer must be left out: the task makes an optimizer of its own"):
        tasks.check(own)


def test_an_error_is_told_by_the_line_of_the_user_s_own(folder, capsys):
    (folder / "deep.py").write_text("import json\n\ndef task():\n    return json.loads('nothing')\n", encoding="utf-8")
    assert cli.main(words("deep.py", "--out", "a")) == 2
    assert "(deep.py, line 4)" in capsys.readouterr().err
