r"""The curvature of a loss over a data set: ‖∇L‖, the trace of the Hessian H = ∇²L, its largest eigenvalues.

Convention: $L$ is the mean over all rows of the data set. `loss_fn(batch)` returns the mean over the rows of one batch;
batches are weighted by their rows, so that a smaller last one counts right. Every pass goes through all batches, holds
one of them at a time, and draws the same random numbers, so that dropout masks are the same in all passes.

Nothing is left behind: `.grad` is not touched, torch's random state and, when a module is given, its buffers are put
back. The mode of the module is the caller's: in evaluation mode BatchNorm uses its running statistics and $L$ is the
loss of the network as it predicts. In training mode it normalizes by the statistics of the batch, the loss of a batch
is no longer a mean over rows, and the numbers belong to these batches, not to the data set.

With ReLU, H is that of the pieces: kinks are not counted.

Example:
    >>> theta = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    >>> def loss_fn(batch):  # L = ½ (x θ)² in the mean: H = mean of x²
    ...     return ((batch * theta) ** 2).sum(1).mean() / 2
    >>> batches = [torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]]), torch.tensor([[4.0, 2.0, 0.0]])]
    >>> hessian_trace(loss_fn, [theta], batches).mean
    10.0
    >>> [round(value, 4) for value in top_eigenvalues(loss_fn, [theta], batches, k=2).values]
    [6.0, 4.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from gradreg import _vectors as vectors

Batch = Any
LossFn = Callable[[Batch], Tensor]
Parameters = nn.Module | Iterable[Tensor]
Progress = Callable[[int, int], object]
"""Called with the work done and the most that is planned: batches, or batches times probes."""

MOST_PRODUCTS = 64  # of Lanczos, unless 2k is more: the top of a network's spectrum stands apart and needs about half


@dataclass(frozen=True)
class Trace:
    """An estimate of tr H."""

    mean: float
    standard_error: float
    samples: tuple[float, ...]
    """vᵀHv of each probe."""


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of H, in the order that was asked for."""

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    """‖Hu − λu‖ of each: H has an eigenvalue at most that far from λ."""
    num_products: int
    """Hessian-vector products spent, the residuals' included."""


def gradient_norm(
    loss_fn: LossFn, parameters: Parameters, batches: Iterable[Batch], *, progress: Progress | None = None
) -> float:
    r"""$\|\nabla L\|$ over all trainable parameters together.

    Args:
        loss_fn: maps a batch to the mean loss over its rows, a 0-dim tensor that depends on the parameters.
        parameters: a module, or tensors as an optimizer takes them; those that do not require gradients are left out.
        batches: what can be iterated over again and again: a list, a DataLoader. A batch is a tensor, a list, tuple or
            dict that holds one, or an object with a length; its rows are the first dimension of the first tensor.
        progress: called with the work done and planned, in batches.

    Raises:
        ValueError: nothing trainable, no rows, or a loss that is not a finite scalar.
        TypeError: batches that can be read once only.
    """
    data = _Loss(loss_fn, parameters, batches, progress)
    data.plan(1)
    total = data.zero()

    def visit(loss: Tensor, num_rows: int) -> None:
        gradient = torch.autograd.grad(loss, data.parameters, allow_unused=True)
        total.add_(data.flat(gradient), alpha=num_rows)
        data.advance()

    rows = data.visit_all(visit)
    return (vectors.norm([total]) / rows).item()


