"""Four schemes for one derivative: equal on a quadratic, errors of order 1, 1 and 2 in ε elsewhere."""

# %% H∇L is the gradient of the penalty R = ½‖∇L‖². Double backpropagation, `exact`, gives it without error.
import math

import torch
from torch import Tensor, nn

import gradreg

torch.manual_seed(0)
x, y = torch.randn(32, 4, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64)


def regularized_gradient(model: nn.Module, scheme: str, epsilon: float) -> Tensor:
    """ĝ of the mean squared error by the engine, as one vector."""
    model.zero_grad()
    regularizer = gradreg.GradientRegularizer(model, gamma=0.5, epsilon=epsilon, scheme=scheme)
    regularizer.backward(lambda: (model(x) - y).square().mean())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# %% A linear model has a quadratic loss: every scheme is exact, at any ε.
linear = nn.Linear(4, 1).double()
exact = regularized_gradient(linear, "exact", epsilon=1.0)
for scheme in ("forward", "backward", "central"):
    for epsilon in (0.01, 1.0, 100.0):
        torch.testing.assert_close(regularized_gradient(linear, scheme, epsilon), exact, rtol=1e-9, atol=1e-9)

# %% A smooth network: halve ε, and the error falls by 2 (first order) or by 4 (second order).
network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
exact = regularized_gradient(network, "exact", epsilon=1.0)
print(f"{'scheme':<10}{'ε = 0.02':>12}{'ε = 0.01':>12}{'order':>8}")
for scheme, promised in (("forward", 1), ("backward", 1), ("central", 2)):
    coarse, fine = ((regularized_gradient(network, scheme, eps) - exact).norm().item() for eps in (0.02, 0.01))
    order = math.log2(coarse / fine)
    print(f"{scheme:<10}{coarse:12.2e}{fine:12.2e}{order:8.2f}")
    assert abs(order - promised) < 0.1, scheme
