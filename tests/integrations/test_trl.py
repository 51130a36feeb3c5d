"""GRPO against a hand-written ĝ on the recorded rollouts; other trainers of TRL by the same mixin."""

import copy
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("trl")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from gradreg.integrations.transformers import attach
from gradreg.integrations.trl import (
    GradientRegularizationMixin,
    PolicyRegularizationMixin,
    RegularizationArguments,
    RegularizedGRPOConfig,
    RegularizedGRPOTrainer,
    embeddings_and_head,
)

pytestmark = [  # TRL 1.16 and peft 0.21 use old names of transformers 5.23
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
GAMMA, EPSILON, TEMPERATURE = 0.4, 0.3, 0.9
WORDS = ["<pad>", "<bos>", "<eos>", *"abcdefghijkl"]


def tokenizer():
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def llama(dropout=0.0):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rest = {"intermediate_size": 16, "max_position_embeddings": 32, "initializer_range": 0.4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, **rest, attention_dropout=dropout))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the model, from which GRPO takes its reference model."""
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    return str(folder)


PROMPTS = Dataset.from_list([{"prompt": p} for p in ("a b", "c d e", "f", "g h", "b a", "i j", "k", "l a b")])
PLAIN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "activation_checkpointing": False,
}
ROLLOUTS = {"num_generations": 2, "max_completion_length": 5, "temperature": TEMPERATURE, "loss_type": "grpo"}


class Witness(TrainerCallback):
    """Weights and gradients as the optimizer finds them."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {n.removeprefix("module."): p for n, p in model.named_parameters()}
        self.weights.append({n: ranks.gathered(p).detach().clone() for n, p in named.items()})
        self.gradients.append({n: ranks.gathered(p.grad).clone() for n, p in named.items() if p.grad is not None})


