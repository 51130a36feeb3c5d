"""accelerate: one line of the loop changes, and the curve is that of a bare loop over the same windows."""

# %% A small classifier.
import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradreg
from gradreg.integrations.accelerate import AcceleratedRegularizer

ACCUMULATION, EPOCHS, CLIP, LEARNING_RATE = 3, 4, 1.0, 0.5
torch.manual_seed(0)
x = torch.randn(112, 10)
labels = (x @ torch.randn(10, 3)).argmax(1)
model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))
bare_model = copy.deepcopy(model)

# %% Seven micro-batches of 16 in an epoch: windows of 3, 3 and 1. Gradients are clipped after the penalty is in them.
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
loader = DataLoader(TensorDataset(x, labels), batch_size=16)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), LEARNING_RATE), loader)
regularizer = AcceleratedRegularizer(accelerator, model, gamma=gradreg.warmup(0.5, 4), epsilon=0.5)


def loss_fn(batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


losses = []
for _ in range(EPOCHS):
    for batch in loader:
        with accelerator.accumulate(model):
            losses.append(
                regularizer.backward(loss_fn, batch)
            )  # was: loss = loss_fn(batch); accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

# %% The same in a bare loop. accelerate divides by ACCUMULATION in the window of one, too.
bare_optimizer = torch.optim.SGD(bare_model.parameters(), LEARNING_RATE)
bare_regularizer = gradreg.GradientRegularizer(bare_model, gradreg.warmup(0.5, 4), 0.5)
micro_batches = list(zip(x.split(16), labels.split(16)))
windows = [micro_batches[i : i + ACCUMULATION] for i in range(0, len(micro_batches), ACCUMULATION)]


def bare_loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(bare_model(batch[0]), batch[1]) / ACCUMULATION


curve = []
for _ in range(EPOCHS):
    for window in windows:
        bare_optimizer.zero_grad()
        curve.append(bare_regularizer.backward(bare_loss_fn, window))
        nn.utils.clip_grad_norm_(bare_model.parameters(), CLIP)
        bare_optimizer.step()

# %% Loss for loss and weight for weight.
by_epoch = torch.stack(losses).split(len(micro_batches))
ours = [window.sum() / ACCUMULATION for epoch in by_epoch for window in epoch.split(ACCUMULATION)]
torch.testing.assert_close(ours, curve, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(list(model.parameters()), list(bare_model.parameters()), rtol=1e-4, atol=1e-6)

print("window   loss  bare loop")
for k, (loss, bare_loss) in enumerate(zip(ours, curve)):
    print(f"{k:6d}  {loss:.3f}      {bare_loss:.3f}")
