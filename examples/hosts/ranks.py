"""Two processes, with DistributedDataParallel and with FSDP2: nothing changes, and the curve is that of one process.

python examples/hosts/ranks.py                                  # starts two processes by itself
torchrun --nproc-per-node 2 examples/hosts/ranks.py             # the same
"""

# %% The task of the other hosts: seven micro-batches of 16 in an epoch, in windows of 3, 3 and 1.
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradreg

ACCUMULATION, EPOCHS, CLIP, LEARNING_RATE = 3, 4, 1.0, 0.5
WRAPPERS = {"one process": lambda model: model, "DDP": DistributedDataParallel, "FSDP2": fully_shard}


def train(host, rank=0, num_ranks=1):
    """The loss of each window, over all ranks."""
    torch.manual_seed(0)
    x = torch.randn(112, 10)
    labels = (x @ torch.randn(10, 3)).argmax(1)
    model = WRAPPERS[host](nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 3)))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    regularizer = gradreg.GradientRegularizer(model, gradreg.warmup(0.5, 4), 0.5)  # the wrapped model
    micro_batches = [(a[rank::num_ranks], b[rank::num_ranks]) for a, b in zip(x.split(16), labels.split(16))]
    curve = []
    for _ in range(EPOCHS):
        for window in (micro_batches[i : i + ACCUMULATION] for i in range(0, len(micro_batches), ACCUMULATION)):
            optimizer.zero_grad()
            share = 1 / len(window)
            loss = regularizer.backward(lambda b, share=share: share * F.cross_entropy(model(b[0]), b[1]), window)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            curve.append(loss)
    losses = torch.stack(curve)
    if num_ranks > 1:
        dist.all_reduce(losses)
    return losses / num_ranks


# %% Every rank trains on its share of each micro-batch.
def main(rank, folder=None):
    torch.set_num_threads(1)
    store = {"store": dist.FileStore(f"{folder}/store", 2)} if folder else {}  # torchrun brings its own
    dist.init_process_group("gloo", rank=rank, world_size=2, **store)
    curves = {host: train(host, rank, num_ranks=2) for host in ("DDP", "FSDP2")}
    if rank == 0:
        alone = train("one process")
        for losses in curves.values():
            torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-6)
        print("window  one process    DDP  FSDP2")
        for k, row in enumerate(zip(alone, *curves.values())):
            print(f"{k:6d}        {row[0]:.3f}  {row[1]:.3f}  {row[2]:.3f}", flush=True)
    dist.barrier()
    os._exit(0)  # threads of gloo may outlive Python's end, and abort it


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(int(os.environ["RANK"]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(main, (folder,), nprocs=2)
