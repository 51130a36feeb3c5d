"""Problems: models with data and loss, each with something that a second pass can get wrong. All in float64, seeded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves


class Attention(nn.Module):
    """Plain softmax attention, which can be differentiated twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        scores = self.drop((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))
        return x + scores @ v


class TiedTransformer(nn.Module):
    """The head is the embedding: one parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.attention = Attention(6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.attention(self.embedding(tokens)))).transpose(1, 2)


class Branching(nn.Module):
    """`extra` takes part at gate = 0 only, so that no displaced pass uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(5, 3)
        self.extra = nn.Linear(5, 3)
        self.gate = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x).tanh() * (1 + self.gate)
        return out + self.extra(x) if self.gate.item() == 0 else out


class Complex(nn.Module):
    """A complex matrix and a 0-dim scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128) / 2)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.weight).abs().square() * self.scale


class SparseEmbedding(nn.Module):
    """Sparse gradients for the table, dense ones for the head."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(4 * 9, 3)
    )


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))


def _features() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5), torch.randint(3, (8,))


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 2, 5, 5), torch.randint(3, (8,))


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randint(7, (8, 5)), torch.randint(7, (8, 5))


def _bags() -> tuple[Tensor, Tensor]:
    return torch.randint(6, (8, 4)), torch.randint(3, (8,))  # rows 6 to 8 of the table are never used


@dataclass(frozen=True)
class Problem:
    """A model and its data; `twin` is the same function of the same parameters that `torch.func` can differentiate."""

    name: str
    module: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    twin: Callable[[], nn.Module] | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.module().double()

    def batch(self) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x, y = self.data()
        return (x.double() if x.is_floating_point() else x), y


PROBLEMS = [
    Problem("mlp", mlp, _features, twin=mlp),
    Problem("cnn", cnn, _images, twin=cnn),
    Problem("transformer", TiedTransformer, _tokens, twin=TiedTransformer),
    Problem("branching", Branching, _features, twin=Branching),
    Problem("complex", Complex, _features, twin=Complex),
    Problem("sparse", SparseEmbedding, _bags, twin=lambda: SparseEmbedding(sparse=False)),
    Problem("spectral", spectral, _features),  # its power iteration writes into buffers by out=
]
NAMED = {problem.name: problem for problem in PROBLEMS}


class Trial:
    """One copy of a problem. Its loss counts passes and notes the weights and a random draw of each."""

    def __init__(self, problem: Problem | str) -> None:
        self.problem = NAMED[problem] if isinstance(problem, str) else problem
        self.model = self.problem.model()
        self.batch = self.problem.batch()
        self.passes = 0
        self.weights: list[list[Tensor]] = []
        self.draws: list[Tensor] = []

    def loss(self) -> Tensor:
        self.passes += 1
        self.weights.append([p.detach().clone() for p in self.model.parameters()])
        x, y = self.batch
        loss = F.cross_entropy(self.model(x), y)
        self.draws.append(torch.rand(3))
        return loss

    def gradients(self) -> list[Tensor | None]:
        return gradients(self.model)

    def snapshot(self) -> Any:
        return snapshot(self.model)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def dense(tensors: list[Tensor | None], like: list[Tensor]) -> list[Tensor]:
    """A gradient that is not there is zero."""
    return [torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for g, p in zip(tensors, like)]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Everything that an error must not change: values and addresses of the weights, buffers, optimizer state."""
    weights = [(p.data_ptr(), p.stride(), p.detach().clone()) for p in model.parameters()]
    buffers = [(b.data_ptr(), b.clone()) for b in model.buffers()]
    state = [] if optimizer is None else [copy_of(optimizer.state_dict()["state"])]
    return [weights, buffers, state]


def copy_of(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def _bits(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    x = x.detach().to_dense() if x.is_sparse else x.detach()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    return str(x.dtype), tuple(x.shape), x.contiguous().view(-1).view(torch.uint8).tolist()


def assert_same(actual: Any, expected: Any) -> None:
    """Equal trees, tensors bit by bit."""
    left, right = tree_leaves(actual), tree_leaves(expected)
    assert len(left) == len(right)
    for i, (x, y) in enumerate(zip(left, right)):
        assert _bits(x) == _bits(y), f"leaf {i}: {x} is not {y}"


def assert_close(actual: Any, expected: Any, **tolerance: float) -> None:
    """Equal trees to rounding; absent gradients are zero."""
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected):
        if x is None or y is None:
            x, y = (torch.zeros_like(y), y) if x is None and y is not None else (x, torch.zeros_like(x))
        x, y = (t.to_dense() if t.is_sparse else t for t in (x, y))
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 1e-9, "atol": 1e-12}))
