"""GRPO with gradient regularization: the same rollouts are replayed, and γ finds the wanted penalty ratio by itself."""

# %% A tiny random language model and a tokenizer of twelve letters.
import tempfile
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from gradreg.integrations.trl import RegularizedGRPOConfig, RegularizedGRPOTrainer

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # TRL 1.16 says so of itself
torch.manual_seed(0)
vocabulary = ["<pad>", "<bos>", "<eos>", *"abcdefghijkl"]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
)
config = LlamaConfig(
    vocab_size=len(vocabulary),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
model = LlamaForCausalLM(config)
prompts = Dataset.from_list([{"prompt": prompt} for prompt in ("a b", "c d e", "f", "g h i", "j k", "l")])


def reward(completions: list[str], **rest: object) -> list[float]:
    """The share of vowels."""
    return [sum(letter in "aei" for letter in text) / max(1, len(text.split())) for text in completions]


# %% `epsilon` is TRL's clipping range; ours is `gr_epsilon`. The penalty stands in the place of the KL term (beta = 0).
arguments = RegularizedGRPOConfig(
    tempfile.mkdtemp(),
    gamma=0.01,
    gr_epsilon=0.1,
    target_penalty_ratio=0.3,
    penalty_cap=1.0,
    beta=0.0,
    num_generations=8,
    num_iterations=2,
    max_completion_length=6,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    max_steps=40,
    learning_rate=1e-2,
    max_grad_norm=0.0,
    bf16=False,
    activation_checkpointing=False,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
)
trainer = RegularizedGRPOTrainer(  # was: GRPOTrainer
    model, reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=tokenizer
)
trainer.remove_callback(PrinterCallback)
trainer.train()

# %% What was penalized, and what the log says.
print(str(trainer.regularizer.selection).splitlines()[0])
print("step  reward   ‖g1‖  ‖penalty‖  ratio      γ  skipped")
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
for entry in logs:
    norms = f"{entry['gradreg_grad_norm']:.3f}      {entry['gradreg_penalty_norm']:.3f}"
    print(
        f"{entry['step']:4d}   {entry['reward']:.3f}  {norms}  {entry['penalty_ratio']:.3f}  {entry['gamma']:.3f}  "
        f"{entry['skipped_steps']:7d}"
    )

# %% Without a graph of its own to compare with, the run is held against its targets.
assert not any("embed_tokens" in name or "lm_head" in name for name in trainer.regularizer.selection.named)
assert all(entry["penalty_ratio"] <= 1.0001 for entry in logs)
assert logs[-1]["gamma"] > 2 * arguments.gamma
assert logs[-1]["reward"] > logs[0]["reward"]
