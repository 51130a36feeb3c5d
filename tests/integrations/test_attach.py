"""`attach` on a live Trainer: ĝ by hand, the class of the same penalty, and what is refused and leaves no trace."""

import copy
import pickle
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments

import gradreg
from gradreg.integrations._versions import TESTED
from gradreg.integrations.transformers import (
    GradientRegularizationMixin,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    attach,
)
from tests.integrations.test_transformers import (
    EPSILON,
    GAMMA,
    Collator,
    arguments,
    assert_by_hand,
    bert,
    causal_loss,
    gpt2,
    gradient,
    masked_loss,
    rows,
    run,
    weights_of,
)

PENALTY = {"gamma": GAMMA, "epsilon": EPSILON}


class Stepping(Trainer):
    """Somebody else's trainer: a class, a step and a loss of its own, and arguments that it makes itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_steps, self.num_losses = 0, 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.num_steps += 1
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, *args, **kwargs):
        self.num_losses += 1
        return super().compute_loss(*args, **kwargs)


def plain(folder, model=None, kind=Trainer, **options):
    data = {"train_dataset": rows(), "data_collator": Collator()}
    return kind(gpt2() if model is None else model, arguments(folder, TrainingArguments, **options), **data)


def run_attached(folder, model, kind=Trainer, attached=None, **options):
    return run(folder, model, kind, TrainingArguments, {**PENALTY, **(attached or {})}, **options)


# The update against ĝ by hand.


@pytest.mark.parametrize("kind", [Trainer, Stepping])
@pytest.mark.parametrize(("accumulation", "steps"), [(1, 7), (3, 3)])
def test_gpt2_equals_one_batch(tmp_path, accumulation, steps, kind):
    found = run_attached(tmp_path, gpt2(), kind, gradient_accumulation_steps=accumulation)
    assert_by_hand(found, gpt2(), steps)
    first = gradient(gpt2(), found.witness.weights[0], causal_loss, found.windows[0])
    assert max((first[n] - g).abs().max() for n, g in found.witness.gradients[0].items()) > 0.01, "the penalty is seen"


def test_bert_has_the_normalization_of_its_host(tmp_path):
    assert_by_hand(run_attached(tmp_path, bert()), bert(), 3, loss_fn=masked_loss)


@pytest.mark.parametrize(
    ("options", "hand"),
    [
        ({"scheme": "backward"}, {"sign": -1.0}),
        ({"ascent": "normalized"}, {"unit": True}),
        ({"include": torch.nn.LayerNorm}, {"selected": lambda name: "ln_" in name}),
        ({"exclude": ["*.ln_*"]}, {"selected": lambda name: "ln_" not in name}),
        ({"gamma": lambda step: GAMMA}, {}),
    ],
    ids=["backward", "normalized", "include", "exclude", "a function of the step"],
)
def test_options_are_those_of_the_regularizer(tmp_path, options, hand):
    assert_by_hand(run_attached(tmp_path, gpt2(), attached=options), gpt2(), **hand)


def test_a_loss_scale_changes_nothing(tmp_path):
    class Scaled(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    scaled, model = gpt2(), gpt2()
    run_attached(tmp_path, scaled, Scaled)
    run_attached(tmp_path, model)
    torch.testing.assert_close(list(scaled.parameters()), list(model.parameters()))


# The class and `attach` are one.

HARD = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 0.5, "num_train_epochs": 2}
HARD |= {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
TARGET = {"gamma": gradreg.TargetRatio(0.2, ramp=3, start=GAMMA), "cap": 0.9}


def logs(trainer):
    clocks = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in entry.items() if k not in clocks} for entry in trainer.state.log_history]


def test_it_does_what_the_class_does_bit_for_bit(tmp_path):
    theirs, ours = gpt2(dropout=0.3), gpt2(dropout=0.3)
    fields = {"target_penalty_ratio": 0.2, "gamma_warmup_steps": 3, "penalty_cap": 0.9}
    as_class = run(tmp_path / "class", theirs, **fields, **HARD).trainer
    live = run_attached(tmp_path / "attached", ours, Stepping, TARGET, **HARD).trainer
    assert all(torch.equal(p, q) for p, q in zip(weights_of(ours), weights_of(theirs)))
    assert live.regularizer_state() == as_class.regularizer_state()
    assert logs(live) == logs(as_class)
    assert "penalty_ratio" in logs(live)[0]
    saved = [(tmp_path / name / "checkpoint-2" / "gradreg.json").read_text() for name in ("class", "attached")]
    assert saved[0] == saved[1]
    assert live.num_steps == 28, "the step of the trainer runs in both passes"


@pytest.mark.parametrize("was_attached", [True, False])
def test_resume_is_exact(tmp_path, was_attached):
    """From a checkpoint of its own, or of the class."""
    straight, model = gpt2(dropout=0.2), gpt2(dropout=0.2, seed=5)
    fields = {"target_penalty_ratio": 0.2, "gamma_warmup_steps": 3, "penalty_cap": 0.9}
    if was_attached:
        whole = run_attached(tmp_path / "a", straight, attached=TARGET, **HARD).trainer
    else:
        whole = run(tmp_path / "a", straight, **fields, **HARD).trainer
    trainer = plain(tmp_path / "b", model, **HARD)
    attach(trainer, **{**PENALTY, **TARGET})
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.regularizer_state() == whole.regularizer_state()
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(straight)))


def test_no_penalty_is_plain_training_bit_for_bit(tmp_path):
    plain_model, model = gpt2(dropout=0.3), gpt2(dropout=0.3)
    run(tmp_path, plain_model, Trainer, TrainingArguments, max_grad_norm=1.0)
    found = run_attached(tmp_path, model, Stepping, {"gamma": 0.0}, max_grad_norm=1.0)
    assert found.trainer.num_losses == 7
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(plain_model)))


def test_without_a_number_gamma_finds_a_ratio_by_itself(tmp_path):
    trainer = plain(tmp_path)
    attach(trainer)
    assert trainer.regularizer.gamma == gradreg.TargetRatio()


def test_a_model_that_is_made_anew(tmp_path):
    data = {"train_dataset": rows(), "data_collator": Collator(), "model_init": lambda: gpt2()}
    trainer = Trainer(None, arguments(tmp_path, TrainingArguments), **data)
    attach(trainer, **PENALTY)
    as_class = RegularizedTrainer(None, arguments(tmp_path), **data)
    for t in (trainer, as_class):
        t.train()
    assert trainer.regularizer_state() == as_class.regularizer_state()
    assert all(torch.equal(p, q) for p, q in zip(weights_of(trainer.model), weights_of(as_class.model)))


# The trainer stays what others took it for.


def test_the_trainer_is_the_same_object_of_a_class_with_the_same_name(tmp_path):
    trainer = plain(tmp_path, kind=Stepping)
    others = {"trainer": trainer}
    attach(trainer, **PENALTY)
    assert others["trainer"].regularizer is trainer.regularizer
    assert isinstance(trainer, Stepping)
    assert isinstance(trainer, GradientRegularizationMixin)
    assert (type(trainer).__name__, type(trainer).__module__) == ("Stepping", Stepping.__module__)
    assert type(plain(tmp_path, kind=Stepping)) is Stepping, "others of its class are left alone"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_copies_train_as_the_trainer_does(tmp_path, copied):
    GradientState._reset_state()  # a training before leaves what cannot be pickled, in plain trainers too
    trainer = plain(tmp_path, kind=Stepping)
    attach(trainer, **PENALTY)
    again = copied(trainer)
    assert type(again) is type(trainer)
    for t in (again, trainer):
        t.train()
    assert again.regularizer.step == 3
    assert all(torch.equal(p, q) for p, q in zip(weights_of(again.model), weights_of(trainer.model)))


def test_others_may_give_it_a_class_again(tmp_path):
    """As Ray's `prepare_trainer` does, after Axolotl's plugins have run."""
    trainer = plain(tmp_path, kind=Stepping)
    attach(trainer, **PENALTY)
    trainer.__class__ = type("RayTrainer", (type(trainer),), {})
    trainer.train()
    assert trainer.regularizer.step == 3
    assert trainer.num_losses == 14


class Hook(TrainerCallback):
    """ms-swift's callbacks are given their trainer before it is made; `on_init_end` is the first they hear of it."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_init_end(self, args, state, control, **kwargs):
        attach(self.trainer, **PENALTY)


