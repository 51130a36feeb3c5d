"""Processes on one machine, and what they train: the workers behind tests/training/test_ranks.py and others."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradreg

GAMMA, EPSILON = 0.05, 0.1


def on_ranks(num: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(rank, *args)` returned on each of `num` ranks.

    A rank that waits for another in vain fails after twenty minutes, and ends all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{rank}.pt" for rank in range(num)]
        try:
            mp.spawn(_run, (num, folder, work, args), nprocs=num)
        except mp.ProcessExitedException:
            if not all(map(os.path.exists, files)):
                raise
            # Killed by a signal after all was done: threads of gloo whose peers have left already.
        return [torch.load(file, weights_only=False) for file in files]


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`cache`, which keeps a failure too: a hung group is waited for once, and not by every test."""

    @cache
    def made(*args: Any) -> tuple[Any, BaseException | None]:
        try:
            return make(*args), None
        except Exception as error:
            return None, error

    @wraps(make)
    def kept(*args: Any) -> Any:
        result, error = made(*args)
        if error is not None:
            raise RuntimeError(f"the processes failed: {error}") from error
        return result

    return kept


def on_two_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    return on_ranks(2, work, *args)


def of_file(rank: int, file: str, name: str, *args: Any) -> Any:
    """`name(rank, *args)` of a file, for a test whose host has brought a package `tests` that hides ours."""
    spec = importlib.util.spec_from_file_location("of_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)(rank, *args)


def _run(rank: int, num: int, folder: str, work: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num, timeout=timedelta(minutes=20))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.save(work(rank, *args), f"{folder}/{rank}.part")
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive Python's end, and abort it


def halved(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], grad_scale: Any = 1.0) -> tuple[Any, Any]:
    """An ascent of the user's own, whose `repr` differs between processes."""
    return grads, 0.5 / grad_scale


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def wrapped(kind: str, frozen: bool = False) -> nn.Module:
    model = make_model()
    if frozen:
        model[0].weight.requires_grad_(False)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        return fully_shard(model)
    if kind == "one process":
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp, bucket views")


def train(model: nn.Module, rows: tuple[torch.Tensor, torch.Tensor], door: str, **options: Any) -> dict[str, Any]:
    """Three steps; the weights and the diagnostics."""
    x, y = rows
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if options.get("ascent") == "momentum":
        options["ascent"] = gradreg.Momentum(base)
    if options.pop("ahead", False):
        options["at"] = gradreg.Ahead(gradreg.Momentum(base), rho=0.2)
    regularizer = gradreg.GradientRegularizer(model, options.pop("gamma", GAMMA), EPSILON, **options)
    wrapper = gradreg.RegularizedOptimizer(base, regularizer)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    def closure() -> torch.Tensor:
        base.zero_grad()
        value = loss()
        value.backward()
        return value

    for step in range(3):
        if step == 2:
            regularizer.diagnostics()  # so that the last step is measured, and the one before need not be
        base.zero_grad()
        if door == "backward":
            regularizer.backward(loss)
        elif door == "batch":
            regularizer.backward(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), [(x, y)])
        elif door == "window":
            halves = list(zip(x.chunk(2), y.chunk(2)))
            regularizer.backward(lambda batch: F.cross_entropy(model(batch[0]), batch[1]) / 2, halves)
        elif door == "perturbed":
            if "ascent" not in options:  # else the block is the whole step
                loss().backward()
            with regularizer.perturbed():
                loss().backward()
        if door == "closure":
            wrapper.step(closure)
        else:
            base.step()
    measured = {key: float(value) for key, value in regularizer.diagnostics().items() if key != "realized"}
    return {"weights": whole(model), "diagnostics": measured}


def whole(model: nn.Module) -> list[torch.Tensor]:
    """The weights, gathered."""
    return [gathered(p).detach().clone() for p in model.parameters()]


