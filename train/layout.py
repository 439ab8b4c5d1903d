"""Which memory format trains faster here: it depends on the kernel size, the device and the precision."""

import time
from dataclasses import replace

import torch
from torch import nn

from train.loop import autocast
from train.recipe import Recipe
from train.state import new_state

FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
    "channel_major": torch.contiguous_format,  # of the pictures and weights; see train/channel_major.py
}
AUTO = ("channels_last", "contiguous")  # what "auto" chooses from
ROUNDS = 3
PICTURES = 32  # enough to tell the formats apart, and little beside a real batch


def choose_memory_format(recipe: Recipe, amp: str, device: torch.device) -> str:
    """The name in FORMATS of what the recipe asks for; "auto" is the one of AUTO that takes a block through faster."""
    if recipe.memory_format != "auto":
        return recipe.memory_format
    seconds = measure_formats(recipe, amp, device)
    return min(seconds, key=seconds.get)


def measure_formats(recipe: Recipe, amp: str, device: torch.device) -> dict[str, float]:
    """Seconds of a step with one block of the recipe's network, by format of AUTO: the fastest of a few rounds."""
    size, pictures = recipe.preprocessing.size, min(PICTURES, recipe.micro_batch)
    seconds, contestants = dict.fromkeys(AUTO, float("inf")), {}
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(pictures, recipe.model.in_chans, size, size, device=device)
        for name in AUTO:
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
