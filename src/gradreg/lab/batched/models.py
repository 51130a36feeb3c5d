r"""One architecture with many sets of weights: a stack of S slices whose gradients are taken together.

The weights of a slice are one row of a matrix (S, P), in the order of `model.parameters()`, so that an optimizer, a
norm or a displacement of the whole stack is one operation. A slice sees its own batch: `x` (S, B, …), `y` (S, B). No
operation mixes slices, so that one that diverges leaves the others alone.

`StackedMLP` writes the passes of a ReLU MLP out by hand, with batched matrix products into memory that it keeps;
`StackedModule` maps any module without buffers or randomness by `torch.func.vmap`, and is the reference of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg.functional import directional_derivative


class StackedModel(Protocol):
    """The passes of S slices; results stand in rows, as the weights do."""

    def gradient(self, weights: Tensor, x: Tensor, y: Tensor, out: Tensor, with_loss: bool = False) -> Tensor | None:
        """`out` ← ∇L of every slice, the mean cross-entropy of its batch; returns L (S,) if asked to."""
        ...

    def curvature_product(self, weights: Tensor, x: Tensor, y: Tensor, along: Tensor, out: Tensor) -> None:
        """`out` ← H d of every slice; the last call of `gradient` was at the same weights and batch."""
        ...


def stack(model: nn.Module) -> StackedModel:
    """The fastest stack of a model."""
    return StackedMLP(linear_layers(model)) if linear_layers(model) else StackedModule(model)


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of an MLP, `[Flatten], Linear, ReLU, …, Linear`; an empty list for any other model."""
    layers = list(model) if type(model) is nn.Sequential else []
    if layers and type(layers[0]) is nn.Flatten and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
        layers = layers[1:]
    linear, between = layers[::2], layers[1::2]
    is_mlp = len(layers) % 2 == 1 and all(type(layer) is nn.ReLU for layer in between)
    if not is_mlp or any(type(layer) is not nn.Linear or layer.bias is None for layer in linear):
        return []
    return [layer for layer in linear if isinstance(layer, nn.Linear)]