def gathered(t: Any) -> torch.Tensor:
    """All of a tensor, whether sharded or not."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def both(rank: int, kind: str, cases: Sequence[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """For each case: two ranks with half of the rows each, and one process with all of them."""
    x, y = make_data()
    pairs = []
    for case in cases:
        options = dict(case)
        frozen = options.pop("frozen", False)
        together = train(wrapped(kind, frozen), (x[rank::2], y[rank::2]), **options)
        pairs.append((together, train(wrapped("one process", frozen), (x, y), **options)))
    return pairs


def each(rank: int, work: Callable[..., Any], cases: Sequence[Sequence[Any]]) -> list[Any]:
    """Many cases in one pair of processes."""
    return [work(rank, *case) for case in cases]


# Local ascent.


def local_gradient(rank: int, gamma: float, epsilon: float, ascent: str, windows: int) -> dict[str, Any]:
    """ĝ by the engine, by hand, and the number of buckets that were averaged."""
    x, y = make_data()
    x, y = x[rank::2], y[rank::2]
    model = wrapped("ddp")
    averaged = []

    def count(state, bucket):  # without annotations: DDP would compare their text with types
        averaged.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, count)
    regularizer = gradreg.GradientRegularizer(model, gamma, epsilon, ascent=ascent, ascent_sync="local")
    batches = list(zip(x.chunk(windows), y.chunk(windows)))
    regularizer.backward(lambda batch: F.cross_entropy(model(batch[0]), batch[1]) / windows, batches)
    return {
        "engine": [p.grad.clone() for p in model.parameters()],
        "by hand": _local_by_hand(x, y, gamma, epsilon, ascent),
        "averaged": len(averaged),
        "buckets": len(set(averaged)),
    }


def _local_by_hand(x: torch.Tensor, y: torch.Tensor, gamma: float, epsilon: float, ascent: str) -> list[torch.Tensor]:
    model = make_model()
    parameters = list(model.parameters())
    first = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    length = torch.cat([g.flatten() for g in first]).norm() if ascent == "normalized" else 1.0
    with torch.no_grad():
        for p, g in zip(parameters, first):
            p += epsilon * g / length
    second = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
    combined = [g1 + gamma / epsilon * (g2 - g1) for g1, g2 in zip(first, second)]
    for g in combined:
        dist.all_reduce(g)
        g /= 2
    return combined


def local_modes(rank: int, batch: Any, ascent: Any) -> dict[str, Any]:
    """ĝ with a local ascent, and the mean over ranks of what each makes of its own rows by itself."""
    x, y = make_data()
    rows = [(x[rank::2], y[rank::2])]

    def gradients(model: nn.Module, **options: Any) -> list[torch.Tensor]:
        regularizer = gradreg.GradientRegularizer(model, GAMMA, EPSILON, batch=batch, ascent=ascent, **options)
        for _ in range(2):
            model.zero_grad()
            regularizer.backward(lambda b: F.cross_entropy(model(b[0]), b[1]), rows)
        return [p.grad.clone() for p in model.parameters()]

    by_hand = gradients(make_model())
    for g in by_hand:
        dist.all_reduce(g)
        g /= 2
    return {"engine": gradients(wrapped("ddp"), ascent_sync="local"), "by hand": by_hand}


# Low precision.


def mixed(rank: int, gamma: float) -> dict[str, Any]:
    """ĝ with FSDP2 that computes in bfloat16, by the engine and by hand on the same shards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x, y = make_data()
    x, y = x[rank::2].float(), y[rank::2]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(make_model().float(), mp_policy=policy)
    parameters = list(model.parameters())

    def gradients() -> list[Any]:
        model.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        return [p.grad for p in parameters]

    first = gradients()
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, first):
            p += EPSILON * g
    second = gradients()
    with torch.no_grad():
        for p, old in zip(parameters, before):
            p.copy_(old)
    model.zero_grad()
    gradreg.GradientRegularizer(model, gamma, EPSILON).backward(lambda: F.cross_entropy(model(x).float(), y))
    return {
        "engine": [_local(p.grad).clone() for p in parameters],
        "by hand": [_local(g1 + gamma / EPSILON * (g2 - g1)) for g1, g2 in zip(first, second)],
    }


# Faults.


