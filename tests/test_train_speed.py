"""What makes training fast, and changes nothing else: layouts in memory, our kernels, torch.compile."""

import copy
import dataclasses

import pytest
import torch
from networks import relative_error
from torch import nn

from convmixer.engine import Machine
from convmixer.model import ConvMixer, ConvMixerConfig
from train.distributed import World
from train.recipes import RECIPES
from train.speed import layout
from train.speed.channel_major import ChannelMajorConvMixer, use_channel_major
from train.speed.depthwise import DepthwiseConv2d, use_fast_depthwise
from train.speed.layout import Layout, choose_layout, known_layout, wrap
from train.state import new_state

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    RECIPES["cifar10"],
    model=ConvMixerConfig(dim=8, depth=1, kernel_size=5, patch_size=2, num_classes=10),
    batch_size=8,
    micro_batch=8,
)


def pair(dtype: torch.dtype = torch.float64, fused: bool = False, **config) -> tuple[ConvMixer, ConvMixer]:
    """The same network as ever, and channel-major."""
    torch.manual_seed(0)
    network = ConvMixer(ConvMixerConfig(**{"dim": 12, "depth": 2, "num_classes": 7, "patch_size": 2} | config))
    other = copy.deepcopy(network).to(dtype)
    use_channel_major(other, fused)
    assert isinstance(other, ChannelMajorConvMixer)
    return network.to(dtype), other


def backward(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    logits = network(x)
    logits.square().sum().backward()
    return logits


def assert_same_gradients(network: nn.Module, other: nn.Module, rtol: float, atol: float) -> None:
    for (name, wanted), (other_name, found) in zip(network.named_parameters(), other.named_parameters(), strict=True):
        assert other_name == name
        assert torch.allclose(found.grad, wanted.grad, rtol=rtol, atol=atol * wanted.grad.abs().max()), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"kernel_size": 9, "activation": "relu"}, (2, 3, 15, 9)),  # a row and a column that fill no patch
        ({"kernel_size": 1, "patch_size": 1, "in_chans": 1, "depth": 1}, (2, 1, 4, 5)),
    ],
)
def test_channel_major_is_the_same_network(config, shape, fused):
    network, other = pair(fused=fused, **config)
    x = torch.randn(shape, dtype=torch.float64)
    for step in range(2):  # the second one with other running statistics
        assert torch.allclose(backward(other, x), backward(network, x), rtol=1e-9), step
    assert_same_gradients(network, other, 1e-8, 1e-10)
    for (name, wanted), found in zip(network.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found.double(), wanted.double(), rtol=1e-12), name
    network.eval(), other.eval()
    assert torch.allclose(other(x), network(x), rtol=1e-9)
    features, wanted = other.forward_features(x), network.forward_features(x)
    assert features.shape == wanted.shape and torch.allclose(features, wanted, rtol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_channel_major_in_mixed_precision_and_traced_as_a_whole(fused):
    network, other = pair(torch.float32, fused, dim=16, kernel_size=7)
    traced, x = torch.compile(other, fullgraph=True, backend="aot_eager"), torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = backward(traced, x), backward(network, x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.detach(), wanted.detach()) < 0.03
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (other, network)]
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_the_fast_depthwise_convolution_has_the_same_gradients():
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv2d(24, 24, 5, groups=24, padding=2), nn.Conv2d(24, 24, 3, groups=2)).double()
    fast = copy.deepcopy(exact).float()
    use_fast_depthwise(fast)
    assert [type(module) for module in fast] == [DepthwiseConv2d, nn.Conv2d]
    x = torch.randn(3, 24, 9, 11, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    assert torch.allclose(backward(fast, x).double(), backward(exact, x64), rtol=1e-4, atol=1e-4)
    assert relative_error(x.grad, x64.grad) < 1e-5
    assert_same_gradients(exact, fast.double(), 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("capability", "has_triton", "kernel_size", "memory_format", "compiled"),
    [
        ((9, 0), True, 7, "channel_major", True),  # from which our kernels win
        ((8, 0), True, 5, "channels_last", True),
        ((9, 0), True, 11, "contiguous", False),  # the kernels end at 9
        ((9, 0), False, 7, "channels_last", False),
        ((7, 5), True, 9, "contiguous", False),
    ],
)
def test_what_is_known_of_gpus(capability, has_triton, kernel_size, memory_format, compiled):
    machine = Machine("cuda", capability=capability, has_triton=has_triton)
    assert known_layout(machine, kernel_size) == Layout(memory_format, compiled)


@pytest.mark.parametrize(
    ("amp", "asked", "compile", "chosen"),
    [
        ("bf16", "auto", "auto", Layout("channel_major", True)),
        ("bf16", "contiguous", "auto", Layout("contiguous", False)),  # nobody knows what compiling does there
        ("bf16", "contiguous", "on", Layout("contiguous", True)),
        ("off", "auto", "auto", Layout("contiguous", False)),  # in float32 a GPU measures, too
    ],
)
def test_what_is_asked_for_wins(amp, asked, compile, chosen, monkeypatch):
    monkeypatch.setattr(layout, "look", lambda *_: Machine("cuda", capability=(9, 0), has_triton=True))
    monkeypatch.setattr(layout, "measure_formats", lambda *_: {"channels_last": 2.0, "contiguous": 1.0})
    recipe = dataclasses.replace(RECIPES["imagenet_1536_20"], memory_format=asked)
    assert choose_layout(recipe, amp, torch.device("cuda"), compile) == chosen


@pytest.mark.parametrize("works", [True, False])
def test_what_cannot_be_compiled_still_trains(works, monkeypatch, recwarn):
    def compile_nothing(graph, inputs, config_patches):
        assert config_patches == {"layout_optimization": False}
        if works:
            return graph.forward
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_nothing)
    torch.compiler.reset()
    state = new_state(TINY, CPU, "off")
    forward, x = wrap(state, TINY, World(CPU), Layout("contiguous", True)), torch.randn(2, 3, 8, 8)
    assert torch.allclose(backward(forward, x), state.network(x), atol=1e-5)
    lines = {str(each.message) for each in recwarn if "torch.compile failed" in str(each.message)}
    assert lines == (set() if works else {"torch.compile failed (no compiler); the network runs as it is, and slower"})