class Recording(RegularizedGRPOTrainer):
    """Keeps what each micro-batch of a first pass was given."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if self._is_recording:
            self.seen.append(copy.copy(inputs))
        return inputs


class Watching:
    """Keeps what each micro-batch of a live trainer was given, before its host: it knows nothing of us."""

    def __init__(self, *args, **kwargs):
        self.given, self.sizes = [], []
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args):
        batches, num_items = super().get_batch_samples(*args)
        self.sizes.append(len(batches))
        return batches, num_items

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.given.append(copy.copy(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def seen(self):
        """In the first passes: they alternate with the second ones."""
        given = list(self.given)
        assert len(given) == 2 * sum(self.sizes)
        first = []
        for size in self.sizes:
            first, given = first + given[:size], given[2 * size :]
        return first


class WatchingGRPO(Watching, GRPOTrainer):
    pass


class Reward:
    """Counts a letter, and its calls."""

    __name__ = "reward"

    def __init__(self, score=lambda text: float(len(text) - 2 * text.count("b"))):
        self.score, self.calls = score, 0

    def __call__(self, completions, **kwargs):
        self.calls += 1
        return [self.score(text) for text in completions]


def grpo(folder, saved, kind=Recording, reward=None, model=None, attached=None, **options):
    model = LlamaForCausalLM.from_pretrained(saved) if model is None else model
    if issubclass(kind, RegularizedGRPOTrainer):
        ours = {"gamma": GAMMA, "gr_epsilon": EPSILON}
        args = RegularizedGRPOConfig(str(folder), **{**ours, **PLAIN, **ROLLOUTS, **options})
    else:
        args = GRPOConfig(str(folder), **{**PLAIN, **ROLLOUTS, **options})
    witness, reward = Witness(), reward or Reward()
    trainer = kind(
        model, reward_funcs=reward, args=args, train_dataset=PROMPTS, processing_class=tokenizer(), callbacks=[witness]
    )
    if attached is not None:
        attach(trainer, **attached)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return SimpleNamespace(trainer=trainer, witness=witness, reward=reward, model=model, logs=logs, args=args)


# The hand-written loss.


def log_probabilities(model, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    num = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -num - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def policy_loss(logp, old, batch, args):
    """One micro-batch's part of the window's loss."""
    ratio, advantages = (logp - old).exp(), batch["advantages"].unsqueeze(1)
    clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if args.beta:
        difference = batch["ref_per_token_logps"] - logp
        kl = difference.exp() - difference - 1
        loss = loss + args.beta * kl * ratio  # use_bias_correction_kl, TRL's default
    mask, steps = batch["completion_mask"], args.gradient_accumulation_steps
    if args.loss_type == "dapo":
        return (loss * mask).sum() / (batch["num_items_in_batch"] * steps / args.steps_per_generation)
    return ((loss * mask).sum(1) / mask.sum(1)).mean() / steps


def gradient(weights, window, args, olds):
    model = llama().train()
    model.load_state_dict(weights)
    total = sum(policy_loss(log_probabilities(model, b), old, b, args) for b, old in zip(window, olds))
    total.backward()
    return {n: p.grad for n, p in model.named_parameters()}


def old_log_probabilities(weights, window):
    model = llama()
    model.load_state_dict(weights)
    with torch.no_grad():
        return [b["old_per_token_logps"] if "old_per_token_logps" in b else log_probabilities(model, b) for b in window]


def length(gradients):
    return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()


def by_hand(weights, window, args, chosen, cap=None):
    olds = old_log_probabilities(weights, window)
    first = gradient(weights, window, args, olds)
    moved = {n: w + EPSILON * first[n] if n in chosen else w for n, w in weights.items()}
    second = gradient(moved, window, args, olds)
    gamma = getattr(args, "gamma", GAMMA)  # no field of plain arguments
    penalty = {n: gamma / EPSILON * (second[n] - first[n]) for n in chosen}
    ratio = length(penalty.values()) / length([first[n] for n in chosen])
    scale = 1.0 if cap is None else min(1.0, cap / ratio.item())
    return {n: first[n] + scale * penalty[n] if n in chosen else first[n] for n in first}


def windows(found):
    k = found.args.gradient_accumulation_steps
    return [found.trainer.seen[i : i + k] for i in range(0, len(found.trainer.seen), k)]


def assert_by_hand(found, cap=None):
    chosen = set(found.trainer.regularizer.selection.named)
    assert not any("embed_tokens" in n or "lm_head" in n for n in chosen)
    assert any("q_proj" in n for n in chosen)
    assert len(windows(found)) == len(found.witness.gradients) == found.args.max_steps
    for weights, gradients, window in zip(found.witness.weights, found.witness.gradients, windows(found)):
        expected = by_hand(weights, window, found.args, chosen, cap)
        torch.testing.assert_close(gradients, expected, rtol=5e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"num_iterations": 2, "max_steps": 4},
        {"num_iterations": 2, "max_steps": 4, "beta": 0.1},
        {"steps_per_generation": 4, "max_steps": 4},
        {"steps_per_generation": 1},
        {"loss_type": "dapo"},
        {"gradient_accumulation_steps": 1, "loss_type": "dapo", "steps_per_generation": 2},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if k != "max_steps") or "default",
)
def test_grpo_by_hand(tmp_path, saved, options):
    assert_by_hand(grpo(tmp_path, saved, **options))


PENALTY = {"gamma": GAMMA, "epsilon": EPSILON}


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.1}, {"num_iterations": 2, "max_steps": 4}, {"loss_type": "dapo", "steps_per_generation": 4}],
    ids=["default", "KL", "two iterations", "dapo"],
)
def test_grpo_by_hand_when_attached(tmp_path, saved, options):
    """The epsilon of `attach` is the step length; that of the config stays the clipping range."""
    found = grpo(tmp_path, saved, WatchingGRPO, attached=PENALTY, **{"epsilon": 0.15, **options})
    assert_by_hand(found)
    assert "penalty_ratio" in found.logs[0]
    plain = grpo(tmp_path, saved, GRPOTrainer, **{"epsilon": 0.15, **options})
    assert found.reward.calls == plain.reward.calls
    assert found.trainer._step == plain.trainer._step
    same = set(plain.logs[0]) - {"grad_norm", "step_time"}
    assert {k: found.logs[0][k] for k in same} == {k: plain.logs[0][k] for k in same}


def test_a_grpo_trainer_under_another_name_is_pinned_too(tmp_path, saved):
    """Unsloth writes the class anew, so that its name and its module say nothing."""
    kind = type("Rewritten", (WatchingGRPO,), {"__module__": "compiled"})
    found = grpo(tmp_path, saved, kind, attached=PENALTY)
    assert isinstance(found.trainer, PolicyRegularizationMixin)
    assert_by_hand(found)


def test_attach_is_refused_where_the_class_is(tmp_path, saved):
    with pytest.raises(ValueError, match="use_adaptive_entropy is not supported"):
        grpo(tmp_path, saved, GRPOTrainer, attached=PENALTY, use_adaptive_entropy=True)


def test_attached_as_the_class_bit_for_bit(tmp_path, saved):
    found = grpo(tmp_path, saved, GRPOTrainer, attached={**PENALTY, "exclude": None, "cap": 0.2})
    as_class = grpo(tmp_path, saved, RegularizedGRPOTrainer, penalty_cap=0.2)
    assert found.trainer.regularizer_state() == as_class.trainer.regularizer_state()
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), as_class.model.parameters()))
    assert [e["penalty_ratio"] for e in found.logs] == [e["penalty_ratio"] for e in as_class.logs]


def test_the_penalty_needs_the_old_log_probabilities_of_the_first_pass(tmp_path, saved):
    """Recomputed at the displaced weights, the policy ratio is 1 there and ĝ is another."""

    class Unpinned(Recording):
        def pin(self, micro_batch):
            pass

    with pytest.raises(AssertionError):
        assert_by_hand(grpo(tmp_path, saved, Unpinned))


def test_nothing_is_generated_twice_and_metrics_are_those_of_the_first_pass(tmp_path, saved):
    found = grpo(tmp_path, saved, num_iterations=2, max_steps=4)
    plain = grpo(tmp_path, saved, GRPOTrainer, num_iterations=2, max_steps=4)
    assert found.reward.calls == plain.reward.calls == 2
    assert found.trainer._step == plain.trainer._step == 8
    ours, theirs = found.logs[0], plain.logs[0]
    same = set(theirs) - {"grad_norm", "step_time"}
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    assert "entropy" in same
    assert set(ours) - set(theirs) == {
        "penalty_ratio",
        "realized",
        "gradreg_grad_norm",
        "gradreg_penalty_norm",
        "skipped_steps",
    }


def test_no_penalty_is_plain_training_bit_for_bit(tmp_path, saved):
    found = grpo(tmp_path, saved, RegularizedGRPOTrainer, gamma=0.0)
    plain = grpo(tmp_path, saved, GRPOTrainer)
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), plain.model.parameters()))


def test_rollouts_are_those_of_plain_training(tmp_path, saved):
    """The random state after a step is that of one pass: with nothing learned, the same completions follow."""
    options = {"learning_rate": 0.0, "max_steps": 3, "logging_steps": 1}
    found, plain = grpo(tmp_path, saved, **options), grpo(tmp_path, saved, GRPOTrainer, **options)
    assert [e["reward"] for e in found.logs] == [e["reward"] for e in plain.logs]
    assert [e["completions/mean_length"] for e in found.logs] == [e["completions/mean_length"] for e in plain.logs]


def test_the_cap_bounds_the_penalty_and_not_g1(tmp_path, saved):
    found = grpo(tmp_path, saved, gamma=4.0, penalty_cap=0.2)
    assert [e["penalty_ratio"] for e in found.logs] == pytest.approx([0.2] * 3)
    assert_by_hand(found, cap=0.2)


def test_gamma_finds_the_ratio_and_is_saved(tmp_path, saved):
    options = {"learning_rate": 1e-3, "max_steps": 40, "save_strategy": "steps", "save_steps": 40}
    found = grpo(tmp_path, saved, RegularizedGRPOTrainer, gamma=5.0, target_penalty_ratio=0.3, **options)
    measured = [e["penalty_ratio"] for e in found.logs if e["penalty_ratio"] > 0]
    assert measured[0] > 1
    assert sorted(measured[-11:])[5] == pytest.approx(0.3, rel=0.6)
    state = json.loads((tmp_path / "checkpoint-40" / "gradreg.json").read_text())
    assert state["target"] == found.trainer.regularizer.state_dict()["target"]
    assert found.logs[-1]["gamma"] == pytest.approx(state["target"]["gamma"])


def test_resume_is_exact(tmp_path, saved):
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 0.01, "target_penalty_ratio": 0.3}
    whole = grpo(tmp_path, saved, save_strategy="steps", save_steps=2, **options)
    model = LlamaForCausalLM.from_pretrained(saved)
    trainer = RegularizedGRPOTrainer(
        model, reward_funcs=Reward(), args=whole.args, train_dataset=PROMPTS, processing_class=tokenizer()
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.regularizer_state() == whole.trainer.regularizer_state()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.model.parameters()))


def test_zero_advantages_are_counted_and_harmless(tmp_path, saved):
    found = grpo(tmp_path, saved, RegularizedGRPOTrainer, Reward(lambda text: 1.0), target_penalty_ratio=0.3)
    before = LlamaForCausalLM.from_pretrained(saved)
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), before.parameters()))
    state = found.trainer.regularizer.state_dict()
    assert state.pop("target")["num_readings"] == 0
    assert state == {"step": 3, "active_steps": 0, "skipped_steps": 3}
    assert [e["skipped_steps"] for e in found.logs] == [1, 2, 3]
    assert [e["penalty_ratio"] for e in found.logs] == [0, 0, 0]


def test_the_mask_of_high_entropy_tokens_is_that_of_the_first_pass(tmp_path, saved):
    masks = []

    class Looking(Recording):
        def get_high_entropy_mask(self, *args, **kwargs):
            masks.append(super().get_high_entropy_mask(*args, **kwargs))
            return masks[-1]

    grpo(tmp_path, saved, Looking, top_entropy_quantile=0.4, max_steps=1)
    assert len(masks) == 4
    assert all(torch.equal(first, second) for first, second in zip(masks[:2], masks[2:]))


def test_lora(tmp_path, saved):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    found = grpo(tmp_path, saved, model=model, beta=0.1)
    chosen = found.trainer.regularizer.selection.named
    assert chosen
    assert all("lora" in n and "embed_tokens" not in n for n in chosen)
    assert any("embed_tokens" in n for n in found.witness.gradients[0])
    assert found.trainer.regularizer.state_dict()["active_steps"] == 3


def test_embeddings_and_head():
    assert embeddings_and_head(llama()) == ["model.embed_tokens.*", "lm_head.*"]
    assert embeddings_and_head(nn.Linear(2, 2)) == []


def test_exclude_can_be_nothing(tmp_path, saved):
    found = grpo(tmp_path, saved, exclude=[], max_steps=1)
    assert len(found.trainer.regularizer.selection.named) == len(list(found.model.parameters()))


def test_epsilon_is_the_clipping_range_and_ours_must_be_given(tmp_path):
    with pytest.raises(ValueError, match="gr_epsilon must be given"):
        RegularizedGRPOConfig(str(tmp_path), gamma=0.1, epsilon=0.1, **PLAIN, **ROLLOUTS)
    for wrong in (0, -1.0, float("nan"), "x"):
        with pytest.raises(ValueError, match=r"^gr_epsilon must be a finite number > 0"):
            RegularizedGRPOConfig(str(tmp_path), gamma=0.1, gr_epsilon=wrong, **PLAIN, **ROLLOUTS)

    @dataclass
    class Clash(RegularizationArguments, GRPOConfig):
        pass

    with pytest.raises(TypeError, match="GRPOConfig has an epsilon that means something else"):
        Clash(str(tmp_path), **PLAIN, **ROLLOUTS)


def test_an_adaptive_entropy_coefficient_is_refused(tmp_path, saved):
    with pytest.raises(ValueError, match="use_adaptive_entropy is not supported"):
        grpo(tmp_path, saved, use_adaptive_entropy=True)


# Two processes.


class Sharded(ranks.ShardedByAccelerate, Recording):
    pass


TOGETHER = {
    "DDP": {},
    "DDP, two iterations, KL": {"num_iterations": 2, "max_steps": 4, "beta": 0.1},
    "DDP, dapo": {"loss_type": "dapo", "steps_per_generation": 4},
    "DDP, cap": {"gradient_accumulation_steps": 1, "penalty_cap": 0.2},
    "DDP, one rank learns nothing": {"max_steps": 2},
    "DDP, no rank learns": {"max_steps": 2, "target_penalty_ratio": 0.3},
    "FSDP2": ranks.sharding("LlamaDecoderLayer"),
}


def on_one_rank(rank, folder, saved):
    ranks.as_torchrun(rank, port=29557)
    found = {}
    for name, options in TOGETHER.items():
        indifferent = Reward(lambda text: 1.0)
        reward = indifferent if "no rank" in name or ("one rank" in name and rank == 1) else Reward()
        kind = Sharded if name == "FSDP2" else Recording
        run = grpo(folder, saved, kind, reward, **{"ddp_find_unused_parameters": False, **options})
        found[name] = {
            "seen": run.trainer.seen,
            "weights": run.witness.weights,
            "gradients": run.witness.gradients,
            "chosen": set(run.trainer.regularizer.selection.named),
            "state": run.trainer.regularizer_state(),
            "model": type(run.trainer.regularizer.model).__name__,
        }
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, saved):
    return ranks.on_two_ranks(on_one_rank, tmp_path_factory.mktemp("two_ranks"), saved)


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_equal_one_on_the_rollouts_of_both(tmp_path, two_ranks, name):
    """Two processes with k micro-batches each have the loss of one with 2k."""
    here, there = (found[name] for found in two_ranks)
    assert here["model"] == ("FSDPLlamaForCausalLM" if name == "FSDP2" else "DistributedDataParallel")
    assert here["state"] == there["state"]
    options = {k: v for k, v in TOGETHER[name].items() if "fsdp" not in k}
    k = options.get("gradient_accumulation_steps", PLAIN["gradient_accumulation_steps"])
    options |= {
        "gradient_accumulation_steps": 2 * k,
        "steps_per_generation": 2 * options.get("steps_per_generation", k),
    }
    args = RegularizedGRPOConfig(str(tmp_path), gamma=GAMMA, gr_epsilon=EPSILON, **{**PLAIN, **ROLLOUTS, **options})
    assert len(here["gradients"]) == args.max_steps
    assert here["seen"][0]["completion_ids"].tolist() != there["seen"][0]["completion_ids"].tolist()
    for i, (weights, gradients) in enumerate(zip(here["weights"], here["gradients"])):
        window = here["seen"][i * k : (i + 1) * k] + there["seen"][i * k : (i + 1) * k]
        expected = by_hand(weights, window, args, here["chosen"], args.penalty_cap)
        torch.testing.assert_close(gradients, expected, rtol=5e-4, atol=2e-5)
        torch.testing.assert_close(there["gradients"][i], gradients, rtol=0, atol=0)


def test_zero_advantages_on_one_rank_are_no_skipped_step(two_ranks):
    for found in two_ranks:
        assert found["DDP, one rank learns nothing"]["state"] == {"step": 2, "active_steps": 2, "skipped_steps": 0}
        state = found["DDP, no rank learns"]["state"]
        assert state.pop("target")["num_readings"] == 0
        assert state == {"step": 2, "active_steps": 0, "skipped_steps": 2}


# Other trainers.


class RegularizedSFTTrainer(GradientRegularizationMixin, SFTTrainer):
    pass


@dataclass
class RegularizedSFTConfig(RegularizationArguments, SFTConfig):
    pass


class RegularizedDPOTrainer(GradientRegularizationMixin, DPOTrainer):
    pass


@dataclass
class RegularizedDPOConfig(RegularizationArguments, DPOConfig):
    pass


FORMS = {  # by classes of our own, and attached to the host's
    "SFT": {"class": (RegularizedSFTTrainer, RegularizedSFTConfig), "attached": (SFTTrainer, SFTConfig)},
    "DPO": {"class": (RegularizedDPOTrainer, RegularizedDPOConfig), "attached": (DPOTrainer, DPOConfig)},
}


def tune(host, form, folder, dataset, model=None, **options):
    kind, config = FORMS[host][form]
    watched = type(kind.__name__, (Watching, kind), {})
    args = config(str(folder), **{**PLAIN, "max_steps": 2, **(PENALTY if form == "class" else {}), **options})
    witness = Witness()
    trainer = watched(
        model or llama(), args=args, train_dataset=dataset, processing_class=tokenizer(), callbacks=[witness]
    )
    if form == "attached":
        attach(trainer, **PENALTY)
    trainer.train()
    return trainer, witness


def assert_plain_by_hand(trainer, witness, loss_fn):
    k = trainer.args.gradient_accumulation_steps
    for i, (weights, gradients) in enumerate(zip(witness.weights, witness.gradients)):
        window = trainer.seen[i * k : (i + 1) * k]

        def at(point, window=window):
            model = llama()
            model.load_state_dict(point)
            loss_fn(model, window).backward()
            return {n: p.grad for n, p in model.named_parameters()}

        first = at(weights)
        second = at({n: w + EPSILON * first[n] for n, w in weights.items()})
        expected = {n: first[n] + GAMMA / EPSILON * (second[n] - first[n]) for n in first}
        torch.testing.assert_close(gradients, expected, rtol=5e-4, atol=2e-5)


@pytest.mark.parametrize("form", ["class", "attached"])
def test_sft_by_hand(tmp_path, form):
    texts = ["a b c d e", "f g h", "i j k l", "a c e g i k", "b d", "f h j l"]
    dataset = Dataset.from_list([{"text": t} for t in texts])
    trainer, witness = tune("SFT", form, tmp_path, dataset)

    def loss(model, window):
        logits = [model(b["input_ids"], attention_mask=b["attention_mask"]).logits[:, :-1] for b in window]
        labels = [b["labels"][:, 1:] for b in window]
        total = sum(F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") for x, y in zip(logits, labels))
        return total / sum((y != -100).sum() for y in labels)

    assert_plain_by_hand(trainer, witness, loss)
    tokens = sum(int(b["attention_mask"].sum()) for b in trainer.seen)
    assert [e for e in trainer.state.log_history if "loss" in e][-1]["num_tokens"] == tokens  # counted once


@pytest.mark.parametrize("form", ["class", "attached"])
def test_dpo_by_hand(tmp_path, form):
    pairs = [("a b", "c d e", "f"), ("g", "h i", "j k l"), ("b a", "a", "b c"), ("d", "e f", "g h i")]
    dataset = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])
    llama().save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")  # of which DPO takes its reference
    options = {"per_device_train_batch_size": 1, "beta": 0.5}
    trainer, witness = tune("DPO", form, tmp_path, dataset, model, **options)

    def log_likelihood(model, batch):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        logp = logits.gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
        return (logp * batch["completion_mask"][:, 1:]).sum(1)

    def loss(model, window):
        parts = []
        for batch in window:
            with torch.no_grad():
                reference = log_likelihood(llama(), batch)
            chosen, rejected = (log_likelihood(model, batch) - reference).chunk(2)
            parts.append(-F.logsigmoid(0.5 * (chosen - rejected)).mean() / len(window))
        return sum(parts)

    assert_plain_by_hand(trainer, witness, loss)


@pytest.mark.parametrize(("kind", "config"), [(SFTTrainer, RegularizedSFTConfig), (DPOTrainer, RegularizedDPOConfig)])
def test_regularized_arguments_in_a_plain_trainer_are_refused(tmp_path, kind, config):
    args = config(str(tmp_path), **PENALTY, **PLAIN)
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    dataset = dataset if kind is DPOTrainer else Dataset.from_list([{"text": "a b c"}] * 2)
    with pytest.raises(TypeError, match=f"^{kind.__name__} would ignore gamma and epsilon of {config.__name__} and tr"):
        kind(llama(), args=args, train_dataset=dataset, processing_class=tokenizer())


def test_a_config_of_grpo_with_a_penalty_in_a_plain_trainer_is_refused(tmp_path, saved):
    args = RegularizedGRPOConfig(str(tmp_path), gamma=GAMMA, gr_epsilon=EPSILON, **PLAIN, **ROLLOUTS)
    with pytest.raises(TypeError, match=r"^GRPOTrainer would ignore gamma and epsilon of RegularizedGRPOConfig"):
        GRPOTrainer(llama(), reward_funcs=Reward(), args=args, train_dataset=PROMPTS, processing_class=tokenizer())
