"""How the network lies in memory while it trains, and whether it is compiled: what is known, measured, or asked for."""

import dataclasses

import pytest
import torch

from convmixer.engine import Machine
from convmixer.model import ConvMixer, ConvMixerConfig
from train.distributed import World
from train.recipes import RECIPES
from train.speed import layout
from train.speed.channel_major import ChannelMajorConvMixer, FusedConvMixer
from train.speed.layout import FORMATS, MEASURED, Layout, agree_on_layout, choose_layout, known_layout, wrap
from train.state import new_state

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    RECIPES["cifar10"],
    model=ConvMixerConfig(dim=8, depth=1, kernel_size=5, patch_size=2, num_classes=10),
    batch_size=8,
    micro_batch=8,
)
H200 = Machine("cuda", capability=(9, 0), has_triton=True)


@pytest.mark.parametrize(
    ("device", "capability", "has_triton", "kernel_size", "memory_format", "compiled"),
    [
        ("cuda", (9, 0), True, 9, "channel_major", True),
        ("cuda", (9, 0), True, 7, "channel_major", True),
        ("cuda", (9, 0), True, 5, "channels_last", True),
        ("cuda", (8, 0), True, 3, "channels_last", True),
        ("cuda", (8, 6), True, 9, "channel_major", True),
        ("cuda", (12, 0), True, 7, "channel_major", True),
        ("cuda", (9, 0), True, 11, "contiguous", False),  # the kernels end at 9
        ("cuda", (9, 0), False, 9, "contiguous", False),
        ("cuda", (9, 0), False, 7, "channels_last", False),
        ("cuda", (7, 5), True, 9, "contiguous", False),
        ("cuda", (7, 5), True, 5, "channels_last", False),
    ],
)
def test_what_is_known_of_gpus(device, capability, has_triton, kernel_size, memory_format, compiled):
    machine = Machine(device, capability=capability, has_triton=has_triton)
    assert known_layout(machine, kernel_size) == Layout(memory_format, compiled)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_it_is_measured(device):
    assert known_layout(Machine(device), 5) is None


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_meets_a_slow_format(name):
    """channels_last costs kernel 9 two to eight times the time; contiguous costs kernel 7 and less twice."""
    for machine in (H200, Machine("cuda", capability=(7, 0))):
        chosen = known_layout(machine, RECIPES[name].model.kernel_size).memory_format
        assert chosen != ("channels_last" if RECIPES[name].model.kernel_size > 7 else "contiguous")


def test_on_the_cpu_a_block_is_measured_and_nothing_compiled():
    seconds = layout.measure_formats(TINY, "off", CPU)
    assert list(seconds) == list(MEASURED) and min(seconds.values()) > 0
    chosen = choose_layout(TINY, "off", CPU)
    assert chosen.memory_format in MEASURED and not chosen.compiled


@pytest.mark.parametrize(
    ("asked", "compile", "chosen"),
    [
        ("auto", "auto", Layout("channel_major", True)),
        ("auto", "off", Layout("channel_major", False)),
        ("channel_major", "auto", Layout("channel_major", True)),
        ("contiguous", "auto", Layout("contiguous", False)),  # nobody knows what compiling does there
        ("contiguous", "on", Layout("contiguous", True)),
        ("channels_last", "off", Layout("channels_last", False)),
    ],
)
def test_what_is_asked_for_wins(asked, compile, chosen, monkeypatch):
    monkeypatch.setattr(layout, "look", lambda device, kernel_size: H200)
    recipe = dataclasses.replace(RECIPES["imagenet_1536_20"], memory_format=asked)
    assert choose_layout(recipe, "bf16", torch.device("cuda"), compile) == chosen


def test_in_float32_a_gpu_measures_too(monkeypatch):
    monkeypatch.setattr(layout, "look", lambda device, kernel_size: H200)
    monkeypatch.setattr(layout, "measure_formats", lambda *arguments: {"channels_last": 2.0, "contiguous": 1.0})
    assert choose_layout(TINY, "off", torch.device("cuda")) == Layout("contiguous", False)


@pytest.mark.parametrize("name", FORMATS)
def test_the_state_is_laid_out_as_asked(name):
    recipe = dataclasses.replace(TINY, memory_format=name, ema=0.9)
    assert choose_layout(recipe, "off", CPU) == Layout(name, False)
    state = new_state(recipe, CPU, "off", FORMATS[name])
    assert state.network.blocks[0][1].weight.is_contiguous(memory_format=FORMATS[name])
    kind = {"channel_major": ChannelMajorConvMixer, "channel_major_fused": FusedConvMixer}.get(name, ConvMixer)
    assert type(state.network) is type(state.exported) is kind


def test_a_resumed_run_keeps_what_auto_stood_for():
    stored = {"memory_format": "channel_major", "compiled": True}
    kept = agree_on_layout(TINY, "auto", "off", World(CPU), stored)
    assert kept == Layout("channel_major", True)
    asked = dataclasses.replace(TINY, memory_format="contiguous")
    assert agree_on_layout(asked, "off", "off", World(CPU), stored) == Layout("contiguous", False)


@pytest.mark.parametrize("works", [True, False])
def test_what_cannot_be_compiled_still_trains(works, monkeypatch, recwarn):
    from torch._inductor import compile_fx

    def fail(graph, inputs, config_patches):
        raise RuntimeError("no compiler\nand much more")

    def compile_nothing(graph, inputs, config_patches):
        assert config_patches == {"layout_optimization": False}
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_nothing if works else fail)
    torch.compiler.reset()
    state = new_state(TINY, CPU, "off")
    forward = wrap(state, TINY, World(CPU), Layout("contiguous", True))
    for count in (2, 2, 3):
        x = torch.randn(count, 3, 8, 8)
        logits = forward(x)
        logits.sum().backward()
        assert torch.allclose(logits, state.network(x), atol=1e-5)
    lines = [str(each.message) for each in recwarn if "torch.compile failed" in str(each.message)]
    assert set(lines) == (
        set() if works else {"torch.compile failed (no compiler); the network runs as it is, and slower"}
    )
