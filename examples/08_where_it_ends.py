"""What the penalty does, seen: the same start, and an end where the loss is flatter. Draws the README's figure.

python examples/08_where_it_ends.py docs/figures/where_it_ends.svg      # without a file nothing is drawn
"""

# %% Two weights and one loss, L = ½(uv − 1)². Its minima are the line uv = 1, and u² + v² is the curvature there.
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import gradreg

START, LEARNING_RATE, NUM_STEPS = (-1.2, 2.0), 0.01, 1500


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(START, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 0.5 * (self.w.prod() - 1).square()


def descent(gamma: float) -> Tensor:
    """All points of gradient descent on L + (γ/2)‖∇L‖²."""
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    regularizer = gradreg.GradientRegularizer(model, gamma=gamma, epsilon=max(gamma, 0.1))
    points = [model.w.detach().clone()]
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        regularizer.backward(model)
        optimizer.step()
        points.append(model.w.detach().clone())
    return torch.stack(points)


def curvature(point: Tensor) -> float:
    """The largest eigenvalue of the Hessian of L."""
    u, v = point.tolist()
    hessian = torch.tensor([[v * v, 2 * u * v - 1], [2 * u * v - 1, u * u]], dtype=torch.float64)
    return torch.linalg.eigvalsh(hessian)[-1].item()


# %% Plain descent stops where it meets the line. With the penalty it comes nearer to (1, 1), the flattest: 2.
paths = {"plain": descent(0.0), "γ = 0.1": descent(0.1), "γ = 0.2": descent(0.2)}
ends = {name: curvature(path[-1]) for name, path in paths.items()}
for name, path in paths.items():
    u, v = path[-1].tolist()
    print(f"{name:8} ends at ({u:.2f}, {v:.2f}), uv − 1 = {u * v - 1:+.0e}, curvature {ends[name]:.2f}")
    assert abs(u * v - 1) < 1e-4
assert ends["γ = 0.2"] < 2.4 < 2.6 < ends["γ = 0.1"] < 2.8 < 3.2 < ends["plain"]

# %% The figure (needs matplotlib).
if sys.argv[1:]:
    from gradreg.lab.figures import FAINT, INK, Look, as_svg, legend, panels

    LOOKS = {"plain": Look("#7b8087"), "γ = 0.1": Look("#56a5d9", "--"), "γ = 0.2": Look("#1b82c8")}

    @as_svg
    def draw():
        figure, (plane, along) = panels(
            ["The path of the two weights", "The curvature of the loss on the way"], 4.4, 2.7
        )
        u, v = torch.linspace(-2, 2.1, 60), torch.linspace(-0.1, 2.7, 60)
        loss = 0.5 * (u[None, :] * v[:, None] - 1) ** 2
        plane.contour(u, v, loss, levels=[0.03, 0.3, 1, 2.5, 5, 9], colors=FAINT, linewidths=0.5)
        line = torch.linspace(1 / 2.7, 2.1, 60)
        plane.plot(line, 1 / line, color=INK, linewidth=1)
        plane.annotate("all minima: uv = 1", (1.62, 1 / 1.62), (0.7, 0.15), color=INK)
        for name, path in paths.items():
            look, thin = LOOKS[name], path[:500:5]
            plane.plot(thin[:, 0], thin[:, 1], color=look.color, linestyle=look.dashes, linewidth=2)
            plane.plot(*path[-1].tolist(), color=look.color, marker="o")
            along.plot(
                range(0, 401, 5),
                [curvature(p) for p in path[:401:5]],
                color=look.color,
                linestyle=look.dashes,
                linewidth=2,
            )
            along.annotate(f"{ends[name]:.2f}", (406, ends[name]), color=look.color, va="center", annotation_clip=False)
        plane.plot(*START, color=INK, marker="o")
        plane.annotate("start", START, (-1.75, 2.15), color=INK)
        plane.set(xlabel="u", ylabel="v", xlim=(-2, 2.1), ylim=(-0.1, 2.7))
        along.set(xlabel="step", ylabel="largest eigenvalue", xlim=(0, 400), ylim=(1, 5))
        along.axhline(2, color=FAINT, linewidth=0.7, linestyle=":")
        legend(figure, [look.handle(name, linewidth=2) for name, look in LOOKS.items()])
        return figure

    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
