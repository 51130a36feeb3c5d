"""The Trainer against hand-written gradients of its whole windows."""

import copy
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import ranks
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradreg import GradientRegularizer, TargetRatio
from gradreg.integrations._arguments import check_host
from gradreg.integrations.transformers import (
    GradientRegularizationMixin,
    RegularizationArguments,
    RegularizedTrainer,
    RegularizedTrainingArguments,
    attach,
)
from gradreg.training.engine import Engine
from gradreg.training.selection import bare_name

GAMMA, EPSILON, VOCABULARY = 0.5, 0.4, 23


def gpt2(dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    rates = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    options |= {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, **options))


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(
        BertConfig(**sizes, **rates, intermediate_size=16, max_position_embeddings=8, initializer_range=0.3)
    )


def rows(num=14, length=6):
    """Token rows with different numbers of labels, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (num, length), generator=generator)
    labels = tokens.clone()
    for i in range(num):
        labels[i, : 1 + i % 4] = -100  # the first is never predicted, and the Trainer may count it
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels)]


class Witness(TrainerCallback):
    """Weights and gradients as the optimizer finds them, after clipping."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {bare_name(n): p for n, p in model.named_parameters()}
        self.weights.append({n: ranks.gathered(p).detach().clone() for n, p in named.items()})
        self.gradients.append({n: ranks.gathered(p.grad).clone() for n, p in named.items() if p.grad is not None})


class Collator:
    """Keeps every batch in the order in which the loop gets them."""

    def __init__(self):
        self.batches = []

    def __call__(self, features):
        batch = {name: torch.stack([f[name] for f in features]) for name in features[0]}
        self.batches.append({name: t.clone() for name, t in batch.items()})
        return batch


def arguments(folder, kind=RegularizedTrainingArguments, **options):
    """Seven micro-batches of two rows: windows of three leave a last one of one."""
    ours = {"gamma": GAMMA, "epsilon": EPSILON} if issubclass(kind, RegularizationArguments) else {}
    plain = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return kind(str(folder), **{**ours, **plain, **options})


def run(folder, model, kind=RegularizedTrainer, arguments_kind=RegularizedTrainingArguments, attached=None, **options):
    """One training; the trainer, what the optimizer saw, and the windows. `attached` are the arguments of `attach`."""
    args = arguments(folder, arguments_kind, **options)
    witness, collator = Witness(), Collator()
    trainer = kind(model, args, train_dataset=rows(), data_collator=collator, callbacks=[witness])
    if attached is not None:
        attach(trainer, **attached)
    trainer.train()
    k = args.gradient_accumulation_steps
    per_epoch = [collator.batches[i : i + 7] for i in range(0, len(collator.batches), 7)]
    windows = [epoch[i : i + k] for epoch in per_epoch for i in range(0, 7, k)]
    return SimpleNamespace(trainer=trainer, witness=witness, windows=windows)


def causal_loss(model, window):
    """The mean over all labels of the window, as one batch."""
    tokens, labels = (torch.cat([batch[name] for batch in window]) for name in ("input_ids", "labels"))
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def masked_loss(model, window):
    """BertForMaskedLM averages over each micro-batch, and Trainer adds these up."""
    losses = []
    for batch in window:
        logits = model(input_ids=batch["input_ids"]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100))
    return torch.stack(losses).sum()


def gradient(model, weights, loss_fn, window):
    model = copy.deepcopy(model).train()
    model.load_state_dict(weights, strict=False)
    loss_fn(model, window).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def by_hand(model, weights, window, loss_fn=causal_loss, selected=lambda name: True, sign=1.0, unit=False):
    """ĝ = g1 + (γ/ε)(g2 − g1), and g1 where not selected."""
    first = gradient(model, weights, loss_fn, window)
    chosen = [n for n in first if selected(n)]
    scale = 1 / torch.stack([first[n].square().sum() for n in chosen]).sum().sqrt() if unit else 1.0
    moved = {n: w + sign * EPSILON * scale * first[n] if n in chosen else w for n, w in weights.items()}
    second = gradient(model, moved, loss_fn, window)
    ratio = GAMMA / (sign * EPSILON)
    return {n: first[n] + ratio * (second[n] - first[n]) if n in chosen else first[n] for n in first}