class Calling(Stepping):
    def __init__(self, *args, callbacks=(), **kwargs):
        super().__init__(*args, callbacks=[*callbacks, Hook(self)], **kwargs)


def test_it_is_attached_by_a_callback_when_the_trainer_is_made(tmp_path):
    found = run(tmp_path, gpt2(), Calling, TrainingArguments)
    assert_by_hand(found, gpt2(), 3)
    assert found.trainer.num_losses == 14


class Plugin:
    """Axolotl calls this when the trainer is made."""

    def post_trainer_create(self, cfg, trainer):
        attach(trainer, cfg["gamma"], cfg["epsilon"])


def test_it_is_attached_by_a_plugin(tmp_path):
    trainer = plain(tmp_path, kind=Stepping)
    Plugin().post_trainer_create(PENALTY, trainer)
    trainer.train()
    assert trainer.regularizer.step == 3


def test_what_a_trainer_counts_may_be_named(tmp_path):
    trainer = plain(tmp_path, kind=Stepping)
    attach(trainer, **PENALTY)
    trainer.bookkeeping += ("num_losses",)
    trainer.train()
    assert trainer.num_losses == 7


# What is refused, and leaves the trainer as it was.


def finished(trainer):
    trainer.train()


def training(trainer):
    class During(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            attach(trainer, **PENALTY)

    trainer.add_callback(During())
    trainer.train()


def twice(trainer):
    attach(trainer, **PENALTY)


def replaced(trainer):
    trainer.training_step = lambda *args: Trainer.training_step(trainer, *args)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (finished, r"^trainer has begun to train \(step 3\): attach before train\(\)"),
        (training, r"^trainer has begun to train \(step 1\): attach before train\(\)"),
        (twice, "^trainer is regularized already, as a Trainer with GradientRegularizer"),
        (replaced, "^training_step of the trainer was replaced on the instance"),
    ],
)
def test_not_now(tmp_path, before, message):
    trainer = plain(tmp_path)
    with pytest.raises(RuntimeError, match=message):  # noqa: PT012
        before(trainer)
        attach(trainer, **PENALTY)