def hessian_trace(
    loss_fn: LossFn,
    parameters: Parameters,
    batches: Iterable[Batch],
    *,
    num_probes: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    r"""Estimate $\operatorname{tr} H$ by Hutchinson's method.

    $$\operatorname{tr} H \approx \frac1m \sum_{i=1}^m v_i^\top H v_i, \qquad v_i \in \{-1, 1\}^n \text{ uniform}$$

    Unbiased; the variance of one term is $2 \sum_{i \neq j} H_{ij}^2$, so a diagonal H is exact. A probe is the same in
    all batches. One pass over the data; the graph of a batch serves all of its probes.

    Args:
        loss_fn: as in `gradient_norm`.
        parameters: as in `gradient_norm`.
        batches: as in `gradient_norm`.
        num_probes: m ≥ 2; the standard error falls as 1/√m.
        seed: of the probes, which are drawn on the host: the same on every device.
        progress: called with the work done and planned, in probes of batches.

    Raises:
        ValueError: as `gradient_norm`, or too few probes.

    References:
        Hutchinson, *A stochastic estimator of the trace of the influence matrix*, Comm. Statist. Simulation 1990.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, got {num_probes}: one probe has no standard error.")
    data = _Loss(loss_fn, parameters, batches, progress)
    data.plan(num_probes)
    samples = _quadratic_forms(data, lambda: islice(_rademacher(data, seed), num_probes))
    mean = math.fsum(samples) / num_probes
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / (num_probes - 1)
    return Trace(mean, math.sqrt(variance / num_probes), tuple(samples))


def top_eigenvalues(
    loss_fn: LossFn,
    parameters: Parameters,
    batches: Iterable[Batch],
    k: int = 1,
    *,
    by: str = "magnitude",
    tolerance: float = 1e-4,
    max_products: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenvalues:
    r"""The k largest eigenvalues of H, by Lanczos with full reorthogonalization.

    Stops when the residuals of all k are below `tolerance` times the largest eigenvalue. Holds one vector of the size
    of the parameters for each product. The residuals are computed afresh at the end, so that they include rounding:
    they bound the error of each value, which is usually of the order of their square. They do not say that nothing was
    missed: a repeated eigenvalue is found once, unless there are as many products as parameters (`tolerance=0`).

    Args:
        loss_fn: as in `gradient_norm`.
        parameters: as in `gradient_norm`.
        batches: as in `gradient_norm`.
        k: how many.
        by: `magnitude`, largest |λ| first, negative ones among them, or `value`, largest λ first.
        tolerance: relative; 0 spends all products.
        max_products: most steps of Lanczos; by default 64, or 2k if that is more, and never more than parameters.
        seed: of the first vector.
        progress: called with the work done and planned, in batches; planned is the most it can be.

    Raises:
        ValueError: as `gradient_norm`, k that is not from 1 to the number of parameters, fewer products than k.

    References:
        Golub & Van Loan, *Matrix Computations*, 4th ed., §10.1 and §10.3.
    """
    data = _Loss(loss_fn, parameters, batches, progress)
    if not 1 <= k <= data.size:
        raise ValueError(f"k must be a whole number from 1 to {data.size} (the parameters), got {k}.")
    if by not in ("magnitude", "value"):
        raise ValueError(f"by must be 'magnitude' or 'value', got {by!r}.")
    limit = max(MOST_PRODUCTS, 2 * k) if max_products is None else max_products
    if limit < k:
        raise ValueError(f"max_products must be at least k = {k}, got {limit}.")
    limit = min(limit, data.size)
    data.plan(limit + 1)

    generator = torch.Generator().manual_seed(seed)
    scale = math.inf
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []  # the tridiagonal matrix QᵀHQ, in float64 on the host
    along = _unit(data, generator, basis)
    while True:
        basis.append(along)
        (product,) = data.products([along])
        diagonal.append(vectors.dot(product, along).item())
        rest = _orthogonal(product, basis)
        size = vectors.norm([rest]).item()
        values, ritz = _eigh(diagonal, beside)
        scale = values.abs().max().item()
        order = (values.abs() if by == "magnitude" else values).argsort(descending=True)[:k]
        is_invariant = size <= 100 * torch.finfo(rest.dtype).eps * scale
        is_converged = (size * ritz[-1, order].abs() <= tolerance * scale).all() and len(order) == k
        if len(basis) == limit or (is_converged and not is_invariant):
            break
        # An invariant space holds each eigenvalue once: look for more beside it.
        beside.append(0.0 if is_invariant else size)
        along = _unit(data, generator, basis) if is_invariant else rest / size

    pairs = [torch.zeros_like(along) for _ in order]
    for pair, column in zip(pairs, ritz[:, order].T.tolist()):
        for q, weight in zip(basis, column):
            pair.add_(q, alpha=weight)
    found = values[order].tolist()
    images = data.products(pairs)
    residuals = [vectors.norm([image - v * u]).item() for image, v, u in zip(images, found, pairs)]
    return Eigenvalues(tuple(found), tuple(residuals), len(basis) + k)


class _Loss:
    """The mean loss over all rows, to be differentiated once or twice; vectors over parameters are flat here."""

    def __init__(
        self, loss_fn: LossFn, parameters: Parameters, batches: Iterable[Batch], progress: Progress | None
    ) -> None:
        self._module = parameters if isinstance(parameters, nn.Module) else None
        given = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
        self.parameters = list({id(p): p for p in given if p.requires_grad}.values())
        if not self.parameters:
            raise ValueError("parameters must hold at least one tensor that requires gradients, got none.")
        for p in self.parameters:
            if not p.dtype.is_floating_point:
                raise ValueError(f"parameters must be real, got {p.dtype}.")
        if iter(batches) is batches:
            raise TypeError(
                f"batches must be iterable again and again, got a {type(batches).__name__}, which is used up after "
                "one pass: pass a list or a DataLoader."
            )
        self._loss_fn = loss_fn
        self._batches = batches
        self._progress = progress
        self._done = self._planned = 0
        self.size = sum(p.numel() for p in self.parameters)
        self.dtype = vectors.wide(max((p.dtype for p in self.parameters), key=lambda d: d.itemsize))
        self.device = self.parameters[0].device

    def plan(self, for_each_batch: int) -> None:
        """How often each batch will advance the work."""
        if self._progress is not None:
            length: Any = self._batches
            num_batches = len(length) if hasattr(length, "__len__") else sum(1 for _ in length)
            self._planned = for_each_batch * num_batches
            self._progress(0, self._planned)

    def advance(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, max(self._planned, self._done))

    def zero(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One long vector; None, where the loss does not depend on a parameter, is 0."""
        parts = [torch.zeros_like(p) if t is None else t.to_dense() for t, p in zip(tensors, self.parameters)]
        return torch.cat([t.detach().to(self.device, self.dtype).flatten() for t in parts])

    def visit_all(self, visit: Callable[[Tensor, int], None]) -> int:
        """Call `visit` with the loss and the number of rows of every batch; return the number of all rows."""
        rows = 0
        with self._kept():
            for batch in self._batches:
                num_rows = _num_rows(batch)
                visit(_checked(self._loss_fn(batch)), num_rows)
                rows += num_rows
        if not rows:
            raise ValueError("batches must hold at least one row, got none.")
        return rows

    def products(self, along: Sequence[Tensor]) -> list[Tensor]:
        """H v for each vector, in one pass over the data."""
        totals = [self.zero() for _ in along]

        def visit(loss: Tensor, num_rows: int) -> None:
            for total, (_, product) in zip(totals, self.batch_products(loss, along)):
                total.add_(product, alpha=num_rows)
            self.advance()

        rows = self.visit_all(visit)
        return [total / rows for total in totals]

    def batch_products(self, loss: Tensor, along: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(v, H v) of the loss of one batch, for each vector in turn, from one graph of its gradient."""
        gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        sizes = [p.numel() for p in self.parameters]
        for v in along:
            split = [part.view(p.shape).to(p.device, p.dtype) for part, p in zip(v.split(sizes), self.parameters)]
            pairs = [(g, part) for g, part in zip(gradient, split) if g is not None and g.requires_grad]
            if not pairs:  # a loss that is linear in the parameters
                yield v, torch.zeros_like(v)
                continue
            outputs, cotangents = zip(*pairs)
            product = torch.autograd.grad(outputs, self.parameters, cotangents, retain_graph=True, allow_unused=True)
            yield v, self.flat(product)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Random state and buffers are put back; attention by its formula: fused kernels have no second derivative."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with ExitStack() as stack:
            stack.enter_context(_buffers_kept(self._module))
            stack.enter_context(torch.random.fork_rng(devices=()))
            for device in {p.device for p in self.parameters if p.device.type != "cpu"}:
                stack.enter_context(torch.random.fork_rng([device.index], device_type=device.type))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.enable_grad())
            yield


def _quadratic_forms(data: _Loss, draw: Callable[[], Iterable[Tensor]]) -> list[float]:
    """vᵀHv of each vector; they are drawn again for every batch, which costs less memory than to keep them."""
    samples: list[float] = []

    def visit(loss: Tensor, num_rows: int) -> None:
        forms = []
        for v, product in data.batch_products(loss, draw()):
            forms.append(num_rows * vectors.dot(v, product).item())
            data.advance()
        samples[:] = [a + b for a, b in zip(samples, forms)] if samples else forms

    rows = data.visit_all(visit)
    return [sample / rows for sample in samples]


def _rademacher(data: _Loss, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        signs = torch.randint(0, 2, (data.size,), generator=generator, dtype=torch.int8)
        yield (2 * signs - 1).to(data.device, data.dtype)


def _unit(data: _Loss, generator: torch.Generator, basis: Sequence[Tensor]) -> Tensor:
    """A random vector of length 1, orthogonal to the basis."""
    v = torch.randn(data.size, generator=generator, dtype=torch.float64).to(data.device, data.dtype)
    v = _orthogonal(v, basis)
    return v / vectors.norm([v])


def _orthogonal(v: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """Gram-Schmidt, twice: once is not enough for what nearly cancels (Golub & Van Loan, §5.2)."""
    v = v.clone()
    for q in (*basis, *basis):
        v.sub_(q * vectors.dot(q, v))
    return v


def _eigh(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[Tensor, Tensor]:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        off = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
        matrix = matrix + off + off.T
    values, ritz = torch.linalg.eigh(matrix)
    return values, ritz


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar (0-dim) tensor, got {got}: take the mean over the rows.")
    if not loss.requires_grad:
        raise ValueError("loss_fn must return a loss that depends on the parameters, got one without a graph.")
    if not loss.isfinite():
        raise ValueError(f"loss_fn must return a finite loss, got {loss.item()}.")
    return loss


def _num_rows(batch: Batch) -> int:
    if isinstance(batch, Tensor):
        if not batch.ndim:
            raise ValueError("a batch must have rows, got a 0-dim tensor.")
        return len(batch)
    if isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            if isinstance(part, (Tensor, Mapping, list, tuple)):
                return _num_rows(part)
        raise ValueError(
            f"a batch must hold a tensor, whose first dimension is its rows, got a {type(batch).__name__}."
        )
    return len(batch)


@contextmanager
def _buffers_kept(module: nn.Module | None) -> Iterator[None]:
    """Which tensors the buffers are, and what they hold."""
    owners = [] if module is None else [owner for owner in module.modules() if owner._buffers]
    before = [
        (owner._buffers, name, b, b.clone()) for owner in owners for name, b in owner._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        for owner, name, buffer, value in before:
            owner[name] = buffer
            vectors.copy_([buffer.data], [value])  # a graph of the caller's may be alive, and checks versions
