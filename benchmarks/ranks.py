"""What a step costs on two processes: F-GR against the plain step of the same wrapper, DDP or FSDP2.

    make bench-ranks                      # two gloo processes of one thread each

In each round every method makes one step, in an order that rotates, all ranks together; its ratio is taken to the plain
step of the same round. Printed is the median over rounds with a 95 % interval by bootstrap.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench import Step, by_backward, sgd, two_passes
from models import PROBLEMS, Problem
from torch.nn.parallel import DistributedDataParallel

import gradreg
from gradreg.lab.cost.steps import keep_heap
from gradreg.lab.stats import median_ratio


def wrap(problem: Problem, kind: str) -> Problem:
    if kind == "DDP":
        return replace(problem, model=DistributedDataParallel(problem.model))
    from torch.distributed.fsdp import fully_shard

    fully_shard(problem.model)
    return problem


def regularized(sync: str) -> Callable[[Problem], Step]:
    return by_backward(lambda model: gradreg.GradientRegularizer(model, 0.05, 0.1, ascent_sync=sync))


METHODS = {
    ("DDP", "SGD"): sgd,
    ("DDP", "two passes, no method"): two_passes,
    ("DDP", "F-GR"): regularized("global"),
    ("DDP", "F-GR, local ascent"): regularized("local"),
    ("FSDP2", "SGD"): sgd,
    ("FSDP2", "two passes, no method"): two_passes,
    ("FSDP2", "F-GR"): regularized("global"),
}


def measure(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    keep_heap()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for name in PROBLEMS:
        steps = {}
        for kind, method in METHODS:
            torch.manual_seed(0)
            steps[kind, method] = METHODS[kind, method](wrap(PROBLEMS[name](torch.device("cpu")), kind))
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        keys = list(steps)
        for k in range(rounds + 3):
            for key in keys[k % len(keys) :] + keys[: k % len(keys)]:
                dist.barrier()
                start = time.perf_counter()
                steps[key]()
                dist.barrier()
                if k >= 3:
                    seconds[key].append(time.perf_counter() - start)
        if rank == 0:
            print(f"\n{name}", flush=True)
            for kind, method in steps:
                ratio = median_ratio(seconds[kind, method], seconds[kind, "SGD"])
                print(f"  {kind:6}{method:22}{ratio.median:5.2f} [{ratio.low:.2f}, {ratio.high:.2f}]", flush=True)
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive Python's end, and abort it


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of a step on two processes, relative to the plain step.")
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, 2 gloo processes of 1 thread, {rounds} rounds; ratios to SGD: median [95 %]")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, rounds), nprocs=2)


if __name__ == "__main__":
    main()
