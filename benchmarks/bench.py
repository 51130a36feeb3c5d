"""What a step costs: time and memory of each method against plain SGD, measured side by side.

    make bench                      # the tables, half an hour and more on two cores
    make bench ARGS="--only two"    # two passes, on models whose step is mostly matrix products
    make bench ARGS="--only cheap"  # the modes below two passes, on the same models
    make bench ARGS="--only small"  # two passes, on models whose step is mostly Python; 5 to 8 minutes
    make bench ARGS="--processes 2" # quicker and noisier
    make bench ARGS="--device cuda" # also: synchronizations in a step, and capture in a CUDA graph

Time: in each round every method makes one step, in an order that rotates; its ratio is taken to the SGD step of
the same round, so that a drift of the machine cancels. Every method has a model of its own. On the host the heap is
kept from being returned to the kernel in between. Where a process finds itself (which cores, which pages) moves all its
ratios together, by more than they scatter within it: so the rounds are made in several fresh processes, and printed is
the median over all of them with a 95 % interval by bootstrap over processes and their rounds. Runs an hour apart may
still differ by more.
`gradreg.lab.cost.steps` does the measuring, for this table and for `gradreg cost`.

The modes below two passes have a table of their own, against SGD with momentum; beside each stands what it must pay,
the same passes with no method, and its overhead is the difference.

Small models have a table of their own too, where what a method adds to its passes shows. It is made on one thread and
counts that thread's processor time, which does not count what others do on the machine (on a GPU wall-clock time, since
that is where the thread waits). Beside the time stand the operations that a step dispatches beyond two passes and a
step of the optimizer (`costs.count_operations`). The first rounds, in which a method may check and measure more than
later, are not timed in any table.

Memory: the largest number of bytes held at once in the second step from a fresh model, less the same of SGD, in copies
of the parameters; `at batch 1` shows weights and gradients alone, since there the activations are small.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from models import PROBLEMS, SMALL_PROBLEMS, Problem

import gradreg
from gradreg.lab import stats
from gradreg.lab.cost import steps as costs

Step = Callable[[], object]
LEARNING_RATE = 1e-4  # small: the timed weights should stay where they are


def sgd(problem: Problem, momentum: float = 0.0) -> Step:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE, momentum=momentum)

    def step() -> None:
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()

    return step


def two_passes(problem: Problem) -> Step:
    """No method at all: forward and backward twice, one optimizer step. What any two-pass method must pay."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            problem.loss().backward()
        optimizer.step()

    return step


def by_backward(make: Callable[[torch.nn.Module], gradreg.GradientRegularizer]) -> Callable[[Problem], Step]:
    def build(problem: Problem) -> Step:
        regularizer = make(problem.model)
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE)

        def step() -> None:
            optimizer.zero_grad()
            regularizer.backward(problem.loss)
            optimizer.step()

        return step

    return build


def by_closure(problem: Problem) -> Step:
    base = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE)
    optimizer = gradreg.RegularizedOptimizer(base, gradreg.GradientRegularizer(problem.model, 0.05, 0.1))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)


def by_hand(problem: Problem) -> Step:
    """The arithmetic of F-GR alone: no random state or buffer is replayed, nothing is checked, counted or selected."""
    weights = list(problem.model.parameters())
    optimizer = torch.optim.SGD(weights, lr=LEARNING_RATE)
    displaced: list[torch.Tensor] = []

    def step() -> None:
        optimizer.zero_grad()
        problem.loss().backward()
        displaced.extend(torch.empty_like(w) for w in weights[len(displaced) :])
        with torch.no_grad():
            first: list[Any] = [w.grad for w in weights]
            true = [w.data for w in weights]
            torch.stack([torch.dot(g.view(-1), g.view(-1)) for g in first]).sum().sqrt()  # ‖g1‖, to be reported
            for w, g, room in zip(weights, first, displaced):
                torch.add(w, g, alpha=0.1, out=room)
        for w, room in zip(weights, displaced):
            w.grad, w.data = None, room

        def combine(i: int, second: torch.Tensor) -> torch.Tensor:
            g, first[i] = first[i], None
            return torch.lerp(g, second, 0.5, out=g)

        hooks = [w.register_hook(partial(combine, i)) for i, w in enumerate(weights)]
        problem.loss().backward()
        for w, hook, theta in zip(weights, hooks, true):
            hook.remove()
            w.data = theta
        optimizer.step()

    return step


