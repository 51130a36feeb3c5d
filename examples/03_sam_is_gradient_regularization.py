"""SAM, un-normalized SAM and GNP written by hand, and each again as values of the four nouns."""

# %% The same model and batch for all.
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradreg

torch.manual_seed(0)
x, y = torch.randn(64, 10, dtype=torch.float64), torch.randint(0, 3, (64,))
model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3)).double()


def gradient(net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())))


def gradient_at(offsets: list[Tensor]) -> list[Tensor]:
    """∇L(θ + offset), on a copy of the model."""
    net = copy.deepcopy(model)
    with torch.no_grad():
        for p, offset in zip(net.parameters(), offsets):
            p.add_(offset)
    return gradient(net)


def by_engine(regularizer: gradreg.GradientRegularizer) -> list[Tensor]:
    model.zero_grad()
    regularizer.backward(lambda: F.cross_entropy(model(x), y))
    return [p.grad for p in model.parameters() if p.grad is not None]


g1 = gradient(model)
length = torch.cat([g.flatten() for g in g1]).norm()

# %% SAM (Foret et al., 2021): the gradient at θ + ρ g1/‖g1‖. Here γ = ε = ρ and the ascent is `normalized`.
rho = 0.05
by_hand = gradient_at([rho * g / length for g in g1])
torch.testing.assert_close(by_engine(gradreg.sam(model, rho)), by_hand, rtol=1e-10, atol=1e-12)
as_nouns = gradreg.GradientRegularizer(model, gamma=rho, epsilon=rho, ascent="normalized")
assert all(torch.equal(a, b) for a, b in zip(by_engine(as_nouns), by_engine(gradreg.sam(model, rho))))

# %% Un-normalized SAM: the gradient at θ + ρ g1. That is F-GR, the method of Karakida et al., with γ = ε = ρ.
by_hand = gradient_at([rho * g for g in g1])
f_gr = gradreg.GradientRegularizer(model, gamma=rho, epsilon=rho)
torch.testing.assert_close(by_engine(f_gr), by_hand, rtol=1e-10, atol=1e-12)

# %% GNP (Zhao et al., 2022) penalizes λ‖∇L‖, not squared: (1 − α) g1 + α g2 with α = λ/r.
radius, alpha = 0.1, 0.8
g2 = gradient_at([radius * g / length for g in g1])
by_hand = [(1 - alpha) * a + alpha * b for a, b in zip(g1, g2)]
torch.testing.assert_close(by_engine(gradreg.gnp(model, radius, alpha)), by_hand, rtol=1e-10, atol=1e-12)

print("SAM, un-normalized SAM and GNP are one line: ĝ = g1 + (γ/ε)(g2 − g1).")
