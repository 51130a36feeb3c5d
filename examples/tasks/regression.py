"""A table of one's own, a module of one's own, RMSE: does gradient regularization help?

gradreg compare examples/tasks/regression.py --methods F-GR SAM
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from gradreg.lab import Task, compare


class Patients(Dataset):
    """Rows as dictionaries."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return {"x": self.x[k], "y": self.y[k]}


class Net(nn.Module):
    """A small network with a residual branch."""

    def __init__(self, width=64):
        super().__init__()
        self.first, self.second = nn.Linear(10, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        h = F.gelu(self.first(x))
        return self.head(h + F.gelu(self.second(h))).squeeze(1)


def rmse(model, loader):
    """In the unit of the target, a standard deviation of which is 1 here."""
    errors = [model(batch["x"]) - batch["y"] for batch in loader]
    return torch.cat(errors).square().mean().sqrt()


def task():
    x, y = (torch.tensor(column, dtype=torch.float32) for column in load_diabetes(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order] / x.std(0), (y[order] - y.mean()) / y.std()
    train, validation, test = (Patients(x[a:b], y[a:b]) for a, b in ((0, 200), (200, 300), (300, 442)))
    return Task(
        model=Net,
        train=train,
        validation=validation,
        test=test,
        loss=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"]),
        score=rmse,
        higher_is_better=False,
        epochs=20,
        batch_size=20,
        learning_rate=0.01,
    )


if __name__ == "__main__":
    found = compare(task(), ["F-GR"], trials=2, seeds=2, workers=1, epochs=2)
    assert found.rows[0]["name"] == "SGD"
    assert found.rows[0]["test"]["mean"] < 1.5
    print(found)
