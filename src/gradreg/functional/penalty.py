r"""The penalty $R(\theta) = \tfrac12\|\nabla L(\theta)\|^2$ and its gradient: parameters in, tensors out.

Convention: the regularized loss is $L + \gamma R = L + \tfrac\gamma2\|\nabla L\|^2$, so $\nabla R = H \nabla L$.
(A later paper prints γ/2 in front of the difference where its code uses γ; the code is right for this convention.)

`params` is any pytree of tensors (a list, a dict of names), `loss_fn` maps it to a 0-dim tensor. Nothing is
modified, and every function maps under `torch.func.vmap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from gradreg.functional.ascents import Ascent, resolve_ascent
from gradreg.functional.schemes import Scheme, resolve_scheme

Params = Any  # a pytree of tensors
LossFn = Callable[[Params], Tensor]


def penalty(loss_fn: LossFn, params: Params) -> Tensor:
    r"""$R(\theta) = \tfrac12 \|\nabla L(\theta)\|^2$, differentiable once more.

    Example:
        >>> penalty(lambda p: (p[0] ** 2).sum() / 2, [torch.tensor([3.0, 4.0])])
        tensor(12.5000)
    """
    grads, _ = tree_flatten(torch.func.grad(loss_fn)(params))
    return torch.stack([(g.abs() ** 2).sum() for g in grads]).sum() / 2


def directional_derivative(
    loss_fn: LossFn, params: Params, direction: Params, *, epsilon: float | None, scheme: str | Scheme
) -> Params:
    r"""$H d$: the derivative of $\nabla L$ along `direction`, by a scheme.

    $$H d \approx \frac1\epsilon \sum_k w_k [\nabla L(\theta + s_k \epsilon d) - \nabla L(\theta)]$$

    Exact when $L$ is quadratic; otherwise the error is $O(\epsilon)$ for `forward` and `backward`, $O(\epsilon^2)$
    for `central`, none for `exact`, which ignores `epsilon`.

    Args:
        loss_fn: maps parameters to a 0-dim tensor.
        params: the point θ.
        direction: d, shapes as `params`.
        epsilon: step length ε > 0 along d.
        scheme: `forward`, `backward`, `central`, `exact`, or a `Scheme`.

    Raises:
        ValueError: an unknown scheme, or ε that is not a positive number.
    """
    scheme = resolve_scheme(scheme)
    grad = torch.func.grad(loss_fn)
    leaves, tree = tree_flatten(params)
    steps, _ = tree_flatten(direction)
    if scheme.is_exact:
        _, pullback, *_ = torch.func.vjp(grad, params)
        return pullback(direction)[0]  # H is symmetric: dᵀH = (Hd)ᵀ
    if not isinstance(epsilon, Tensor) and not (
        isinstance(epsilon, (int, float)) and math.isfinite(epsilon) and epsilon > 0
    ):
        raise ValueError(f"epsilon must be a positive number with scheme={scheme.name!r}, got {epsilon}.")

    def gradient_at(offset: float | Tensor) -> list[Tensor]:
        return tree_flatten(grad(tree_unflatten([p + offset * d for p, d in zip(leaves, steps)], tree)))[0]

    base = gradient_at(0.0)
    total = [torch.zeros_like(g) for g in base]
    for node, weight in scheme.stencil:
        moved = gradient_at(node * epsilon)
        total = [t + (weight / epsilon) * (g - b) for t, g, b in zip(total, moved, base)]
    return tree_unflatten(total, tree)


def penalty_gradient(
    loss_fn: LossFn,
    params: Params,
    *,
    epsilon: float | None = None,
    scheme: str | Scheme = "exact",
    ascent: str | Ascent = "gradient",
) -> Params:
    r"""$\nabla R(\theta) = H \nabla L$ by a scheme; with another ascent, $H d$.

    The default, double backpropagation, is the reference. `forward` is F-GR, `backward` B-GR:

    $$\nabla R(\theta) \approx \frac{\nabla L(\theta + \epsilon \nabla L(\theta)) - \nabla L(\theta)}{\epsilon}$$

    With `ascent="normalized"` it estimates $\nabla \|\nabla L\|$, the penalty of GNP.

    Args:
        loss_fn: maps parameters to a 0-dim tensor.
        params: the point θ, a pytree of tensors; not modified.
        epsilon: step length ε > 0; unused by `exact`.
        scheme: `exact`, `forward`, `backward`, `central`, or a `Scheme`.
        ascent: `gradient`, `normalized`, `adaptive`, or an `Ascent`.

    Returns:
        a pytree like `params`.

    Raises:
        ValueError: an unknown scheme or ascent, or ε that is not a positive number.

    References:
        Karakida et al., [Understanding Gradient Regularization](https://arxiv.org/abs/2210.02720), ICML 2023.

    Example:
        >>> theta = [torch.tensor([1.0, -2.0])]
        >>> hessian = torch.tensor([3.0, 1.0])  # L = ½ Σ hᵢ θᵢ², so ∇R = h² θ at any ε
        >>> penalty_gradient(lambda p: (hessian * p[0] ** 2).sum() / 2, theta, scheme="forward", epsilon=0.5)
        [tensor([ 9., -2.])]
    """
    ascent = resolve_ascent(ascent)
    leaves, tree = tree_flatten(params)
    grads, _ = tree_flatten(torch.func.grad(loss_fn)(params))
    vectors, scale = ascent(leaves, grads)
    direction = tree_unflatten([scale * v for v in vectors], tree)
    return directional_derivative(loss_fn, params, direction, epsilon=epsilon, scheme=scheme)


def regularized_gradient(
    loss_fn: LossFn,
    params: Params,
    gamma: float | Tensor,
    epsilon: float | None = None,
    *,
    scheme: str | Scheme = "forward",
    ascent: str | Ascent = "gradient",
) -> Params:
    r"""$\hat g = \nabla L + \gamma H d$: the gradient that every method of this package hands to the optimizer.

    For `forward` it is $g_1 + \frac\gamma\epsilon (g_2 - g_1)$. γ = ε with `normalized` is SAM, with `gradient`
    un-normalized SAM. The training engine computes the same with less memory; this is its slow, obvious reference.

    Args:
        loss_fn: maps parameters to a 0-dim tensor.
        params: the point θ, a pytree of tensors; not modified.
        gamma: strength γ ≥ 0.
        epsilon: step length ε > 0; unused by `exact`.
        scheme: as in `penalty_gradient`.
        ascent: as in `penalty_gradient`.

    Example:
        >>> loss = lambda p: (p["w"] ** 2).sum() / 2  # H = 1: ĝ = (1 + γ) w
        >>> regularized_gradient(loss, {"w": torch.tensor([1.0, 2.0])}, gamma=0.5, epsilon=0.1)
        {'w': tensor([1.5000, 3.0000])}
    """
    grads, tree = tree_flatten(torch.func.grad(loss_fn)(params))
    extra = penalty_gradient(loss_fn, params, epsilon=epsilon, scheme=scheme, ascent=ascent)
    return tree_unflatten([g + gamma * h for g, h in zip(grads, tree_flatten(extra)[0])], tree)
