"""Several processes on one run: torchrun starts them, DistributedDataParallel adds up their gradients."""

import gc
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from convmixer.engine import find_device
from train.watch import end_workers


@dataclass(frozen=True)
class World:
    """This process among all. ``main`` is the one that writes files and speaks."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """``values`` added up over all processes, a new tensor; each process gets the same."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over all processes. Goes through the CPU, so that no GPU has to wait."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()


MEETING = 300.0  # seconds that the processes of a start wait for each other, as in PyTorch's stores


def own_name(store: dist.Store, rank: int, size: int) -> str:
    """A name for this start of the processes, the same for all of them and new each time.

    torchrun keeps one store over all its restarts. In it are the addresses of processes that have died, under the names
    that the new ones would use: some would call the dead. So each process writes a word made just now, and the main one
    answers all words it finds, those of the dead too, until each living process has said that it got its answer.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"convmixer/word/{rank}", word)
        name = store.get(f"convmixer/answer/{word}").decode()  # waits for it
        store.set(f"convmixer/heard/{name}/{rank}", "")
        return name
    missing, start = set(range(1, size)), time.monotonic()
    while missing:
        for other in sorted(missing):
            if store.check([f"convmixer/heard/{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"convmixer/word/{other}"]):
                store.set(f"convmixer/answer/{store.get(f'convmixer/word/{other}').decode()}", word)
        if time.monotonic() - start > MEETING:
            raise RuntimeError(f"processes {sorted(missing)} did not come")
        time.sleep(0.02)
    return word


@contextmanager
def join(device: str | None) -> Iterator[World]:
    """This process's place in the run that torchrun started; one process alone without torchrun.

    Each process of a machine takes the GPU of its local rank; on the CPU they talk through gloo. Raises DeviceError of
    `find_device`.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        yield World(torch.device(find_device(device)))
        return
    local = int(os.environ["LOCAL_RANK"])
    if device is None and torch.cuda.is_available() and torch.cuda.device_count() > local:
        device = f"cuda:{local}"
    chosen = torch.device(find_device(device if device != "cuda" else f"cuda:{local}"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(own_name(store, rank, size), store)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(chosen, dist.get_rank(), size)
        dist.barrier()  # nobody leaves while another still writes: torchrun would end it
    finally:
        end_workers()  # or a loader that is collected waits for each of them, five seconds long
        gc.collect()  # DistributedDataParallel holds the group's threads, which must end before the interpreter does
        dist.destroy_process_group()


def average_statistics(network: nn.Module, world: World) -> None:
    """Sets the running statistics of batch norm to their mean over all processes, in place."""
    if world.size == 1:
        return
    buffers = [b for m in network.modules() if isinstance(m, nn.BatchNorm2d) for b in (m.running_mean, m.running_var)]
    flat = world.total(torch.cat(buffers)) / world.size
    for buffer, mean in zip(buffers, flat.split([len(b) for b in buffers]), strict=True):
        buffer.copy_(mean)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the pictures of all processes, on any device: torch.nn.SyncBatchNorm runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        # Two sums, one after the other: a variance from the mean of the squares would lose digits.
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        count, total = all_reduce(torch.cat([count, x32.sum((0, 2, 3))])).split([1, x.shape[1]])
        mean = total / count
        centred = x32 - mean.view(1, -1, 1, 1)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def use_sync_norm(network: nn.Module) -> None:
    """Switches every batch norm of ``network`` to SyncBatchNorm2d, in place; the parameters stay."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
