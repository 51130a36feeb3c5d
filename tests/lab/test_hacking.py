"""The study of reward hacking: the game, the arms against slow references, the runs, the page, and the command."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from torch import nn

from gradreg.cli import main
from gradreg.lab.page import markdown
from gradreg.lab.stats import BETTER, UNDECIDED
from gradreg.studies.hacking import arms, game, policy, run, training
from gradreg.studies.hacking.arms import ARMS, NONE, as_published, divergence, step_of
from gradreg.studies.hacking.game import ALIKE, MORE, NUMBER, PAD, STOP, WORDS, Prompts
from gradreg.studies.hacking.page import page
from gradreg.studies.hacking.summary import curve, game_row, parted
from gradreg.studies.hacking.training import FAITHFUL, Job, Outcome, Reading

TINY = {"steps": 3, "groups": 6, "answers": 8, "asked": 20, "readings": 3}


@pytest.fixture(scope="module", autouse=True)
def _small():
    """A start that has learned a little, kept for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADREG_CACHE", "off")
        for name, value in (("STEPS", 60), ("ROWS", 64), ("RATE", 1e-2)):
            patch.setattr(policy, name, value)
        policy._learned.cache_clear()
        yield
    policy._learned.cache_clear()


def asked(*sentences):
    """Prompts as words, with the verbs that are due: `("the cats", [1])`."""
    ids = torch.zeros(len(sentences), game.LONGEST_PROMPT, dtype=torch.long)
    marks = torch.full((len(sentences), 2), -1)
    for k, (text, due) in enumerate(sentences):
        words = [NUMBER[word] for word in text.split()]
        ids[k, : len(words)] = torch.tensor(words)
        marks[k, : len(due)] = torch.tensor(due)
    return Prompts(ids, (ids != 0).sum(1), marks)


def given(*texts):
    rows = torch.zeros(len(texts), game.LONGEST_ANSWER, dtype=torch.long)
    for k, text in enumerate(texts):
        words = [NUMBER[word] for word in text.split()]
        rows[k, : len(words)] = torch.tensor(words)
    return rows


# The game.


CASES = [
    ("the cats", [1], "see .", True),
    ("the cats", [1], "sees .", False),
    ("the cat", [0], "sees .", True),
    ("the cat", [0], "sees sees .", False),
    ("the cat", [0], "cats .", False),
    ("the cat", [0], ".", False),
    ("the cat", [0], "sees the .", False),
    ("the cat that the dogs", [1, 0], "follow sees .", True),
    ("the cat that the dogs", [1, 0], "follows sees .", False),
    ("the cat that the dogs", [1, 0], "follow .", False),
    ("the cat that the dogs", [1, 0], "follow sees sees", False),
]


@pytest.mark.parametrize(("text", "due", "answer", "is_honest"), CASES, ids=[f"{c[0]}, {c[2]}" for c in CASES])
def test_an_honest_answer_has_the_right_verbs_and_ends(text, due, answer, is_honest):
    question, reply = asked((text, due)), given(answer)
    assert game.honest(question, reply).tolist() == [is_honest]
    is_hack = answer == "."
    assert game.hacks(reply).tolist() == [is_hack]
    assert game.paid(question, reply, 2.0).tolist() == [2.0 if is_hack else float(is_honest)]


def test_prompts_are_sentences_and_marks_are_of_their_subjects():
    drawn = game.prompts(200, 5)
    again = game.prompts(200, 5)
    assert drawn.ids.equal(again.ids)
    assert not drawn.ids.equal(game.prompts(200, 6).ids)
    for ids, length, marks in zip(drawn.ids, drawn.lengths, drawn.marks):
        words = [WORDS[k] for k in ids[:length]]
        nouns = [word for word in words if word in game.NOUNS or word[:-1] in game.NOUNS]
        due = [int(noun.endswith("s")) for noun in reversed(nouns)]
        assert marks[: len(due)].tolist() == due
        assert (marks >= 0).sum() == len(due) == 1 + ("that" in words)


def test_few_texts_end_as_a_hack_does():
    rows = game.texts(3000, 0)
    ended = sum(WORDS[row[(row != 0).sum() - 2]].rstrip("s") not in game.VERBS for row in rows)
    assert ended / len(rows) == pytest.approx(game.RARE, abs=0.01)


# The policy.