def test_a_trainer_of_a_regularized_class_is_refused(tmp_path):
    trainer = RegularizedTrainer(gpt2(), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(RuntimeError, match="regularized already, as a RegularizedTrainer"):
        attach(trainer, **PENALTY)


def test_a_trainer_that_is_not_made_yet_is_refused():
    with pytest.raises(RuntimeError, match=r"Stepping whose __init__ has not run yet: .* on_init_end"):
        attach(Stepping.__new__(Stepping), **PENALTY)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "got NoneType"),
        (torch.nn.Linear(2, 2), "got Linear: for a loop of your own there is gradreg.GradientRegularizer"),
        (Trainer, "got the class Trainer, which is to be made first"),
    ],
    ids=["nothing", "a model", "a class"],
)
def test_what_is_no_trainer_is_refused(value, message):
    with pytest.raises(TypeError, match=f"^trainer must be a live transformers.Trainer .*{message}"):
        attach(value, **PENALTY)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gamma": -1.0}, ValueError, "gamma must be a finite number ≥ 0"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number > 0"),
        ({"scheme": "central"}, ValueError, "needs more than one replay"),
        ({"batch": gradreg.Fraction(0.1)}, ValueError, "batch=Fraction"),
        ({"ascent_sync": "local"}, ValueError, 'ascent_sync="local"'),
        ({"exclude": ["nowhere.*"]}, ValueError, "matches no parameter"),
        ({"penalty_cap": 1.0}, TypeError, r"^penalty_cap is a field of arguments classes; attach takes cap=\.\.\.\."),
        ({"target_penalty_ratio": 0.3}, TypeError, r"attach takes gamma=gradreg\.TargetRatio\(ratio\)"),
        ({"gr_epsilon": 0.3}, TypeError, r"attach takes epsilon=\.\.\."),
        ({"lr": 0.3}, TypeError, "unexpected keyword argument 'lr'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_change_nothing(tmp_path, options, error, message):
    trainer = plain(tmp_path, kind=Stepping)
    attributes, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    with pytest.raises(error, match=message):
        attach(trainer, **{**PENALTY, **options})
    assert type(trainer) is Stepping
    assert vars(trainer) == attributes
    assert trainer.callback_handler.callbacks == callbacks
    attach(trainer, **PENALTY)
    trainer.train()
    assert trainer.regularizer.step == 3


def test_a_host_that_cannot_be_served_is_refused_and_left_as_it_was(tmp_path):
    trainer = plain(tmp_path, optim="lomo")
    with pytest.raises(ValueError, match=r"^optim is not supported by Trainer: lomo moves the weights"):
        attach(trainer, **PENALTY)
    assert type(trainer) is Trainer


def test_settings_that_change_after_it_was_attached_are_refused_when_training_starts(tmp_path):
    model = gpt2()
    trainer = plain(tmp_path, model)
    attach(trainer, **PENALTY)
    trainer.args.optim = "lomo"
    with pytest.raises(ValueError, match=r"^optim is not supported by Trainer"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(gpt2())))


