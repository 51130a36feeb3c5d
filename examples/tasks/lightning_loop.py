"""A loop that somebody else owns, here Lightning's: a function of a run, in the manner of an Optuna objective.

gradreg compare examples/tasks/lightning_loop.py:train --methods F-GR SAM
"""

import logging
import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradreg.integrations.lightning import GradientRegularization
from gradreg.lab import Loop, compare

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
for kind in (UserWarning, FutureWarning):
    warnings.filterwarnings("ignore", category=kind, module="lightning")
EPOCHS = 5


class Classifier(LightningModule):
    """What the user has."""

    def __init__(self, learning_rate, weight_decay):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        own = self.hparams
        return torch.optim.SGD(self.parameters(), own.learning_rate, momentum=0.9, weight_decay=own.weight_decay)


def rows():
    """Four clouds, a third of the training labels at random."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 20, generator=generator)
    y = torch.randint(4, (900,), generator=generator)
    x = centers[y] + 2 * torch.randn(900, 20, generator=generator)
    noisy = torch.where(torch.rand(900, generator=generator) < 0.33, torch.randint(4, (900,), generator=generator), y)
    return (x[:300], noisy[:300]), (x[300:500], y[300:500]), (x[500:], y[500:])


def accuracy(model, part):
    x, y = part
    with torch.no_grad():
        return (model.eval().net(x).argmax(1) == y).float().mean().item()


def loop(run):
    train, validation, test = rows()
    loader = DataLoader(TensorDataset(*train), batch_size=25, shuffle=True)
    model = Classifier(run.learning_rate, run.weight_decay)
    options = run.options(num_steps=run.epochs * len(loader))
    trainer = Trainer(
        max_epochs=run.epochs,
        accelerator="cpu",
        callbacks=[GradientRegularization(**options, log=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return {"validation": accuracy(model, validation), "test": accuracy(model, test)}


train = Loop(loop, learning_rate=0.03, weight_decay=1e-3, epochs=EPOCHS, score="accuracy")

if __name__ == "__main__":
    found = compare(train, ["SAM"], trials=2, seeds=2, workers=1, epochs=1, opponent=False)
    assert 0 < found.rows[0]["test"]["mean"] <= 1
    print(found)
