"""Two classes, a DataLoader of one's own, AUC, AdamW.

gradreg compare examples/tasks/binary.py --methods F-GR SAM
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradreg.lab import Task, compare


def auc(outputs, targets):
    return roc_auc_score(targets.numpy(), outputs.squeeze(1).numpy())


def loss(model, batch):
    x, y = batch
    return F.binary_cross_entropy_with_logits(model(x).squeeze(1), y)


def adamw(parameters, lr, weight_decay):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def task():
    x, y = (torch.tensor(column, dtype=torch.float32) for column in load_breast_cancer(return_X_y=True))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(y), generator=generator)
    x, y = ((x - x.mean(0)) / x.std(0))[order], y[order]
    noisy = torch.where(torch.rand(len(y), generator=generator) < 0.2, 1 - y, y)  # of the training labels
    return Task(
        model=lambda: nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1)),
        train=DataLoader(TensorDataset(x[:200], noisy[:200]), batch_size=20, shuffle=True),
        validation=DataLoader(TensorDataset(x[200:350], y[200:350]), batch_size=150),
        test=DataLoader(TensorDataset(x[350:], y[350:]), batch_size=219),
        loss=loss,
        score=auc,
        optimizer=adamw,
        epochs=20,
        learning_rate=3e-3,
        weight_decay=0.01,
    )


if __name__ == "__main__":
    found = compare(task(), ["SAM"], trials=2, seeds=2, workers=1, epochs=2)
    assert 0.5 < found.rows[0]["test"]["mean"] <= 1
    print(found)