def assert_by_hand(found, model, steps=None, **options):
    assert len(found.witness.gradients) == len(found.windows) == (steps or len(found.windows))
    for weights, gradients, window in zip(found.witness.weights, found.witness.gradients, found.windows):
        torch.testing.assert_close(gradients, by_hand(model, weights, window, **options), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 7), (3, 3)])
def test_gpt2_equals_one_batch(tmp_path, accumulation, steps):
    found = run(tmp_path, gpt2(), gradient_accumulation_steps=accumulation)
    assert_by_hand(found, gpt2(), steps)


def test_the_penalty_is_seen(tmp_path):
    """The tolerance above is far below what a wrong second pass would change."""
    found = run(tmp_path, gpt2())
    first = gradient(gpt2(), found.witness.weights[0], causal_loss, found.windows[0])
    gap = max((first[n] - g).abs().max() for n, g in found.witness.gradients[0].items())
    assert gap > 0.01


def test_bert_has_the_normalization_of_its_host(tmp_path):
    assert_by_hand(run(tmp_path, bert()), bert(), 3, loss_fn=masked_loss)


@pytest.mark.parametrize(
    ("options", "hand"),
    [({"scheme": "backward"}, {"sign": -1.0}), ({"ascent": "normalized"}, {"unit": True})],
    ids=["backward", "normalized"],
)
def test_other_differences(tmp_path, options, hand):
    assert_by_hand(run(tmp_path, gpt2(), **options), gpt2(), **hand)


def test_what_is_excluded_keeps_g1(tmp_path):
    found = run(tmp_path, gpt2(), exclude=["transformer.w*", "*.ln_*"])
    assert not any("wte" in n or "ln_" in n for n in found.trainer.regularizer.selection.named)
    chosen = found.trainer.regularizer.selection.named
    assert_by_hand(found, gpt2(), selected=lambda name: name in chosen)


def test_frozen_parameters_stay(tmp_path):
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    before = model.transformer.wte.weight.detach().clone()
    frozen = copy.deepcopy(model)
    found = run(tmp_path, model)
    assert torch.equal(model.transformer.wte.weight, before)
    assert_by_hand(found, frozen)


def test_clipping_comes_after(tmp_path):
    clipped, free = run(tmp_path, gpt2(), max_grad_norm=0.05), run(tmp_path, gpt2())
    gradients = free.witness.gradients[0]
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    assert norm > 0.1
    expected = {n: g * (0.05 / (norm + 1e-6)) for n, g in gradients.items()}
    torch.testing.assert_close(clipped.witness.gradients[0], expected)


def test_a_window_that_an_epoch_left_unfinished(tmp_path):
    """Without a length the Trainer adds what an epoch has left to the first window of the next."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from rows()

    witness, collator = Witness(), Collator()
    args = arguments(tmp_path, max_steps=3)
    trainer = RegularizedTrainer(gpt2(), args, train_dataset=Stream(), data_collator=collator, callbacks=[witness])
    trainer.train()
    parts = [collator.batches[6:7], collator.batches[7:10]]
    expected = by_hand(gpt2(), witness.weights[2], parts, lambda model, ps: sum(causal_loss(model, p) for p in ps))
    torch.testing.assert_close(witness.gradients[2], expected, rtol=2e-4, atol=2e-5)


@pytest.fixture
def unchecked(monkeypatch):
    """Without the replay check, which calls the model once more in the first step: forwards are counted here."""
    monkeypatch.setattr(Engine, "_check_forwards", lambda self: None)


class Moments:
    """The random state at each forward of a training pass."""

    def __init__(self, model):
        self.states = []
        model.register_forward_pre_hook(lambda *_: self.states.append(torch.get_rng_state()))


@pytest.mark.usefixtures("unchecked")
def test_dropout_masks_are_those_of_the_first_pass(tmp_path):
    model = gpt2(dropout=0.3)
    moments, pristine = Moments(model), gpt2(dropout=0.3)
    found = run(tmp_path, model)

    def loss_with_masks(model, window):
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        losses = []
        for batch, state in zip(window, first_pass):
            torch.set_rng_state(state)
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            losses.append(F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum") / count)
        return torch.stack(losses).sum()

    for weights, gradients, window in zip(found.witness.weights, found.witness.gradients, found.windows):
        first_pass, moments.states = moments.states[: len(window)], moments.states[2 * len(window) :]
        expected = by_hand(pristine, weights, window, loss_with_masks)
        torch.testing.assert_close(gradients, expected, rtol=2e-4, atol=2e-5)
    assert not moments.states


def test_the_random_state_afterwards_is_that_of_one_pass(tmp_path):
    ends = []
    for kind, arguments_kind in ((RegularizedTrainer, RegularizedTrainingArguments), (Trainer, TrainingArguments)):
        run(tmp_path, gpt2(dropout=0.3), kind, arguments_kind)
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


class Noisy(RegularizedTrainer):
    """A loss with random numbers outside the model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        keep = torch.rand(inputs["labels"].shape) > 0.2
        inputs["labels"] = inputs["labels"].where(keep, -100)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.usefixtures("unchecked")