def by_hand_at_once(problem: Problem) -> Step:
    """The same for small models: each operation takes all parameters, and both gradients are held until the end."""
    weights = list(problem.model.parameters())
    optimizer = torch.optim.SGD(weights, lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        problem.loss().backward()
        first: list[Any] = [w.grad for w in weights]
        true = [w.data for w in weights]
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(first)))  # ‖g1‖, to be reported
        for w, moved in zip(weights, torch._foreach_add(true, first, alpha=0.1)):
            w.grad, w.data = None, moved
        problem.loss().backward()
        torch._foreach_lerp_(first, [w.grad for w in weights], 0.5)
        for w, g, theta in zip(weights, first, true):
            w.grad, w.data = g, theta
        optimizer.step()

    return step


def by_block(problem: Problem) -> Step:
    regularizer = gradreg.GradientRegularizer(problem.model, 0.05, 0.1)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        problem.loss().backward()
        with regularizer.perturbed():
            problem.loss().backward()
        optimizer.step()

    return step


def peer_sam(problem: Problem) -> Step:
    from pytorch_optimizer import SAM

    optimizer = SAM(problem.model.parameters(), base_optimizer=torch.optim.SGD, rho=0.05, lr=LEARNING_RATE)

    def step() -> None:
        problem.loss().backward()
        optimizer.first_step(zero_grad=True)
        problem.loss().backward()
        optimizer.second_step(zero_grad=True)

    return step


# Below two passes.

RHO = 0.5
Make = Callable[[torch.nn.Module, torch.optim.Optimizer], gradreg.GradientRegularizer]


def with_momentum(make: Make) -> Callable[[Problem], Step]:
    def build(problem: Problem) -> Step:
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        regularizer = make(problem.model, optimizer)

        def step() -> None:
            optimizer.zero_grad()
            regularizer.backward(problem.loss, [problem.batch])
            optimizer.step()

        return step

    return build


def parts(*shares: tuple[float, float]) -> Callable[[Problem], Step]:
    """Passes over parts of the batch, from one share of its rows to another, and one optimizer step."""

    def build(problem: Problem) -> Step:
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        x, y = problem.batch
        bounds = [(round(a * len(x)), round(b * len(x))) for a, b in shares]

        def step() -> None:
            optimizer.zero_grad()
            for a, b in bounds:
                (problem.loss((x[a:b], y[a:b])) * ((b - a) / len(x))).backward()
            optimizer.step()

        return step

    return build


def norm_layers(model: torch.nn.Module) -> tuple[type[torch.nn.Module], ...]:
    kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    return tuple(kind for kind in kinds if any(isinstance(m, kind) for m in model.modules()))


SPLIT, TENTH = gradreg.Split(), gradreg.Fraction(0.1)
CHEAP: dict[str, tuple[Callable[[Problem], Step], str]] = {
    "SGD, momentum": (lambda problem: sgd(problem, 0.9), ""),
    "γ = 0": (with_momentum(lambda m, o: gradreg.GradientRegularizer(m, 0, RHO)), "SGD, momentum"),
    "MSAM, gradreg.msam": (with_momentum(lambda m, o: gradreg.msam(m, o, RHO)), "SGD, momentum"),
    "Previous": (
        with_momentum(lambda m, o: gradreg.GradientRegularizer(m, RHO, RHO, ascent=gradreg.Previous())),
        "SGD, momentum",
    ),
    "two halves, no method": (parts((0, 0.5), (0.5, 1)), ""),
    "Split, momentum": (
        with_momentum(
            lambda m, o: gradreg.GradientRegularizer(m, RHO / 2, RHO, ascent=gradreg.Momentum(o), batch=SPLIT)
        ),
        "two halves, no method",
    ),
    "tenth twice and rest, no method": (parts((0, 0.1), (0, 0.1), (0.1, 1)), ""),
    "Fraction(0.1)": (
        with_momentum(lambda m, o: gradreg.GradientRegularizer(m, 0.05, 0.2, batch=TENTH)),
        "tenth twice and rest, no method",
    ),
    "twentieth twice and rest, no method": (parts((0, 0.05), (0, 0.05), (0.05, 1)), ""),
    "Fraction(0.05), ahead": (
        with_momentum(
            lambda m, o: gradreg.GradientRegularizer(
                m, 0.02, 0.3, batch=gradreg.Fraction(0.05), at=gradreg.Ahead(gradreg.Momentum(o), RHO)
            )
        ),
        "twentieth twice and rest, no method",
    ),
    "SAM of norm layers": (with_momentum(lambda m, o: gradreg.sam(m, RHO, include=norm_layers(m))), ""),
    "F-GR": (with_momentum(lambda m, o: gradreg.GradientRegularizer(m, 0.05, 0.1)), ""),
}
"""Each with the row that it is compared with: the same passes and nothing else."""


