"""Gradient accumulation: a joint penalty equals one large batch; one for each micro-batch is another method."""

# %% One batch, cut into four micro-batches.
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg

torch.manual_seed(0)
x, y = torch.randn(64, 10, dtype=torch.float64), torch.randint(0, 3, (64,))
micro_batches = list(zip(x.chunk(4), y.chunk(4)))
model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3)).double()
regularizer = gradreg.GradientRegularizer(model, gamma=0.5, epsilon=0.1)


def gradients() -> list[Tensor]:
    """What stands in .grad, which is then cleared."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


regularizer.backward(lambda: F.cross_entropy(model(x), y))
one_large_batch = gradients()


# %% Joint: hand over the window. The loss is the sum over micro-batches, so divide by their number for the mean.
def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels) / len(micro_batches)


loss = regularizer.backward(loss_of, micro_batches)
torch.testing.assert_close(gradients(), one_large_batch, rtol=1e-10, atol=1e-12)
torch.testing.assert_close(loss, F.cross_entropy(model(x), y).detach())

# %% Joint by the second door: run the window again inside the block.
for batch in micro_batches:
    loss_of(batch).backward()
with regularizer.perturbed():
    for batch in micro_batches:
        loss_of(batch).backward()
torch.testing.assert_close(gradients(), one_large_batch, rtol=1e-10, atol=1e-12)

# %% Without `batches`, each call penalizes its own micro-batch (m-sharpness) and adds to .grad, as backward() does.
for batch in micro_batches:
    regularizer.backward(lambda batch=batch: loss_of(batch))
each_by_itself = gradients()

parameters = {name: p.detach() for name, p in model.named_parameters()}
reference = [
    gradreg.functional.regularized_gradient(
        lambda p, inputs=inputs, labels=labels: (
            F.cross_entropy(torch.func.functional_call(model, p, inputs), labels) / 4
        ),
        parameters,
        gamma=0.5,
        epsilon=0.1,
    )
    for inputs, labels in micro_batches
]
expected = [sum(r[name] for r in reference) for name in parameters]
torch.testing.assert_close(each_by_itself, expected, rtol=1e-10, atol=1e-12)

gap = max((a - b).abs().max().item() for a, b in zip(each_by_itself, one_large_batch))
assert gap > 1e-6
print(f"joint = one large batch to rounding; one penalty for each micro-batch differs by up to {gap:.1e}")
