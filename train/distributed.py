"""Several processes on one run: torchrun starts them, DistributedDataParallel adds up their gradients."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from convmixer.classifier import choose_device


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


@contextmanager
def join(device: str | None) -> Iterator[World]:
    """This process's place in the run that torchrun started; one process alone without torchrun.

    Each process of a machine takes the GPU of its local rank; on the CPU they talk through gloo. Raises DeviceError of
    `choose_device`.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        yield World(choose_device(device))
        return
    local = int(os.environ["LOCAL_RANK"])
    if device is None and torch.cuda.is_available() and torch.cuda.device_count() > local:
        device = f"cuda:{local}"
    chosen = choose_device(device if device != "cuda" else f"cuda:{local}")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(chosen, dist.get_rank(), size)
        dist.barrier()  # nobody leaves while another still writes: torchrun would end it
    finally:
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