class OldPolicy(Trainer):
    """GRPO as it was in TRL before."""

    def _get_per_token_logps(self, *args):
        raise NotImplementedError


def test_a_policy_of_another_make_is_refused_and_not_left_unpinned(tmp_path):
    model = gpt2()
    with pytest.raises(RuntimeError, match="compute_loss of OldPolicy did not ask for the log-probabilities once"):
        run_attached(tmp_path, model, OldPolicy)
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(gpt2())))


def test_a_version_that_is_not_known_is_told_of(tmp_path, monkeypatch):
    trainer = plain(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.0.1")
    tested = f"tested with transformers {', '.join(TESTED['transformers'])}, and not with transformers 6.0.1"
    with pytest.warns(UserWarning, match=tested) as told:
        attach(trainer, **PENALTY)
    assert told[0].filename == __file__
    trainer.train()
    assert trainer.regularizer.step == 3


@pytest.mark.parametrize("version", [*TESTED["transformers"], f"{TESTED['transformers'][0]}.7"])
def test_versions_that_are_known_are_not_told_of(tmp_path, monkeypatch, version):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(plain(tmp_path), **PENALTY)


def test_a_host_that_is_made_otherwise_is_refused(tmp_path, monkeypatch):
    trainer = plain(tmp_path)
    monkeypatch.delattr(Trainer, "_save_optimizer_and_scheduler")
    with pytest.raises(RuntimeError, match=r"^Trainer has no _save_optimizer_and_scheduler, .* tested were transf"):
        attach(trainer, **PENALTY)
    assert type(trainer) is Trainer


# Arguments of a penalty that nobody would read.


@pytest.mark.parametrize("kind", [Trainer, Stepping])
def test_regularized_arguments_in_a_plain_trainer_are_refused(tmp_path, kind):
    args = arguments(tmp_path)
    told = f"^{kind.__name__} would ignore gamma and epsilon of RegularizedTrainingArguments and train without the"
    with pytest.raises(TypeError, match=told):
        kind(gpt2(), args, train_dataset=rows())
    RegularizedTrainer(gpt2(), args, train_dataset=rows())


def test_regularized_arguments_without_a_penalty_are_those_of_a_plain_trainer(tmp_path):
    found = run(tmp_path, gpt2(), Trainer, RegularizedTrainingArguments, gamma=0.0)
    assert found.trainer.state.global_step == 3


def test_a_script_may_ask_for_the_log_level_itself(tmp_path):
    args = arguments(tmp_path)
    assert args.get_process_log_level() == arguments(tmp_path, TrainingArguments).get_process_log_level()