def faulty(rank: int, kind: str, sync: str, gamma: float) -> dict[str, Any]:
    """Rank 1 sees a NaN: the gradients after the door, and whether the weights are where they were."""
    x, y = make_data()
    x, y = x[rank::2], y[rank::2]
    if rank == 1:
        x = x * float("nan")
    model = wrapped(kind)
    before = [p.detach().clone() for p in model.parameters()]
    regularizer = gradreg.GradientRegularizer(model, gamma, EPSILON, ascent_sync=sync)
    regularizer.backward(lambda: F.cross_entropy(model(x), y))
    return {
        "finite": bool(all(torch.as_tensor(_local(p.grad).isfinite().all()) for p in model.parameters())),
        "kept": all(torch.equal(_local(a), _local(b)) for a, b in zip(before, model.parameters())),
    }


def abandoned(rank: int, kind: str) -> dict[str, Any]:
    """Rank 1 fails in its second pass, and rank 0 waits for it until the time-out of their group."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    group = dist.new_group(timeout=timedelta(seconds=15))
    x, y = make_data()
    x, y = x[rank::2], y[rank::2]
    if kind == "fsdp":
        model = fully_shard(make_model(), mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        model = DistributedDataParallel(make_model(), process_group=group)
    before = [_local(p).detach().clone() for p in model.parameters()]
    passes = []

    def loss() -> torch.Tensor:
        passes.append(1)
        if rank == 1 and len(passes) == 2:
            raise ArithmeticError("of rank 1")
        return F.cross_entropy(model(x), y)

    raised = ""
    try:
        gradreg.GradientRegularizer(model, GAMMA, EPSILON).backward(loss)
    except (ArithmeticError, RuntimeError) as error:
        raised = type(error).__name__
    dist.barrier()
    return {
        "raised": raised,
        "kept": all(torch.equal(old, _local(p)) for old, p in zip(before, model.parameters())),
        "gradients": sum(p.grad is not None for p in model.parameters()),
    }


def _local(t: Any) -> torch.Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def disagree(rank: int, kind: str) -> str:
    """What a rank is told when the ranks were built differently."""
    x, y = make_data()
    model = wrapped(kind)
    regularizer = gradreg.GradientRegularizer(model, 0.1 + rank, EPSILON)
    told = []
    for _ in range(2):  # and they stay refused
        try:
            regularizer.backward(lambda: F.cross_entropy(model(x), y))
        except ValueError as error:
            told.append(str(error))
    return "\n".join(told)


# Checkpoints.


def _trainer(kind: str) -> tuple[nn.Module, gradreg.RegularizedOptimizer]:
    model = wrapped(kind)
    base = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, gradreg.RegularizedOptimizer(
        base, gradreg.GradientRegularizer(model, gradreg.warmup(GAMMA, 4), EPSILON)
    )


def _steps(model: nn.Module, optimizer: gradreg.RegularizedOptimizer, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    for _ in range(2):
        optimizer.regularizer.backward(lambda: F.cross_entropy(model(rows[0]), rows[1]))
        optimizer.step()
        optimizer.zero_grad()


def _state(model: nn.Module, optimizer: gradreg.RegularizedOptimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "regularizer": optimizer.regularizer.state_dict()}


def resumed(kind: str, rows: tuple[torch.Tensor, torch.Tensor], folder: str) -> list[torch.Tensor]:
    """The weights after two more steps from a checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = _trainer(kind)
    state = _state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    optimizer.regularizer.load_state_dict(state["regularizer"])
    _steps(model, optimizer, rows)
    return whole(model)


def checkpointed(rank: int, kind: str, folder: str) -> dict[str, Any]:
    """Two steps, a distributed checkpoint, and two more steps, with and without loading it."""
    import torch.distributed.checkpoint as dcp

    x, y = make_data()
    rows = x[rank::2], y[rank::2]
    model, optimizer = _trainer(kind)
    _steps(model, optimizer, rows)
    dcp.save(_state(model, optimizer), checkpoint_id=folder)
    _steps(model, optimizer, rows)
    return {"straight": whole(model), "resumed": resumed(kind, rows, folder)}


# Trainers of transformers and TRL.


def as_torchrun(rank: int, port: int) -> None:
    """What torchrun would tell a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class ShardedByAccelerate:
    """Mixed into a trainer: the FSDP2 of accelerate, which has it on accelerators only, here on the host."""

    def create_accelerator_and_postprocess(self) -> None:
        from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True


def sharding(layer: str) -> dict[str, Any]:
    """The arguments of a trainer that shard a model by its layers."""
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layer}}
