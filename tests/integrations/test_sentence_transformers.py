"""`attach` on the trainer of sentence-transformers: ĝ by hand, from a tiny BERT that is made here."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, TrainerCallback

from gradreg.integrations.transformers import attach

GAMMA, EPSILON = 0.2, 0.1
PENALTY = {"gamma": GAMMA, "epsilon": EPSILON}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijkl"]
LEFT = ["a b", "c d e", "f", "g h", "i j k l", "b a"]
RIGHT = ["b c", "d", "e f g", "h a", "l", "k i j"]
PAIRS = Dataset.from_dict({"left": LEFT, "right": RIGHT})
SCORED = Dataset.from_dict({"left": LEFT, "right": RIGHT, "label": [0.9, 0.1, 0.4, 0.7, 0.2, 0.5]})


def bert(dropout=0.0):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    rest = {"intermediate_size": 16, "max_position_embeddings": 16, "initializer_range": 0.4}
    return BertModel(BertConfig(**sizes, **rates, **rest))


@pytest.fixture(params=[0.0], ids=["no dropout"])
def folder(tmp_path, request):
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "bert")
    bert(request.param).save_pretrained(tmp_path / "bert")
    return tmp_path


class Watched(SentenceTransformerTrainer):
    """Keeps the windows as the loop draws them."""

    def __init__(self, *args, **kwargs):
        self.windows = []
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, *args):
        batches, num_items = super().get_batch_samples(*args)
        self.windows.append([dict(batch) for batch in batches])
        return batches, num_items


class Witness(TrainerCallback):
    """Weights and gradients as the optimizer finds them."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {n.split("model.", 1)[1]: p for n, p in model.named_parameters()}
        self.weights.append({n: p.detach().clone() for n, p in named.items()})
        self.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})


def train(folder, make_loss, rows=SCORED, attached=PENALTY, resume=None, **options):
    """Three micro-batches of two rows: the second window has one."""
    plain = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
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
        "logging_steps": 1,
    }
    transformer = Transformer(str(folder / "bert"))
    model = SentenceTransformer(modules=[transformer, Pooling(8)], device="cpu")
    args = SentenceTransformerTrainingArguments(str(folder / "out"), **{**plain, **options})
    witness = Witness()
    trainer = Watched(model, args, train_dataset=rows, loss=make_loss(model), callbacks=[witness])
    if attached is not None:
        attach(trainer, **attached)
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return SimpleNamespace(trainer=trainer, witness=witness, model=model, logs=logs)


# The losses by hand: mean over the tokens of each text, and the cosine between the two.


def embedding(model, batch, side):
    mask = batch[f"{side}_attention_mask"]
    tokens = model(input_ids=batch[f"{side}_input_ids"], attention_mask=mask).last_hidden_state
    return (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def cosine_loss(model, batch):
    found = F.cosine_similarity(embedding(model, batch, "left"), embedding(model, batch, "right"))
    return (found - batch["label"]).square().mean()


def ranking_loss(model, batch, scale=2.0):
    left, right = (F.normalize(embedding(model, batch, side)) for side in ("left", "right"))
    return F.cross_entropy(scale * left @ right.T, torch.arange(len(left)))


def gradient(weights, window, loss_fn):
    model = bert().train()
    model.load_state_dict(weights)
    (sum(loss_fn(model, batch) for batch in window) / len(window)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def by_hand(weights, window, loss_fn):
    first = gradient(weights, window, loss_fn)
    second = gradient({n: w + EPSILON * first[n] if n in first else w for n, w in weights.items()}, window, loss_fn)
    return first, {n: first[n] + GAMMA / EPSILON * (second[n] - first[n]) for n in first}


def assert_by_hand(found, loss_fn):
    windows = found.trainer.windows
    assert [len(window) for window in windows] == [2, 1]
    for weights, gradients, window in zip(found.witness.weights, found.witness.gradients, windows):
        first, expected = by_hand(weights, window, loss_fn)
        torch.testing.assert_close(gradients, expected, rtol=5e-4, atol=2e-5)
        gap = max((first[n] - g).abs().max() for n, g in gradients.items())
        assert gap > 0.004, "the penalty is far above the tolerance"


def test_cosine_similarity_by_hand(folder):
    found = train(folder, losses.CosineSimilarityLoss)
    assert_by_hand(found, cosine_loss)
    assert all(entry["penalty_ratio"] > 0 for entry in found.logs)


def test_ranking_among_a_batch_by_hand(folder):
    found = train(folder, lambda model: losses.MultipleNegativesRankingLoss(model, scale=2.0), PAIRS)
    assert_by_hand(found, ranking_loss)


def test_a_loss_that_cuts_the_outputs_of_the_model_needs_no_replay_check(folder):
    """Its output is another one within the loss, which the check takes for another loss."""

    def matryoshka(model):
        return losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, scale=2.0), [8, 4])

    def by_parts(model, batch):
        sides = [embedding(model, batch, side) for side in ("left", "right")]
        total = 0.0
        for size in (8, 4):
            left, right = (F.normalize(side[:, :size]) for side in sides)
            total = total + F.cross_entropy(2.0 * left @ right.T, torch.arange(len(left)))
        return total

    with pytest.raises(ValueError, match="pass replay_check=False"):
        train(folder, matryoshka, PAIRS)
    assert_by_hand(train(folder, matryoshka, PAIRS, {**PENALTY, "replay_check": False}), by_parts)


class InParts(nn.Module):
    """Two parts of a loss, which the trainer adds and logs one by one."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, features, labels):
        left, right = (self.model(side)["sentence_embedding"] for side in features)
        return {"near": (left - right).square().mean(), "small": 0.1 * left.square().mean()}


def test_parts_of_a_loss_are_counted_once(folder):
    plain = train(folder, InParts, attached=None)
    found = train(folder, InParts)
    assert {"near", "small"} <= set(found.logs[0])
    assert {k: found.logs[0][k] for k in ("loss", "near", "small")} == {
        k: plain.logs[0][k] for k in ("loss", "near", "small")
    }


@pytest.mark.parametrize("folder", [0.2], indirect=True, ids=["dropout"])
def test_no_penalty_is_plain_training_bit_for_bit(folder):
    plain, found = (train(folder, losses.CosineSimilarityLoss, attached=a) for a in (None, {"gamma": 0.0}))
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize("folder", [0.2], indirect=True, ids=["dropout"])
def test_resume_is_exact(folder):
    options = {"num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 0.01}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole = train(folder, losses.CosineSimilarityLoss, **options)
    again = train(folder, losses.CosineSimilarityLoss, resume=str(folder / "out" / "checkpoint-2"), **options)
    assert again.trainer.regularizer_state() == whole.trainer.regularizer_state()
    assert again.trainer.regularizer.step == 4
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), whole.model.parameters()))


@pytest.mark.filterwarnings("ignore:The penalty is:UserWarning")
def test_tensors_of_the_loss_keep_g1_and_are_told_of(folder):
    labeled = Dataset.from_dict({"left": LEFT, "right": RIGHT, "label": [0, 1, 0, 1, 1, 0]})
    with pytest.warns(UserWarning, match="2 trainable tensors outside the model"):
        train(folder, lambda model: losses.SoftmaxLoss(model, 8, num_labels=2), labeled)


def test_a_loss_that_runs_the_model_in_its_backward_pass_is_refused(folder):
    def cached(model):
        return losses.CachedMultipleNegativesRankingLoss(model, scale=2.0, mini_batch_size=1)

    with pytest.raises(ValueError, match=r"Watched ran the model within its backward pass alone.*without the cache"):
        train(folder, cached, PAIRS)