TWO_PASSES, PEER = "two passes, no method", "SAM, pytorch_optimizer"
METHODS: dict[str, Callable[[Problem], Step]] = {
    "SGD": sgd,
    TWO_PASSES: two_passes,
    "F-GR by hand, nothing else": by_hand,
    "F-GR, backward(loss_fn)": by_backward(lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1)),
    "F-GR, step(closure)": by_closure,
    "F-GR, γ = ε": by_backward(lambda model: gradreg.GradientRegularizer(model, 0.1, 0.1)),
    "SAM, gradreg.sam": by_backward(lambda model: gradreg.sam(model, rho=0.05)),
    PEER: peer_sam,
    "DB, scheme exact": by_backward(lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1, scheme="exact")),
}
SMALL: dict[str, Callable[[Problem], Step]] = {
    "SGD": sgd,
    TWO_PASSES: two_passes,
    "F-GR by hand, at once": by_hand_at_once,
    "F-GR, backward(loss_fn)": METHODS["F-GR, backward(loss_fn)"],
    "F-GR, step(closure)": by_closure,
    "F-GR, perturbed()": by_block,
    "SAM, gradreg.sam": METHODS["SAM, gradreg.sam"],
    PEER: peer_sam,
}
"""For the small models."""

STEPS = {**METHODS, **SMALL, **{method: make for method, (make, _) in CHEAP.items()}}


def build(name: str, method: str, device: torch.device, **size: int) -> tuple[Problem, Step]:
    torch.manual_seed(0)
    problem = {**PROBLEMS, **SMALL_PROBLEMS}[name](device, **size)
    return problem, STEPS[method](problem)


def times_here(name: str, methods: list[str], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each method in each round, in this process."""
    costs.keep_heap()
    if name in SMALL_PROBLEMS:
        torch.set_num_threads(1)
    steps = {method: build(name, method, device)[1] for method in methods}
    return costs.paired_seconds(steps, rounds, costs.clock_for(device, torch.get_num_threads()))


def times(name: str, methods: list[str], device: torch.device, rounds: int, processes: int) -> dict[str, list[float]]:
    """The same in fresh processes, one after the other."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(times_here, [(name, methods, device, rounds)] * processes, chunksize=1)
    return {method: [seconds for one in found for seconds in one[method]] for method in methods}


def peak_bytes(name: str, method: str, device: torch.device, **size: int) -> int:
    return costs.peak_bytes(lambda: build(name, method, device, **size)[1], device)


def copies(name: str, methods: list[str], device: torch.device, **size: int) -> dict[str, float]:
    """Peak memory beyond that of the first method, in copies of the parameters."""
    problem, _ = build(name, methods[0], device)
    parameters = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    base = peak_bytes(name, methods[0], device, **size)
    return {method: (peak_bytes(name, method, device, **size) - base) / parameters for method in methods}


def check_cuda(device: torch.device) -> None:
    """A step asks the device nothing, and can be captured in a graph."""
    for name in PROBLEMS:
        for method in ("F-GR, backward(loss_fn)", "SAM, gradreg.sam"):
            _, step = build(name, method, device)
            for _ in range(3):
                step()
            torch.cuda.synchronize(device)
            verdicts = []
            for check in (_without_synchronization, _captured):
                try:
                    check(step)
                    verdicts.append("yes")
                except RuntimeError as error:
                    verdicts.append(f"no ({str(error).splitlines()[0]})")
            print(f"{name}, {method}: no synchronization {verdicts[0]}, captured in a CUDA graph {verdicts[1]}")


def _without_synchronization(step: Step) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(step: Step) -> None:
    costs.captured(step)()
    torch.cuda.synchronize()


def import_milliseconds(repeats: int = 7) -> tuple[float, float]:
    """Fresh interpreters, bytecode made: `import torch`, and what `import gradreg` adds to it."""
    import subprocess

    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import gradreg; "
        "c = time.perf_counter(); print(b - a, c - b)"
    )
    python = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = [subprocess.run(python, capture_output=True, text=True, env=environment) for _ in range(1 + repeats)]
    pairs = [tuple(map(float, run.stdout.split())) for run in runs[1:]]
    return tuple(1e3 * statistics.median(column) for column in zip(*pairs))  # type: ignore[return-value]


