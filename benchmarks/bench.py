"""What a step costs: time and memory of each method against plain SGD, measured side by side.

    make bench                      # the table, about 6 minutes on two cores
    make bench ARGS="--rounds 5"    # quicker and noisier
    make bench ARGS="--device cuda" # also: synchronizations in a step, and capture in a CUDA graph

Time: in each round every method makes one step, in an order that rotates; its ratio is taken to the SGD step of
the same round, so that a drift of the machine cancels. Printed is the median over rounds with a 95 % interval by
bootstrap. Every method has a model of its own. On the host the heap is kept from being returned to the kernel in
between. `gradreg.lab.cost.steps` does the measuring, for this table and for `gradreg cost`.

Memory: the largest number of bytes held at once in the second step from a fresh model, less the same of SGD, in copies
of the parameters; `at batch 1` shows weights and gradients alone, since there the activations are small.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable

import torch
from models import PROBLEMS, Problem

import gradreg
from gradreg.lab.cost import steps as costs

Step = Callable[[], object]
LEARNING_RATE = 1e-4  # small: the timed weights should stay where they are


def sgd(problem: Problem) -> Step:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=LEARNING_RATE)

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


def peer_sam(problem: Problem) -> Step:
    from pytorch_optimizer import SAM

    optimizer = SAM(problem.model.parameters(), base_optimizer=torch.optim.SGD, rho=0.05, lr=LEARNING_RATE)

    def step() -> None:
        problem.loss().backward()
        optimizer.first_step(zero_grad=True)
        problem.loss().backward()
        optimizer.second_step(zero_grad=True)

    return step


METHODS: dict[str, Callable[[Problem], Step]] = {
    "SGD": sgd,
    "two passes, no method": two_passes,
    "F-GR, backward(loss_fn)": by_backward(lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1)),
    "F-GR, step(closure)": by_closure,
    "F-GR, γ = ε": by_backward(lambda model: gradreg.GradientRegularizer(model, 0.1, 0.1)),
    "SAM, gradreg.sam": by_backward(lambda model: gradreg.sam(model, rho=0.05)),
    "SAM, pytorch_optimizer": peer_sam,
    "DB, scheme exact": by_backward(lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1, scheme="exact")),
}


def build(name: str, method: str, device: torch.device, **size: int) -> tuple[Problem, Step]:
    torch.manual_seed(0)
    problem = PROBLEMS[name](device, **size)
    return problem, METHODS[method](problem)


def times(name: str, methods: list[str], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each method in each round."""
    steps = {method: build(name, method, device)[1] for method in methods}
    return costs.paired_seconds(steps, rounds, costs.clock_for(device, torch.get_num_threads()))


def peak_bytes(name: str, method: str, device: torch.device, **size: int) -> int:
    return costs.peak_bytes(lambda: build(name, method, device, **size)[1], device)


def copies(name: str, methods: list[str], device: torch.device, **size: int) -> dict[str, float]:
    """Peak memory beyond SGD's, in copies of the parameters."""
    problem, _ = build(name, "SGD", device)
    parameters = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    base = peak_bytes(name, "SGD", device, **size)
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
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()


def import_milliseconds(repeats: int = 7) -> tuple[float, float]:
    """Fresh interpreters: `import torch`, and what `import gradreg` adds to it."""
    import subprocess

    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import gradreg; "
        "c = time.perf_counter(); print(b - a, c - b)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(repeats)]
    pairs = [tuple(map(float, run.stdout.split())) for run in runs]
    return tuple(1e3 * statistics.median(column) for column in zip(*pairs))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a step, relative to plain SGD.")
    parser.add_argument("--rounds", type=int, default=41, help="paired rounds for each model")
    parser.add_argument("--models", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    costs.keep_heap()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    device = torch.device(arguments.device)
    methods = list(METHODS)
    with contextlib.suppress(ImportError):
        import pytorch_optimizer  # noqa: F401
    if "pytorch_optimizer" not in sys.modules:
        methods.remove("SAM, pytorch_optimizer")
        print("pytorch_optimizer is not installed, its row is left out (make bench installs it)")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {where}, {arguments.rounds} rounds; ratios to SGD: median [95 % interval]")
    for name in arguments.models:
        seconds = times(name, methods, device, arguments.rounds)
        full = copies(name, methods, device)
        lean = copies(name, methods, device, batch=1 if name != "ResNet-18" else 2)
        print(f"\n{name}: SGD {1e3 * statistics.median(seconds['SGD']):.1f} ms a step")
        print(f"  {'':26}{'time':>20}   memory beyond SGD, in copies of the parameters")
        for method in methods:
            ratio = costs.median_ratio(seconds[method], seconds["SGD"])
            shown = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            print(f"  {method:26}{shown:>20}   {lean[method]:5.2f} at batch 1, {full[method]:5.2f} at full batch")
    torch_time, ours = import_milliseconds()
    print(f"\nimport torch {torch_time:.0f} ms, import gradreg adds {ours:.0f} ms (median of 7 fresh interpreters)")
    if device.type == "cuda":
        check_cuda(device)


if __name__ == "__main__":
    main()