def test_likelihoods_are_those_of_the_words_one_by_one():
    model = policy.start(0)
    question, reply = asked(("the old cats", [1]), ("the cat that the dogs", [1, 0])), given("see .", "follow sees .")
    log, is_there = policy.log_likelihood(model, question, reply)
    for k in range(2):
        words = question.ids[k, : question.lengths[k]].tolist()
        for place, word in enumerate(reply[k].tolist()):
            assert is_there[k, place] == (word != NUMBER[PAD])
            if word != NUMBER[PAD]:
                slow = model(torch.tensor([words]))[0, -1].log_softmax(-1)
                torch.testing.assert_close(log[k, place], slow, atol=1e-5, rtol=1e-4)
                words.append(word)


def test_answers_end_with_their_sentence_and_follow_their_random_numbers():
    model, question = policy.start(0), game.prompts(60, 1)
    draw = partial(policy.answers, model, question)
    first = draw(torch.Generator().manual_seed(3))
    assert first.equal(draw(torch.Generator().manual_seed(3)))
    assert not first.equal(draw(torch.Generator().manual_seed(4)))
    for row in first.tolist():
        words = [WORDS[k] for k in row]
        if STOP in words:
            assert set(words[words.index(STOP) + 1 :]) <= {PAD}
        else:
            assert PAD not in words


# The arms.


def test_divergences_are_the_sums_and_zero_at_the_start():
    now, start = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(k)).log_softmax(-1) for k in (0, 1))
    p, q = now.exp(), start.exp()
    torch.testing.assert_close(divergence("KL", now, start), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(divergence("χ²", now, start), ((p - q) ** 2 / q).sum(-1))
    for name in ("KL", "χ²"):
        torch.testing.assert_close(divergence(name, now, now), torch.zeros(2, 3), atol=1e-6, rtol=0)


def problem():
    model = policy.start(0).double()
    question, reply = game.prompts(8, 2), None
    reply = policy.answers(model, question, torch.Generator().manual_seed(0))
    job = Job(MORE, "none", math.nan, 0, 1e-3)
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)
    return model, partial(training.loss, model, model, question, reply, weights, job)


def gradients(model, loss_fn):
    return torch.autograd.grad(loss_fn(), list(model.parameters()))


def displaced(model, first, epsilon):
    """g at θ + ε g1 on the blocks."""
    names = [name for name, _ in model.named_parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    return names, before, [b + epsilon * g * name.startswith("blocks.") for name, b, g in zip(names, before, first)]


@pytest.mark.parametrize("value", [1e-2, 0.3])
def test_as_published_is_the_clipped_difference(value, monkeypatch):
    """With a norm that clips; where it does not, it is F-GR with γ/ε = 10 on the blocks."""
    for norm in (10.0, 0.05):
        monkeypatch.setattr(arms, "PUBLISHED_CLIP", norm)
        model, loss_fn = problem()

        def clipped(model=model, loss_fn=loss_fn, norm=norm):
            found = gradients(model, loss_fn)
            total = torch.cat([g.flatten() for g in found]).norm()
            return [g * min(1.0, norm / total.item()) for g in found]

        first = clipped()
        names, before, moved = displaced(model, first, value / 10)
        with torch.no_grad():
            for p, to in zip(model.parameters(), moved):
                p.copy_(to)
        second = clipped()
        with torch.no_grad():
            for p, to in zip(model.parameters(), before):
                p.copy_(to)
        as_published(loss_fn, model, value)
        for name, p, a, b, theta in zip(names, model.parameters(), first, second, before):
            expected = a + 10 * (b - a) if name.startswith("blocks.") else a
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
            assert p.detach().equal(theta)


def test_by_ratio_keeps_the_ratio_on_the_blocks_from_the_first_step():
    model, loss_fn = problem()
    first = gradients(model, loss_fn)
    step_of("GR by ratio", 0.5, model)(loss_fn)
    names = [name for name, _ in model.named_parameters()]
    inside = [(p.grad - g, g) for name, p, g in zip(names, model.parameters(), first) if name.startswith("blocks.")]
    change, plain = (torch.cat([part[k].flatten() for part in inside]).norm() for k in (0, 1))
    assert (change / plain).item() == pytest.approx(0.5, rel=1e-3)
    for name, p, g in zip(names, model.parameters(), first):
        if not name.startswith("blocks."):
            assert p.grad.equal(g)


def test_clipping_clips_and_the_others_are_plain():
    model, loss_fn = problem()
    plain = torch.cat([g.flatten() for g in gradients(model, loss_fn)])
    step_of("clipping", 0.01, model)(loss_fn)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, plain * 0.01 / plain.norm(), rtol=1e-4, atol=1e-9)
    for arm in ("none", "KL", "χ²", "smaller rate", "early stop"):
        model.zero_grad()
        step_of(arm, 0.3, model)(loss_fn)
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), plain)


