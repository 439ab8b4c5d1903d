"""Which memory format trains faster here: it depends on the kernel size, the device and the precision."""

import time
from dataclasses import replace

import torch
from torch import nn

from convmixer.model import build
from train.depthwise import use_fast_depthwise
from train.loop import autocast
from train.recipe import Recipe

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(replace(recipe.model, depth=1)).to(device)
        x = torch.randn(pictures, recipe.model.in_chans, size, size, device=device)
    use_fast_depthwise(network)
    seconds = dict.fromkeys(AUTO, float("inf"))
    for _ in range(ROUNDS + 1):  # in turn, so that a change in the machine's speed meets both; the first is a warm-up
        for name in AUTO:
            network = network.to(memory_format=FORMATS[name])
            seconds[name] = min(seconds[name], _seconds(network, x.contiguous(memory_format=FORMATS[name]), amp))
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
