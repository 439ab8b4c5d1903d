"""How the network lies in memory while it trains, and whether it is compiled: by kernel size and device."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convmixer.engine import Machine, gpu_kernels_run, layout_for, look
from train.distributed import World, use_sync_norm
from train.loop import autocast
from train.recipe import Recipe
from train.state import TrainingState, new_state

FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
    "channel_major": torch.contiguous_format,  # of the pictures and weights; see train/speed/channel_major.py
    "channel_major_fused": torch.contiguous_format,  # on request only: it has not run on a GPU yet, docs/gpu.md
}
MEASURED = ("channels_last", "contiguous")  # where it is not known which is faster
KERNELS_WIN = 7  # the kernel size from which our kernels train faster than channels_last compiled: docs/gpu.md
ROUNDS = 3
PICTURES = 32  # enough to tell the formats apart, and little beside a real batch

Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Layout:
    memory_format: str  # a name in FORMATS
    compiled: bool  # by torch.compile

    def __str__(self) -> str:
        return f"{self.memory_format}, {'compiled' if self.compiled else 'not compiled'}"


def known_layout(machine: Machine, kernel_size: int) -> Layout:
    """What was measured to be fast on an H200, or is known of such a GPU."""
    if not gpu_kernels_run(machine, kernel_size):
        return Layout(layout_for(kernel_size), False)
    return Layout("channel_major" if kernel_size >= KERNELS_WIN else "channels_last", True)


def choose_layout(recipe: Recipe, amp: str, device: torch.device, compile: Compile = "auto") -> Layout:
    """What the recipe's memory format and ``compile`` ask for. "auto" is what is known, or what a block measures."""
    kernel_size, asked = recipe.model.kernel_size, recipe.memory_format
    known = None
    if device.type == "cuda" and amp != "off":  # in float32 nothing is known, and the kernels do not run
        known = known_layout(look(str(device), kernel_size), kernel_size)
    if asked != "auto":
        memory_format = asked
    elif known:
        memory_format = known.memory_format
    else:
        seconds = measure_formats(recipe, amp, device)
        memory_format = min(seconds, key=seconds.get)
    return Layout(memory_format, compile == "on" or (compile == "auto" and known == Layout(memory_format, True)))


def agree_on_layout(recipe: Recipe, compile: Compile, amp: str, world: World, stored: dict | None) -> Layout:
    """The layout that the main process chooses; where "auto" is resumed, the ``stored`` recipe's: others round anew."""
    if stored is None:
        names = list(FORMATS)
        layout = choose_layout(recipe, amp, world.device, compile) if world.main else Layout(names[0], False)
        number, compiled = world.largest(names.index(layout.memory_format), int(layout.compiled))
        return Layout(names[number], bool(compiled))
    memory_format = stored["memory_format"] if recipe.memory_format == "auto" else recipe.memory_format
    return Layout(memory_format, stored["compiled"] if compile == "auto" else compile == "on")


def wrap(state: TrainingState, recipe: Recipe, world: World, layout: Layout) -> nn.Module:
    """The network as the loop calls it: with synchronised batch norm, among several processes, compiled."""
    if recipe.sync_norm and world.size > 1:
        use_sync_norm(state.network)
    forward: nn.Module = state.network
    if world.size > 1:
        # Batch norm's statistics are averaged after each step instead of taken from one process before each part.
        forward = DistributedDataParallel(forward, broadcast_buffers=False, gradient_as_bucket_view=True)
    if not layout.compiled:
        return forward
    patches = {"layout_optimization": layout.memory_format == "channels_last"}  # else it may choose that by itself

    def compile_or_not(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        from torch._inductor.compile_fx import compile_fx

        try:
            return compile_fx(graph, inputs, config_patches=patches)
        except Exception as error:  # of whatever kind: the run goes on
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"torch.compile failed ({reason}); the network runs as it is, and slower", stacklevel=2)
            return graph.forward

    # Each size of part is compiled by itself. On one GPU a recipe has six at most; PyTorch gives up after eight.
    return torch.compile(forward, dynamic=False, backend=compile_or_not)


def measure_formats(recipe: Recipe, amp: str, device: torch.device) -> dict[str, float]:
    """Seconds of a step with one block of the recipe's network, by format of MEASURED: the fastest of a few rounds."""
    size, pictures = recipe.preprocessing.size, min(PICTURES, recipe.micro_batch)
    seconds, contestants = dict.fromkeys(MEASURED, float("inf")), {}
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(pictures, recipe.model.in_chans, size, size, device=device)
        for name in MEASURED:
            one_block = replace(recipe, model=replace(recipe.model, depth=1), memory_format=name)
            network = new_state(one_block, device, amp, FORMATS[name]).network
            contestants[name] = (network, x.contiguous(memory_format=FORMATS[name]))
    for _ in range(ROUNDS + 1):  # in turn, so that a change in the machine's speed meets both; the first is a warm-up
        for name, contestant in contestants.items():
            seconds[name] = min(seconds[name], _seconds(*contestant, amp))
    return seconds


def _seconds(network: nn.Module, x: torch.Tensor, amp: str) -> float:
    def wait() -> None:
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    wait()
    start = time.perf_counter()
    with autocast(amp, x.device):
        loss = network(x).float().square().mean()
    loss.backward()
    wait()
    return time.perf_counter() - start