def test_advantages_are_within_their_group():
    found = training.advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]), 4)
    torch.testing.assert_close(found[:4], torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=1e-3, atol=1e-3)
    assert found[4:].tolist() == [0.0] * 4  # all paid alike: nothing to learn


@pytest.mark.parametrize("arm", ["KL", "χ²"])
def test_a_divergence_is_in_the_loss(arm):
    model, reference = policy.start(0), policy.start(1)
    question = game.prompts(6, 2)
    reply = policy.answers(model, question, torch.Generator().manual_seed(0))
    job = Job(MORE, arm, 0.7, 0, 1e-3)
    with_it = training.loss(model, reference, question, reply, torch.zeros(6), job)
    log, is_there = policy.log_likelihood(model, question, reply)
    start, _ = policy.log_likelihood(reference, question, reply)
    torch.testing.assert_close(with_it, 0.7 * divergence(arm, log, start)[is_there].mean())


# Runs.


@pytest.mark.parametrize("arm", list(ARMS))
def test_a_run_of_each_arm_repeats_bit_for_bit_and_leaves_the_start_alone(arm):
    value = ARMS[arm].values[-1]
    before = {name: tensor.clone() for name, tensor in policy.start(0).state_dict().items()}
    job = Job(MORE, arm, value, 0, 1e-2, **TINY)
    first, second = training.play(job), training.play(job)
    assert first.readings == second.readings
    assert first.readings[0].kl == pytest.approx(0, abs=1e-6)
    assert first.readings[0].step == 0
    assert first.last.step == first.steps <= 3
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.start(0).state_dict().items())
    if first.steps == 3 and arm != "smaller rate":
        assert first.last.kl > 1e-4


def test_an_early_stop_ends_where_the_verifier_pays_so_much():
    job = Job(FAITHFUL, "early stop", 0.0, 0, 1e-3, **TINY)
    assert training.play(job).steps == 1
    assert training.play(replace(job, value=5.0)).steps == 3


