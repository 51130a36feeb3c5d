"""Door 1, your own loop: one line changes, and γ = 0 changes nothing."""

# %% A small problem: two classes, a network with dropout, so that random numbers matter.
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg

torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 2))


def train(gamma: float | None, num_steps: int = 100) -> nn.Module:
    """Train a copy of the model; `gamma=None` is the plain loop, without gradreg."""
    net = copy.deepcopy(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    regularizer = None if gamma is None else gradreg.GradientRegularizer(net, gamma=gamma, epsilon=0.01)
    torch.manual_seed(1)
    for _ in range(num_steps):
        batch = torch.randint(0, len(x), (64,))
        optimizer.zero_grad()
        if regularizer is None:
            F.cross_entropy(net(x[batch]), y[batch]).backward()
        else:
            # The one line. `batch` is drawn outside, since both passes must see the same data.
            regularizer.backward(lambda batch=batch: F.cross_entropy(net(x[batch]), y[batch]))
        optimizer.step()
    return net


# %% γ = 0 is the plain loop, bit for bit: weights and random numbers.
plain = train(gamma=None)
random_after_plain = torch.rand(())
zero = train(gamma=0.0)
random_after_zero = torch.rand(())
assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters()))
assert torch.equal(random_after_plain, random_after_zero)

# %% γ > 0: other weights, but the random state after training is still that of one pass for each step.
regularized = train(gamma=0.1)
random_after_regularized = torch.rand(())
assert not all(torch.equal(a, b) for a, b in zip(plain.parameters(), regularized.parameters()))
assert torch.equal(random_after_plain, random_after_regularized)

# %% What stands in .grad? The formula of the first page, which `gradreg.functional` computes without an engine.
net = copy.deepcopy(plain).double().eval()  # no dropout: the reference draws its own random numbers
inputs, gamma = x.double(), 1.0
gradreg.GradientRegularizer(net, gamma=gamma, epsilon=0.01).backward(lambda: F.cross_entropy(net(inputs), y))
theta = {name: p.detach() for name, p in net.named_parameters()}


def loss_at(parameters: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(torch.func.functional_call(net, parameters, inputs), y)


reference = gradreg.functional.regularized_gradient(loss_at, theta, gamma=gamma, epsilon=0.01)
for name, p in net.named_parameters():
    torch.testing.assert_close(p.grad, reference[name], rtol=1e-10, atol=1e-12)


# %% What is it for? Of two steps of one length, that along ĝ lowers L + (γ/2)‖∇L‖² more than that along ∇L.
def objective_after(direction: dict[str, Tensor], length: float = 1e-3) -> float:
    size = torch.cat([d.flatten() for d in direction.values()]).norm()
    moved = {name: theta[name] - length * d / size for name, d in direction.items()}
    return (loss_at(moved) + gamma * gradreg.functional.penalty(loss_at, moved)).item()


start = objective_after(reference, length=0.0)
along_plain = start - objective_after(torch.func.grad(loss_at)(theta))
along_regularized = start - objective_after(reference)
print(f"a short step lowers L + (γ/2)‖∇L‖² by {along_plain:.2e} along ∇L and by {along_regularized:.2e} along ĝ")
assert along_regularized > along_plain > 0