def show(name: str, methods: list[str], device: torch.device, rounds: int, processes: int) -> None:
    """A table; the first method is the one that the others are relative to."""
    base, *_ = methods
    seconds = times(name, methods, device, rounds, processes)
    rows = 1 if base == "SGD" and name != "ResNet-18" else 2
    full, lean = copies(name, methods, device), copies(name, methods, device, batch=rows)
    print(f"\n{name}: {base} {1e3 * statistics.median(seconds[base]):.1f} ms a step")
    print(f"  {'':36}{'time':>20}   memory beyond {base}, in copies of the parameters")
    for method in methods:
        print(
            f"  {method:36}{_ratio(method, base, seconds, processes):>20}   {lean[method]:5.2f} at batch {rows}, "
            f"{full[method]:5.2f} at full batch{_overhead(method, base, seconds, processes)}"
        )


def show_small(name: str, methods: list[str], device: torch.device, rounds: int, processes: int) -> None:
    """A table of a small model."""
    base, *_ = methods
    seconds = times(name, methods, device, rounds, processes)
    held = copies(name, methods, device)
    dispatched = {method: costs.count_operations(build(name, method, device)[1]) for method in methods}
    parameters = len(list(build(name, base, device)[0].model.parameters()))
    print(f"\n{name}, {parameters} parameters: {base} {1e3 * statistics.median(seconds[base]):.2f} ms a step")
    print(f"  {'':36}{'time':>20}   operations beyond two passes   memory beyond {base}, in copies of the parameters")
    for method in methods:
        beyond = "" if method == base else f"{dispatched[method] - dispatched[TWO_PASSES]}"
        print(f"  {method:36}{_ratio(method, base, seconds, processes):>20}   {beyond:>28}   {held[method]:5.2f}")


def _ratio(method: str, base: str, seconds: dict[str, list[float]], processes: int) -> str:
    ratio = stats.median_ratio(seconds[method], seconds[base], processes)
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _overhead(method: str, base: str, seconds: dict[str, list[float]], processes: int) -> str:
    """What a mode takes beyond its passes, in percent of the step of the first method."""
    passes = CHEAP[method][1] if method in CHEAP else ""
    if not passes:
        return ""
    shares = [100 * (a - b) / c for a, b, c in zip(seconds[method], seconds[passes], seconds[base])]
    middle = stats.median_ratio(shares, [1.0] * len(shares), processes)
    return f"   overhead {middle.median:+.1f} % [{middle.low:+.1f}, {middle.high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a step, relative to plain SGD.")
    parser.add_argument("--processes", type=int, default=6, help="fresh processes for each model, one after the other")
    parser.add_argument("--rounds", type=int, help="paired rounds in each of them (7; 120 of a small model)")
    everything = [*PROBLEMS, *SMALL_PROBLEMS]
    parser.add_argument("--models", nargs="*", default=everything, choices=everything)
    parser.add_argument("--only", choices=["two", "cheap", "small"], help="one kind of table")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    device, only = torch.device(arguments.device), arguments.only
    missing = set()
    with contextlib.suppress(ImportError):
        import pytorch_optimizer  # noqa: F401
    if "pytorch_optimizer" not in sys.modules:
        missing = {PEER}
        print("pytorch_optimizer is not installed, its row is left out (make bench installs it)")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rounds, processes = arguments.rounds or 7, arguments.processes
    large = [name for name in arguments.models if name in PROBLEMS and only != "small"]
    small = [name for name in arguments.models if name in SMALL_PROBLEMS and only in (None, "small")]
    print(f"torch {torch.__version__}, ratios to SGD: median [95 % interval]")
    if large:
        print(f"{where}, {rounds} rounds in each of {processes} processes")
    for name in large:
        if only != "cheap":
            show(name, [m for m in METHODS if m not in missing], device, rounds, processes)
        if only != "two":
            has_norms = bool(norm_layers(build(name, "SGD, momentum", device)[0].model))
            show(name, [m for m in CHEAP if has_norms or "norm layers" not in m], device, rounds, processes)
    rounds = arguments.rounds or 120
    if small:
        clock = "processor time" if costs.is_processor_time(device, 1) else "wall-clock time"
        print(f"\nsmall models: 1 thread, {clock}, {rounds} rounds in each of {processes} processes")
    for name in small:
        show_small(name, [m for m in SMALL if m not in missing], device, rounds, processes)
    torch_time, ours = import_milliseconds()
    print(f"\nimport torch {torch_time:.0f} ms, import gradreg adds {ours:.0f} ms (median of 7 fresh interpreters)")
    if device.type == "cuda":
        check_cuda(device)


if __name__ == "__main__":
    main()
