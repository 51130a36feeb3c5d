"""Below two passes: what each mode runs, counted in rows, and what a penalty on a part of the batch penalizes."""

# %% A model that counts the rows it sees.
import torch
import torch.nn.functional as F
from torch import nn

import gradreg

torch.manual_seed(0)
x, y = torch.randn(100, 10, dtype=torch.float64), torch.randint(3, (100,))
model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
rows = 0


def loss_fn(batch):
    global rows
    rows += len(batch[0])
    return F.cross_entropy(model(batch[0]), batch[1])


# %% Ten steps of each mode. One pass is 100 rows a step. (The replay check of a first step is one forward more: off.)
off = {"replay_check": False}
modes = {
    "F-GR": gradreg.GradientRegularizer(model, 0.1, 0.1, **off),
    "F-GR, every 5th step": gradreg.GradientRegularizer(model, gradreg.every(0.1, 5, scale=5), 0.1, **off),
    "F-GR, a tenth of the batch": gradreg.GradientRegularizer(model, 0.02, 0.1, batch=gradreg.Fraction(0.1), **off),
    "SAM along the momentum": gradreg.msam(model, optimizer, rho=0.5),
    "SAM along the last gradient": gradreg.GradientRegularizer(model, 0.5, 0.5, ascent=gradreg.Previous(sign=-1)),
    "half here, half ahead": gradreg.GradientRegularizer(
        model, 0.5, 1.0, ascent=gradreg.Momentum(optimizer), batch=gradreg.Split()
    ),
}
for name, regularizer in modes.items():
    rows = 0
    for _ in range(10):
        optimizer.zero_grad()
        regularizer.backward(loss_fn, batches=[(x, y)])
        optimizer.step()
    print(f"{name:28} {rows / 1000:.2f} passes")
    assert rows == {"F-GR": 2000, "F-GR, every 5th step": 1200, "F-GR, a tenth of the batch": 1100}.get(name, 1000)

# %% A penalty on tenths, averaged over all of them, is one on ‖∇L‖² and on the noise of a tenth: much larger here.


def penalty(regularizer, parts):
    """The mean of ĝ − g1."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for part in parts:
        for sign, step in ((1, regularizer.backward), (-1, gradreg.GradientRegularizer(model, 0, 1).backward)):
            model.zero_grad()
            step(loss_fn, batches=[part])
            total += sign * torch.cat([p.grad.flatten() for p in model.parameters()]) / len(parts)
    return total


order = [torch.arange(100).roll(-10 * k) for k in range(10)]  # every tenth comes first once
of_tenths = penalty(
    gradreg.GradientRegularizer(model, 0.1, 1e-4, batch=gradreg.Fraction(0.1)), [(x[o], y[o]) for o in order]
)
of_the_batch = penalty(gradreg.GradientRegularizer(model, 0.1, 1e-4), [(x, y)])
each_tenth = penalty(
    gradreg.GradientRegularizer(model, 0.1, 1e-4, scheme="central"), list(zip(x.split(10), y.split(10)))
)
torch.testing.assert_close(of_tenths, each_tenth, rtol=1e-2, atol=1e-3)  # ½‖∇L_A‖², averaged over tenths A
print(f"the penalty of tenths is {of_tenths.norm() / of_the_batch.norm():.1f} times that of the batch, at the same γ")
assert of_tenths.norm() > of_the_batch.norm()
