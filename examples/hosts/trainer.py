"""Hugging Face Trainer: one word changes, and the curve is that of a bare loop over the same windows."""

# %% A small classifier, in the shape that the Trainer expects: it returns its loss.
import copy
import math
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback

import gradreg
from gradreg.integrations.transformers import RegularizedTrainer, RegularizedTrainingArguments


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(x), labels)}


torch.manual_seed(0)
x = torch.randn(112, 10)
labels = (x @ torch.randn(10, 3)).argmax(1)
rows = [{"x": x[i], "labels": labels[i]} for i in range(len(x))]
model = Classifier()
bare_model = copy.deepcopy(model)

# %% Seven micro-batches of 16 in an epoch: windows of 3, 3 and 1. Gradients are clipped after the penalty is in them.
ACCUMULATION, EPOCHS, CLIP, LEARNING_RATE = 3, 4, 1.0, 0.5
arguments = RegularizedTrainingArguments(
    tempfile.mkdtemp(),
    gamma=0.5,
    epsilon=0.5,
    gamma_warmup_steps=4,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=ACCUMULATION,
    num_train_epochs=EPOCHS,
    max_grad_norm=CLIP,
    learning_rate=LEARNING_RATE,
    lr_scheduler_type="constant",
    optim="sgd",
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
)
trainer = RegularizedTrainer(model, arguments, train_dataset=rows)  # was: Trainer
trainer.remove_callback(PrinterCallback)
trainer.train()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]

# %% The same in a bare loop.
optimizer = torch.optim.SGD(bare_model.parameters(), LEARNING_RATE)
regularizer = gradreg.GradientRegularizer(bare_model, gradreg.warmup(0.5, 4), 0.5)
micro_batches = list(zip(x.split(16), labels.split(16)))
windows = [micro_batches[i : i + ACCUMULATION] for i in range(0, len(micro_batches), ACCUMULATION)]
curve = []
for _ in range(EPOCHS):
    for window in windows:
        optimizer.zero_grad()
        share = 1 / len(window)
        loss = regularizer.backward(lambda batch, share=share: share * bare_model(*batch)["loss"], window)
        nn.utils.clip_grad_norm_(bare_model.parameters(), CLIP)
        optimizer.step()
        curve.append(loss.item())

# %% Loss for loss and weight for weight.
torch.testing.assert_close([entry["loss"] for entry in logs], curve, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(list(model.parameters()), list(bare_model.parameters()), rtol=1e-4, atol=1e-6)

print("step   loss  bare loop   ‖g1‖  penalty ratio")
for entry, loss in zip(logs, curve):
    norm, ratio = entry.get("gradreg_grad_norm", math.nan), entry.get("penalty_ratio", 0.0)  # γ = 0 in the first step
    print(f"{entry['step']:4d}  {entry['loss']:.3f}      {loss:.3f}  {norm:.3f}          {ratio:.3f}")
