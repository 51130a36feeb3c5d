"""Door 3: an optimizer with a closure, a learning-rate scheduler, a γ warm-up, and a checkpoint in the middle."""

# %% A training state: model, wrapped optimizer, scheduler.
import io

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg

torch.manual_seed(0)
x, y = torch.randn(64, 10), torch.randint(0, 3, (64,))


class Training:
    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
        self.regularizer = gradreg.GradientRegularizer(self.model, gamma=gradreg.warmup(0.2, num_steps=10), epsilon=0.1)
        base = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optimizer = gradreg.RegularizedOptimizer(base, self.regularizer)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.optimizer.step(self.closure)
            self.scheduler.step()

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}


# %% Twenty steps in one go.
straight = Training()
straight.run(20)

# %% Twelve steps, a checkpoint, eight steps. The optimizer's state dict holds the regularizer's step.
first = Training()
first.run(12)
file = io.BytesIO()
torch.save({name: part.state_dict() for name, part in first.parts().items()}, file)

file.seek(0)
checkpoint = torch.load(file, weights_only=True)
second = Training()
for name, part in second.parts().items():
    part.load_state_dict(checkpoint[name])
assert second.regularizer.step == 12  # so γ goes on where it was
second.run(8)

for name, tensor in straight.model.state_dict().items():
    assert torch.equal(tensor, second.model.state_dict()[name]), name

# %% The same by the first door: step() without a closure takes gradients that were regularized before.
by_hand = Training()
for _ in range(20):
    by_hand.optimizer.zero_grad()
    by_hand.regularizer.backward(lambda: F.cross_entropy(by_hand.model(x), y))
    by_hand.optimizer.step()
    by_hand.scheduler.step()
for a, b in zip(straight.model.parameters(), by_hand.model.parameters()):
    assert torch.equal(a, b)

print("12 steps, a checkpoint and 8 steps equal 20 steps bit for bit; door 1 equals door 3.")