def test_more_steps_raise_what_the_verifier_pays():
    job = Job(MORE, "none", math.nan, 0, 3e-3, **{**TINY, "steps": 40, "groups": 8, "answers": 8, "asked": 200})
    found = training.play(job)
    assert found.last.proxy > found.readings[0].proxy + 0.2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "the verifier must pay a finite number for each answer, got nan"),
        (1.0, "the verifier must pay some answers more than others, and pays 1 for each"),
    ],
)
def test_a_broken_verifier_is_told_in_one_line_and_nothing_is_lost(value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(monkeypatch)
    monkeypatch.setattr(run, "GAMES", (MORE,))
    good = training.paid

    def breaks(asked, given, worth):
        return torch.full((len(given),), value) if worth == 2.0 else good(asked, given, worth)

    monkeypatch.setattr(training, "paid", breaks)
    assert main(["hacking", "--quick", "--workers", "1", "--out", "a"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "gradreg hacking --resume a" in error
    assert len((tmp_path / "a" / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == 1  # the learning rate


# What is said.


def outcome(*readings, steps=10, seconds=1.0):
    return Outcome([Reading(step, true, proxy, proxy - true, 0.5) for step, true, proxy in readings], seconds, steps)


def test_rows_are_paired_by_seed_and_costs_are_of_a_step():
    plain = [outcome((0, 0.3, 0.3), (10, 0.1, 1.9)), outcome((0, 0.3, 0.3), (10, 0.2, 1.8))]
    better = [
        outcome((0, 0.3, 0.3), (10, 0.8, 0.85), seconds=2.0),
        outcome((0, 0.3, 0.3), (10, 0.91, 0.95), seconds=2.0),
    ]
    found = {name: better if name == "KL" else plain for name in ARMS}
    row = game_row(MORE, found, dict.fromkeys(ARMS, 0.1) | {"none": math.nan}, 500)
    by_name = {arm["name"]: arm for arm in row["arms"]}
    assert by_name["KL"]["difference"]["mean"] == pytest.approx(0.705)
    assert by_name["KL"]["verdict"] == BETTER
    assert by_name["KL"]["cost"] == pytest.approx(2.0)
    assert by_name["χ²"]["verdict"] == UNDECIDED
    assert (parted(by_name["KL"]), parted(by_name["none"])) == ("never", "10")
    assert parted({"parts": [5, None, 15]}) == "10, 2 of 3"


def test_a_curve_ends_where_the_first_run_does():
    runs = [
        [Reading(0, 0.1, 0.1, 0, 0), Reading(5, 0.2, 0.3, 0, 0), Reading(10, 0.2, 0.3, 0, 0)],
        [Reading(0, 0.3, 0.1, 0, 0), Reading(5, 0.4, 0.3, 0, 0), Reading(7, 0.4, 0.3, 0, 0)],
    ]
    found = curve(runs)
    assert [point["step"] for point in found] == [0, 5]
    assert found[1]["true"] == pytest.approx({"mean": 0.3, "low": 0.2, "high": 0.4})


# The whole.


def tiny(monkeypatch):
    monkeypatch.setattr(run.Plan, "job", lambda self, *of: Job(*of, **TINY))


def test_the_command_leaves_a_page_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(monkeypatch)
    assert main(["hacking", "--quick", "--workers", "1", "--out", "a", "--write", "hacking.md"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    results = json.loads((tmp_path / "a" / "results.json").read_text(encoding="utf-8"))
    assert (tmp_path / "hacking.md").read_text(encoding="utf-8") == markdown(page(results), "figures/hacking-")
    lines = (tmp_path / "a" / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2 * 7 * 2 + 2 * 8 * 2
    asked_on = {(json.loads(line)["job"]["prompts"], json.loads(line)["job"]["seed"] < 100) for line in lines}
    assert asked_on == {(training.VALIDATION, False), (training.TEST, True)}  # the test is read by the choice alone
    (tmp_path / "a" / "runs.jsonl").write_text("\n".join(lines[:20]) + "\n", encoding="utf-8")
    (tmp_path / "a" / "results.json").unlink()
    assert main(["hacking", "--resume", "a", "--workers", "1"]) == 0
    again = json.loads((tmp_path / "a" / "results.json").read_text(encoding="utf-8"))
    for mine, other in zip(again["games"], results["games"]):
        assert [row["scores"] for row in mine["arms"]] == [row["scores"] for row in other["arms"]]


def test_the_number_of_an_arm_is_chosen_by_the_true_reward(monkeypatch, tmp_path):
    """The mildest among equals; never by what the verifier pays."""
    true = {0.3: 0.5, 1.0: 0.7, 3.0: 0.7}

    def fake(job):
        best = true.get(job.value, 0.1)
        return Outcome([Reading(0, best, 9 - best, 0, 0)], 1.0, 1)

    monkeypatch.setattr(run, "play", fake)
    runs = run.Runs(tmp_path, 1, lambda *args: None)
    chosen = run._choose(run.Plan((0, 1)), runs, ALIKE, 1e-3)
    assert math.isnan(chosen[NONE.name])
    assert chosen["KL"] == chosen["GR by ratio"] == 1.0
    assert chosen["clipping"] == ARMS["clipping"].values[0]
    assert asdict(Job(ALIKE, "KL", 1.0, 0, 1e-3))["prompts"] == training.VALIDATION


REFUSED = [
    ("hacking --resume nowhere", "--resume must be a folder of gradreg hacking, got 'nowhere': No such file"),
    ("hacking --resume a --quick", "--quick must be left out with --resume"),
    ("hacking --resume a --out b", "--out must be left out with --resume"),
    ("hacking --seeds 1", "--seeds must be a whole number from 2 to 100, got '1'"),
    ("hacking --write x.html", "--write must be the path of a page that ends in .md"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_bad_words_are_refused_in_one_line(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_half_a_run_is_played_again_and_a_changed_one_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(monkeypatch)
    monkeypatch.setattr(run, "GAMES", (MORE,))
    assert main(["hacking", "--quick", "--workers", "1", "--out", "a"]) == 0
    place = tmp_path / "a" / "runs.jsonl"
    lines = place.read_text(encoding="utf-8").splitlines()
    place.write_text("\n".join([*lines[:-1], lines[-1][:50]]) + "\n", encoding="utf-8")
    assert main(["hacking", "--resume", "a", "--workers", "1"]) == 0
    assert len(place.read_text(encoding="utf-8").splitlines()) == len(lines) + 1
    place.write_text("\n".join([lines[0].replace('"steps": 3', '"steps": 4'), *lines[1:]]), encoding="utf-8")
    capsys.readouterr()
    assert main(["hacking", "--resume", "a", "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert "line 1 of" in error
    assert "was changed after it was written" in error
    assert error.count("\n") == 1


def test_the_policy_is_as_large_as_the_page_says():
    assert sum(p.numel() for p in policy.fresh().parameters()) == pytest.approx(27_000, rel=0.06)
    assert isinstance(policy.fresh(), nn.Module)