def test_random_numbers_of_the_loss_are_replayed(tmp_path):
    kept = []
    model = gpt2()
    hook = lambda module, args, kwargs: kept.append(kwargs["labels"].clone())  # noqa: E731
    model.register_forward_pre_hook(hook, with_kwargs=True)
    run(tmp_path, model, Noisy, max_steps=1)
    torch.testing.assert_close(kept[:3], kept[3:])


def test_no_penalty_is_plain_training_bit_for_bit(tmp_path):
    plain_model, model = gpt2(dropout=0.3), gpt2(dropout=0.3)
    forwards = Moments(model)
    plain = run(tmp_path, plain_model, Trainer, TrainingArguments, max_grad_norm=1.0)
    found = run(tmp_path, model, gamma=0.0, max_grad_norm=1.0)
    assert len(forwards.states) == 7
    assert found.trainer.regularizer.step == 3
    for ours, theirs in zip(found.witness.gradients, plain.witness.gradients):
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain_model.parameters()))


@pytest.mark.usefixtures("unchecked")
def test_warm_up_runs_no_second_pass_at_its_beginning(tmp_path):
    model = gpt2()
    forwards = Moments(model)
    found = run(tmp_path, model, gamma_warmup_steps=4)
    assert len(forwards.states) == 3 + 2 * 4
    first = gradient(gpt2(), found.witness.weights[0], causal_loss, found.windows[0])
    torch.testing.assert_close(found.witness.gradients[0], first, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = run(tmp_path, gpt2(dropout=0.3))
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = run(tmp_path, gpt2(dropout=0.3), **options)
    torch.testing.assert_close(found.witness.gradients, plain.witness.gradients, rtol=1e-4, atol=1e-6)


class Bigrams(torch.nn.Sequential):
    def forward(self, input_ids, labels):
        return {"loss": F.cross_entropy(super().forward(input_ids).flatten(0, 1), labels.flatten())}


def test_torch_compile_changes_nothing(tmp_path):
    torch.manual_seed(0)
    model = Bigrams(torch.nn.Embedding(VOCABULARY, 8), torch.nn.Tanh(), torch.nn.Linear(8, VOCABULARY))
    plain = run(tmp_path, copy.deepcopy(model))
    found = run(tmp_path, model, torch_compile=True, torch_compile_backend="aot_eager")
    assert type(found.trainer.regularizer.model).__name__ == "OptimizedModule"
    torch.testing.assert_close(found.witness.gradients, plain.witness.gradients, rtol=1e-5, atol=1e-6)


def test_label_smoothing(tmp_path):
    def smoothed(model, window):
        tokens, labels = (torch.cat([batch[name] for batch in window]) for name in ("input_ids", "labels"))
        logp = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        target, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        nll = -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return ((0.9 * nll - 0.1 * logp.mean(-1)) * mask).sum() / mask.sum()

    assert_by_hand(run(tmp_path, gpt2(), label_smoothing_factor=0.1), gpt2(), loss_fn=smoothed)


def test_bf16_autocast_sees_the_displaced_weights(tmp_path):
    """The hand-written passes under the same autocast."""

    def loss_in_parts(model, window):
        count = sum((batch["labels"][:, 1:] != -100).sum() for batch in window)
        losses = []
        for batch in window:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=batch["input_ids"]).logits
            logits = logits.float()[:, :-1].flatten(0, 1)
            losses.append(F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum") / count)
            torch.clear_autocast_cache()
        return torch.stack(losses).sum()

    found = run(tmp_path, gpt2(), bf16=True, max_steps=1)
    weights, window = found.witness.weights[0], found.windows[0]
    expected = by_hand(gpt2(), weights, window, loss_in_parts)
    first = gradient(gpt2(), weights, loss_in_parts, window)
    error = max((found.witness.gradients[0][n] - expected[n]).abs().max() for n in expected)
    penalty = max((first[n] - expected[n]).abs().max() for n in expected)
    assert error < 0.05 * penalty


def test_a_loss_scale_changes_nothing(tmp_path):
    """As fp16 on a GPU: the scaler of accelerate, here on the host."""

    class Scaled(RegularizedTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    plain, scaled = gpt2(), gpt2()
    run(tmp_path, plain)
    found = run(tmp_path, scaled, Scaled)
    assert found.witness.gradients[0]["transformer.ln_f.bias"].abs().max() > 1
    torch.testing.assert_close(list(scaled.parameters()), list(plain.parameters()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_lora(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        model = peft.get_peft_model(gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        return model

    found = run(tmp_path, adapted())
    assert all("lora" in name for name in found.witness.gradients[0])
    assert set(found.trainer.regularizer.selection.named) == set(found.witness.gradients[0])
    assert_by_hand(found, adapted(), 3)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def test_resume_is_exact(tmp_path):
    options = {"gamma_warmup_steps": 8, "target_penalty_ratio": 0.2, "num_train_epochs": 2, "optim": "adamw_torch"}
    options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}
    whole = gpt2(dropout=0.2)
    straight = run(tmp_path / "a", whole, **options).trainer
    folder = tmp_path / "a" / "checkpoint-2"
    assert set(json.loads((folder / "gradreg.json").read_text())) == {
        "step",
        "active_steps",
        "skipped_steps",
        "target",
    }
    model = gpt2(dropout=0.2, seed=5)
    args = arguments(tmp_path / "b", **options)
    trainer = RegularizedTrainer(model, args, train_dataset=rows(), data_collator=Collator())
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.regularizer.step == straight.regularizer.step == 6
    assert trainer.regularizer_state() == straight.regularizer_state()
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(whole)))


@pytest.mark.parametrize("content", [b"[]", b"null", b"", b"\xff", b'{"step": 2'])
def test_a_state_of_another_kind_is_named(content, tmp_path):
    run(tmp_path, gpt2(), save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-2" / "gradreg.json").write_bytes(content)
    trainer = RegularizedTrainer(gpt2(), arguments(tmp_path), train_dataset=rows(), data_collator=Collator())
    with pytest.raises(ValueError, match=r"checkpoint-2/gradreg\.json must be a JSON object"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_run_without_the_penalty_can_be_taken_up(tmp_path):
    run(tmp_path, gpt2(), Trainer, TrainingArguments, save_strategy="steps", save_steps=2)
    trainer = RegularizedTrainer(gpt2(), arguments(tmp_path), train_dataset=rows(), data_collator=Collator())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.regularizer.step == 1
    trainer.train()
    assert trainer.regularizer.step == 3  # a new run begins anew
    assert not trainer.model._forward_pre_hooks


def test_a_run_that_begins_again_with_a_smaller_batch_begins_at_step_zero(tmp_path):
    class Full(RegularizedTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 8:  # in the second pass of the second window
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(*args, **kwargs)

    args = arguments(tmp_path, auto_find_batch_size=True, gamma_warmup_steps=9)
    trainer = Full(gpt2(), args, train_dataset=rows(), data_collator=Collator())
    trainer.train()
    assert trainer._train_batch_size == 1
    assert trainer.regularizer.step == trainer.state.global_step == 5


def test_what_is_logged(tmp_path):
    trainer = run(tmp_path, gpt2(), logging_strategy="steps", logging_steps=1).trainer
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["penalty_ratio"] > 0
        assert entry["realized"] == pytest.approx(1, abs=1e-4)
        assert entry["skipped_steps"] == 0
        norms = entry["grad_norm"], entry["gradreg_grad_norm"], entry["gradreg_penalty_norm"]
        assert abs(norms[1] - norms[2]) <= norms[0] <= norms[1] + norms[2]
        assert entry["penalty_ratio"] == pytest.approx(norms[2] / norms[1])


def test_the_cap_bounds_the_ratio(tmp_path):
    trainer = run(tmp_path, gpt2(), gamma=50.0, penalty_cap=0.25, logging_strategy="steps", logging_steps=1).trainer
    ratios = [entry["penalty_ratio"] for entry in trainer.state.log_history if "loss" in entry]
    assert ratios == pytest.approx([0.25] * 3)


def test_gamma_finds_the_ratio(tmp_path):
    options = {"logging_strategy": "steps", "logging_steps": 1, "num_train_epochs": 14, "learning_rate": 1e-3}
    trainer = run(tmp_path, gpt2(), gamma=5.0, target_penalty_ratio=0.3, **options).trainer
    ratios = [entry["penalty_ratio"] for entry in trainer.state.log_history if "loss" in entry]
    assert ratios[0] > 1
    assert sum(ratios[-15:]) / 15 == pytest.approx(0.3, rel=0.25)


def test_without_a_number_gamma_finds_a_ratio_by_itself(tmp_path):
    options = {"logging_strategy": "steps", "logging_steps": 1, "num_train_epochs": 5, "learning_rate": 1e-3}
    trainer = run(tmp_path, gpt2(), gamma=None, epsilon=None, **options).trainer
    assert trainer.regularizer.gamma == TargetRatio()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    gammas = [entry["gamma"] for entry in logs]
    assert gammas[0] == pytest.approx(trainer.regularizer.epsilon / 1000)
    assert gammas[-1] != gammas[0]
    assert max(entry["penalty_ratio"] for entry in logs) < 2 * TargetRatio().target


def test_a_warm_up_is_one_of_the_target(tmp_path):
    options = {"gamma_warmup_steps": 10, "target_penalty_ratio": 0.3, "penalty_cap": 0.5}
    trainer = RegularizedTrainer(gpt2(), arguments(tmp_path, **options), train_dataset=rows())
    assert trainer.regularizer.gamma == TargetRatio(0.3, ramp=10, start=GAMMA)


def test_evaluation_between_steps_changes_nothing(tmp_path):
    class Evaluating(RegularizedTrainer):
        def training_step(self, *args):
            loss = super().training_step(*args)
            self.evaluate(rows(4))
            return loss

    plain, found = run(tmp_path, gpt2()), run(tmp_path, gpt2(), Evaluating)
    assert str(found.witness.gradients) == str(plain.witness.gradients)


# Two processes.

TOGETHER = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "train_sampling_strategy": "sequential"}
TOGETHER |= {"target_penalty_ratio": 0.3, "max_steps": 2}
SHARDED = ranks.sharding("GPT2Block")
PLAN = {"transformer.h.*": "free_full_weight"}


class Sharded(ranks.ShardedByAccelerate, RegularizedTrainer):
    pass


def share(folder, model, kind=RegularizedTrainer, resume=None, attached=None, **options):
    """One training on the rows in their order; what the optimizer saw, gathered from the shards."""
    witness, options = Witness(), {**TOGETHER, **options}
    if attached is not None:
        del options["target_penalty_ratio"]
    args = arguments(folder, RegularizedTrainingArguments if attached is None else TrainingArguments, **options)
    trainer = kind(model, args, train_dataset=rows(16), data_collator=Collator(), callbacks=[witness])
    if attached is not None:
        attach(trainer, **attached)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "gradients": witness.gradients,
        "state": trainer.regularizer_state(),
        "model": type(trainer.regularizer.model).__name__,
        "weights": ranks.whole(trainer.model),
    }


def told(work, *args, **options):
    with pytest.raises(ValueError, match="is not supported") as error:
        work(*args, **options)
    return str(error.value)


def on_one_rank(rank, folder):
    from transformers.distributed import DistributedConfig

    ranks.as_torchrun(rank, port=29556)

    def load(name):
        return GPT2LMHeadModel.from_pretrained(
            folder / name, distributed_config=DistributedConfig(fsdp_size=2, fsdp_plan=PLAN)
        )

    target = {"gamma": TargetRatio(TOGETHER["target_penalty_ratio"], ramp=0, start=GAMMA), "epsilon": EPSILON}
    found = {
        "DDP, attached": share(folder, gpt2(), Trainer, attached=target, ddp_find_unused_parameters=False),
        "DDP": share(folder, gpt2(), ddp_find_unused_parameters=False),
        "FSDP2 at loading": share(folder, load("untied")),
        "refused": [told(share, folder, gpt2(), **SHARDED), told(share, folder, load("tied"))],
    }
    found["FSDP2"] = share(folder, gpt2(), Sharded, **SHARDED)
    longer = {**SHARDED, "max_steps": 4, "num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    longer |= {"gamma_warmup_steps": 4, "save_strategy": "steps", "save_steps": 2}
    found["straight"] = share(folder / "straight", gpt2(dropout=0.2), Sharded, **longer)
    checkpoint = str(folder / "straight" / "checkpoint-2")
    found["resumed"] = share(folder / "resumed", gpt2(dropout=0.2, seed=5), Sharded, checkpoint, **longer)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    gpt2().save_pretrained(folder / "tied")
    gpt2(tie_word_embeddings=False).save_pretrained(folder / "untied")
    return ranks.on_two_ranks(on_one_rank, folder)


def flat(state):
    return {**state, **state["target"], "target": None}


@pytest.mark.parametrize(
    ("host", "wrapper"),
    [
        ("DDP", "DistributedDataParallel"),
        ("DDP, attached", "DistributedDataParallel"),
        ("FSDP2", "FSDPGPT2LMHeadModel"),
        ("FSDP2 at loading", "FSDPGPT2LMHeadModel"),
    ],
)
def test_two_processes_equal_one(tmp_path, two_ranks, host, wrapper):
    """Windows, normalization, clipping, calibration; tied weights but where they are refused."""
    model = gpt2(tie_word_embeddings=host != "FSDP2 at loading")
    alone = share(tmp_path, model, per_device_train_batch_size=4)
    for found in two_ranks:
        assert found[host]["model"] == wrapper
        torch.testing.assert_close(found[host]["gradients"], alone["gradients"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[host]["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
        assert flat(found[host]["state"]) == pytest.approx(flat(alone["state"]))


def test_resume_is_exact_with_fsdp2(two_ranks):
    for found in two_ranks:
        assert found["resumed"]["state"] == found["straight"]["state"]
        assert all(torch.equal(p, q) for p, q in zip(found["resumed"]["weights"], found["straight"]["weights"]))


def test_sharding_that_would_be_silently_another_is_refused(two_ranks):
    for found in two_ranks:
        ignored, tied = found["refused"]
        assert ignored.startswith("fsdp is not supported by RegularizedTrainer: accelerate shards on accelerators only")
        assert tied.startswith("distributed_config is not supported by RegularizedTrainer: transformers 5.23 computes")


# What is refused.


class Drawing(RegularizedTrainer):
    """Takes another batch on each call."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.draws = getattr(self, "draws", 0) + 1
        inputs = {name: t.roll(self.draws, 1) for name, t in inputs.items()}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_loss_that_draws_data_is_refused_and_nothing_stays_displaced(tmp_path):
    model = gpt2()
    before = weights_of(model)
    with pytest.raises(ValueError, match="another batch than the first pass"):
        run(tmp_path, model, Drawing)
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), before))
    assert all(p.grad is None for p in model.parameters())


def test_a_mixin_that_would_never_be_asked_is_refused():
    with pytest.raises(TypeError, match=r"^Behind must name GradientRegularizationMixin before Trainer"):

        class Behind(Trainer, GradientRegularizationMixin):
            pass


def test_a_training_step_of_its_own_is_refused(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            loss.backward()
            return loss.detach()

    class Mixed(GradientRegularizationMixin, Own):
        pass

    with pytest.raises(RuntimeError, match="_prepare_inputs 0 times"):
        run(tmp_path, gpt2(), Mixed)


def test_a_training_step_over_that_of_the_mixin_is_refused_before_the_first_step(tmp_path):
    class Over(RegularizedTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            return loss.detach()

    model = gpt2()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"training_step of Over did not call that of GradientRegularizationMixin"):
        run(tmp_path, model, Over)
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "central"}, 'scheme must be "forward" or "backward"'),
        ({"penalty_cap": 0.1, "target_penalty_ratio": 0.3}, "must not exceed penalty_cap"),
        ({"target_penalty_ratio": -1.0}, "target_penalty_ratio must be a finite number > 0"),
        (
            {"target_penalty_ratio": "0.3"},
            "target_penalty_ratio must be a finite number > 0, or None for none, got '0.3'",
        ),
        ({"penalty_cap": 0}, "^penalty_cap must be a finite number > 0, or None for none, got 0"),
        ({"gamma_warmup_steps": -1}, "^gamma_warmup_steps must be an integer ≥ 0"),
        ({"gamma_warmup_steps": 2.5}, "^gamma_warmup_steps must be an integer ≥ 0"),
        ({"target_penalty_ratio": 0.3, "gamma": 0.0}, "gamma must be > 0"),
        ({"epsilon": 0.0}, "epsilon must be a finite number > 0"),
        ({"gamma": -1.0}, "gamma must be a finite number ≥ 0"),
        ({"exclude": ["nowhere.*"]}, "matches no parameter"),
        ({"optim": "lomo"}, "optim is not supported"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RegularizedTrainer(gpt2(), arguments(tmp_path, **options), train_dataset=rows())


def test_without_the_host_there_is_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "gradreg.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install '.\[transformers\]'"):
        importlib.import_module("gradreg.integrations.transformers")


def test_arguments_without_the_fields_are_refused(tmp_path):
    with pytest.raises(TypeError, match="pass RegularizedTrainingArguments"):
        RegularizedTrainer(gpt2(), arguments(tmp_path, TrainingArguments), train_dataset=rows())


def sharded_when_loaded(tied=False, **sizes):
    """A model as `from_pretrained(distributed_config=...)` leaves it, but for the shards."""
    model = gpt2(tie_word_embeddings=tied)
    model._is_distributed_loading_by_transformers = True
    model.config.distributed_config = SimpleNamespace(**{"tp_size": 1, "pp_size": 1, "ep_size": 1, **sizes})
    return model


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ({"is_deepspeed_enabled": True}, "deepspeed is not supported"),
        ({"is_fsdp_enabled": True}, "fsdp_config is not supported .*: FSDP1 flattens"),
        ({"n_gpu": 2}, "n_gpu is not supported"),
        ({"parallelism_config": object()}, "parallelism_config is not supported"),
        ({"fsdp": True}, "fsdp is not supported .*: accelerate shards on accelerators only"),
        ({"model": sharded_when_loaded(tp_size=2)}, "distributed_config is not supported .*: tensor, pipeline"),
        ({"model": sharded_when_loaded(tied=True)}, "distributed_config is not supported .* where weights are tied"),
        ({"model": sharded_when_loaded()}, "distributed_config is not supported .* outside of the shards"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_hosts_that_are_refused(tmp_path, host, message):
    args = arguments(tmp_path)
    for name in ("n_gpu", "parallelism_config", "fsdp"):
        if name in host:
            setattr(args, "_n_gpu" if name == "n_gpu" else name, host[name])
    plugin = SimpleNamespace(fsdp_version=1)
    trainer = SimpleNamespace(
        args=args,
        model=host.get("model"),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)),
        is_deepspeed_enabled=host.get("is_deepspeed_enabled", False),
        is_fsdp_enabled=host.get("is_fsdp_enabled", False),
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        check_host(trainer)


@pytest.mark.parametrize("state", [{}, {"step": 1}, {"gamma_factor": 1.0}])
def test_a_damaged_state_is_refused(tmp_path, state):
    trainer = RegularizedTrainer(gpt2(), arguments(tmp_path), train_dataset=rows())
    before = trainer.regularizer_state()
    with pytest.raises(ValueError, match="must"):
        trainer.load_regularizer_state(state)
    assert trainer.regularizer_state() == before


def test_the_regularizer_can_be_made_by_hand(tmp_path):
    class Own(RegularizedTrainer):
        def create_regularizer(self, model):
            return GradientRegularizer(model, GAMMA, EPSILON, include=torch.nn.LayerNorm)

    found = run(tmp_path, gpt2(), Own)
    assert_by_hand(found, gpt2(), selected=lambda name: "ln_" in name)