class StackedModule:
    """Any module that `torch.func` can map: no buffers, no randomness, nothing changed in place."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.train()
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    def gradient(self, weights: Tensor, x: Tensor, y: Tensor, out: Tensor, with_loss: bool = False) -> Tensor | None:
        mapped = torch.func.vmap(torch.func.grad_and_value(self._loss))
        gradients, losses = mapped(self._by_name(weights), x, y)
        torch.cat([g.flatten(1) for g in gradients.values()], 1, out=out)
        return losses.detach() if with_loss else None

    def curvature_product(self, weights: Tensor, x: Tensor, y: Tensor, along: Tensor, out: Tensor) -> None:
        def product(params: dict[str, Tensor], direction: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return directional_derivative(
                lambda p: self._loss(p, x, y), params, direction, epsilon=None, scheme="exact"
            )

        products = torch.func.vmap(product)(self._by_name(weights), self._by_name(along), x, y)
        torch.cat([h.flatten(1) for h in products.values()], 1, out=out)

    def _loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(self._model, params, (x,))
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def _by_name(self, rows: Tensor) -> dict[str, Tensor]:
        parts = rows.split([shape.numel() for shape in self._shapes.values()], 1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self._shapes.items(), parts)}


class StackedMLP:
    r"""A ReLU MLP, $a_l = \max(0, a_{l-1} W_l^\top + b_l)$, with mean cross-entropy.

    Backward: $\delta = (p - \mathrm{onehot}(y)) / B$ at the logits, then $\nabla W_l = \delta_l^\top a_{l-1}$ and
    $\delta_{l-1} = (\delta_l W_l) \cdot 1[a_{l-1} > 0]$. The product with the Hessian is Pearlmutter's: the
    derivative of each of these lines along d, with the slope of ReLU constant, as automatic differentiation has it.

    Logits, and whatever has their shape, are kept with classes before rows, (S, C, B): over a short last dimension
    softmax and matrix products are several times slower. Activations live in memory that is kept between calls.

    References:
        Pearlmutter, [Fast Exact Multiplication by the Hessian](https://doi.org/10.1162/neco.1994.6.1.147), 1994.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [(layer.out_features, layer.in_features) for layer in layers]
        self._parts = [size for fan_out, fan_in in self._sizes for size in (fan_out * fan_in, fan_out)]
        self._views: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}
        self._rooms: dict[tuple[int, int], _Room] = {}

    def gradient(self, weights: Tensor, x: Tensor, y: Tensor, out: Tensor, with_loss: bool = False) -> Tensor | None:
        *hidden, (head, bias) = self._layers(weights)
        *hidden_gradients, (head_gradient, bias_gradient) = self._layers(out)
        self._make_room(x.flatten(2))
        inputs, deltas, delta = self._inputs, self._deltas, self._delta
        for k, (w, b) in enumerate(hidden):
            torch.baddbmm(b, inputs[k], w.mT, out=inputs[k + 1]).relu_()
        logits = torch.baddbmm(bias.mT, head, inputs[-1].mT, out=delta)
        labels, losses = y.unsqueeze(1), None
        if with_loss:
            losses = (logits.logsumexp(1) - logits.gather(1, labels).squeeze(1)).mean(1)
        torch.softmax(logits, 1, out=self._probabilities)
        delta.copy_(self._probabilities).scatter_add_(1, labels, self._minus_one).mul_(1 / y.shape[1])
        # A batched product into memory with gaps is done slice by slice, which is slow for a small one.
        head_gradient.copy_(torch.bmm(delta, inputs[-1], out=self._head_gradient))
        torch.sum(delta, 2, out=bias_gradient.squeeze(1))
        back = delta.mT, head
        for k in reversed(range(len(hidden))):
            torch.bmm(*back, out=deltas[k])
            _through_relu(deltas[k], inputs[k + 1])
            w_gradient, b_gradient = hidden_gradients[k]
            torch.bmm(deltas[k].mT, inputs[k], out=w_gradient)
            torch.sum(deltas[k], 1, keepdim=True, out=b_gradient)
            back = deltas[k], hidden[k][0]
        return losses

    def curvature_product(self, weights: Tensor, x: Tensor, y: Tensor, along: Tensor, out: Tensor) -> None:
        del x
        *hidden, (head, _) = self._layers(weights)
        *hidden_steps, (head_step, bias_step) = self._layers(along)
        *hidden_products, (head_product, bias_product) = self._layers(out)
        inputs, deltas, delta = self._inputs, self._deltas, self._delta
        moved: list[Tensor | None] = [None]  # the derivative of each of `inputs`; the data does not move
        for k, ((w, _), (dw, db)) in enumerate(zip(hidden, hidden_steps)):
            change = _plus(torch.baddbmm(db, inputs[k], dw.mT), moved[k], w.mT)
            _through_relu(change, inputs[k + 1])
            moved.append(change)
        last = moved[-1]
        p = self._probabilities
        weighted = _plus(torch.baddbmm(bias_step.mT, head_step, inputs[-1].mT), head, None if last is None else last.mT)
        weighted.mul_(p)
        turned = weighted.sub_(p * weighted.sum(1, keepdim=True)).mul_(1 / y.shape[1])
        head_product.copy_(_plus(torch.bmm(turned, inputs[-1]), delta, last))
        torch.sum(turned, 2, out=bias_product.squeeze(1))
        back = torch.bmm(turned.mT, head).baddbmm_(delta.mT, head_step)
        for k in reversed(range(len(hidden))):
            _through_relu(back, inputs[k + 1])
            w_product, b_product = hidden_products[k]
            torch.bmm(back.mT, inputs[k], out=w_product)
            _plus(w_product, deltas[k].mT, moved[k])
            torch.sum(back, 1, keepdim=True, out=b_product)
            if k:
                back = torch.bmm(back, hidden[k][0]).baddbmm_(deltas[k], hidden_steps[k][0])

    def _layers(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(W, b) of each layer as views of the rows: (S, out, in) and (S, 1, out)."""
        kept = self._views.get(id(rows))
        if kept is None or kept[0] is not rows:
            parts = rows.split(self._parts, 1)
            views = [(w.unflatten(1, size), b.unsqueeze(1)) for w, b, size in zip(parts[::2], parts[1::2], self._sizes)]
            kept = self._views[id(rows)] = (rows, views)
        return kept[1]

    def _make_room(self, x: Tensor) -> None:
        num_slices, batch_size = x.shape[:2]
        if (num_slices, batch_size) not in self._rooms:
            self._rooms[num_slices, batch_size] = _Room(self._sizes, x)
        room = self._rooms[num_slices, batch_size]
        self._inputs, self._deltas, self._delta = [x, *room.activations], room.deltas, room.delta
        self._probabilities, self._minus_one = room.probabilities, room.minus_one
        self._head_gradient = room.head_gradient


class _Room:
    """Memory for batches of one size."""

    def __init__(self, sizes: Sequence[tuple[int, int]], x: Tensor) -> None:
        num_slices, batch_size = x.shape[:2]
        (classes, fan_in), hidden = sizes[-1], sizes[:-1]
        self.activations = [x.new_empty(num_slices, batch_size, fan_out) for fan_out, _ in hidden]
        self.deltas = [torch.empty_like(a) for a in self.activations]
        self.delta = x.new_empty(num_slices, classes, batch_size)
        self.probabilities = torch.empty_like(self.delta)
        self.minus_one = x.new_full((num_slices, 1, batch_size), -1.0)
        self.head_gradient = x.new_empty(num_slices, classes, fan_in)


def _plus(total: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """total ← total + left · right, where both are there."""
    return total if left is None or right is None else total.baddbmm_(left, right)


def _through_relu(delta: Tensor, activation: Tensor) -> None:
    """δ ← δ · 1[a > 0], in one reading."""
    torch.ops.aten.threshold_backward.grad_input(delta, activation, 0, grad_input=delta)
