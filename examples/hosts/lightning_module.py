"""Lightning: one callback in the Trainer, and the curve is that of a bare loop over the same windows."""

# %% A module as it is without gradreg.
import copy
import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradreg
from gradreg.integrations.lightning import GradientRegularization

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
for message in ("The 'train_dataloader' does not have many workers", r"`isinstance\(treespec, LeafSpec\)`"):
    warnings.filterwarnings("ignore", message)
ACCUMULATION, EPOCHS, CLIP, LEARNING_RATE = 3, 4, 1.0, 0.5


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3))
        self.curve: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        loss = F.cross_entropy(self.layers(x), labels)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: list[Tensor], batch_idx: int) -> None:
        self.curve.append(outputs["loss"])  # divided by the number of micro-batches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


torch.manual_seed(0)
x = torch.randn(112, 10)
labels = (x @ torch.randn(10, 3)).argmax(1)
model = Classifier()
bare_model = copy.deepcopy(model.layers)

# %% Seven micro-batches of 16 in an epoch: windows of 3, 3 and 1. Gradients are clipped after the penalty is in them.
regularization = GradientRegularization(gamma=gradreg.warmup(0.5, 4), epsilon=0.5)
trainer = Trainer(
    callbacks=[regularization],  # the line that changes
    accumulate_grad_batches=ACCUMULATION,
    gradient_clip_val=CLIP,
    max_epochs=EPOCHS,
    log_every_n_steps=1,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(TensorDataset(x, labels), batch_size=16))

# %% The same in a bare loop. Lightning divides by ACCUMULATION in the window of one, too.
optimizer = torch.optim.SGD(bare_model.parameters(), LEARNING_RATE)
regularizer = gradreg.GradientRegularizer(bare_model, gradreg.warmup(0.5, 4), 0.5)
micro_batches = list(zip(x.split(16), labels.split(16)))
windows = [micro_batches[i : i + ACCUMULATION] for i in range(0, len(micro_batches), ACCUMULATION)]
curve = []
for _ in range(EPOCHS):
    for window in windows:
        optimizer.zero_grad()
        loss = regularizer.backward(
            lambda batch: F.cross_entropy(bare_model(batch[0]), batch[1]) / ACCUMULATION, window
        )
        nn.utils.clip_grad_norm_(bare_model.parameters(), CLIP)
        optimizer.step()
        curve.append(loss)

# %% Loss for loss and weight for weight; what is logged comes from θ, not from the displaced weights.
by_epoch = torch.stack(model.curve).split(len(micro_batches))
ours = [window.sum() for epoch in by_epoch for window in epoch.split(ACCUMULATION)]
torch.testing.assert_close(ours, curve, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(list(model.layers.parameters()), list(bare_model.parameters()), rtol=1e-4, atol=1e-6)

print("window   loss  bare loop")
for k, (loss, bare_loss) in enumerate(zip(ours, curve)):
    print(f"{k:6d}  {loss:.3f}      {bare_loss:.3f}")
logged = trainer.logged_metrics
print(f"last step: ‖g1‖ = {logged['grad_norm']:.3f}, penalty ratio = {logged['penalty_ratio']:.3f}")
