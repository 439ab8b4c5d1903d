"""Training on channel-major feature maps: the same network, the same gradients, and a run from end to end."""

import copy
import json

import pytest
import torch
from torch import nn

from convmixer.model import ConvMixer, ConvMixerConfig
from train.speed.channel_major import ChannelMajorConvMixer, use_channel_major


def pair(dtype: torch.dtype = torch.float64, fused: bool = False, **config) -> tuple[ConvMixer, ConvMixer]:
    """The same network as ever, and channel-major."""
    torch.manual_seed(0)
    network = ConvMixer(ConvMixerConfig(**{"dim": 12, "depth": 2, "num_classes": 7, "patch_size": 2} | config))
    other = copy.deepcopy(network).to(dtype)
    use_channel_major(other, fused)
    return network.to(dtype), other


def backward(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    logits = network(x)
    logits.square().sum().backward()
    return logits


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"kernel_size": 5}, (3, 3, 12, 12)),
        ({"kernel_size": 9, "activation": "relu"}, (2, 3, 15, 9)),  # a row and a column that fill no patch
        ({"kernel_size": 1, "patch_size": 1, "in_chans": 1, "depth": 1}, (2, 1, 4, 5)),
    ],
)
def test_it_is_the_same_network(config, shape, fused):
    network, other = pair(fused=fused, **config)
    x = torch.randn(shape, dtype=torch.float64)
    for step in range(2):  # the second one with other running statistics
        assert torch.allclose(backward(other, x), backward(network, x), rtol=1e-9), step
    for (name, wanted), found in zip(network.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-8, atol=1e-10 * wanted.grad.abs().max()), name
    for (name, wanted), found in zip(network.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found.double(), wanted.double(), rtol=1e-12), name
    network.eval(), other.eval()
    assert torch.allclose(other(x), network(x), rtol=1e-9)
    features, wanted = other.forward_features(x), network.forward_features(x)
    assert features.shape == wanted.shape and torch.allclose(features, wanted, rtol=1e-9)
    for found, wanted in zip(other.forward_intermediates(x), network.forward_intermediates(x), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9)


def test_it_has_the_same_parameters():
    network, other = pair()
    assert isinstance(other, ChannelMajorConvMixer)
    network.load_state_dict(other.state_dict())
    assert list(other.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_precision(fused):
    network, other = pair(torch.float32, fused, dim=16, kernel_size=7)
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = backward(other, x), backward(network, x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), wanted.float(), atol=0.03 * wanted.abs().max().item())
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (other, network)]
    assert all(p.grad.dtype == torch.float32 for p in other.parameters())
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("fused", [False, True])
def test_it_compiles_as_a_whole(fused):
    _, other = pair(torch.float32, fused, depth=1)
    compiled = torch.compile(copy.deepcopy(other), fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(backward(compiled, x), backward(other, x), rtol=1e-4, atol=1e-5)
    for found, wanted in zip(compiled.parameters(), other.parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-3, atol=1e-5 * wanted.grad.abs().max())


def test_a_run_ends_with_a_checkpoint_for_every_door(python, cifar10_folder, tmp_path):
    options = [
        "--epochs",
        1,
        "--batch-size",
        32,
        "--model.dim",
        8,
        "--model.depth",
        1,
        "--memory-format",
        "channel_major",
    ]
    out = tmp_path / "run"
    run = ["train/run.py", "--recipe", "cifar10", "--data", cifar10_folder, "--out", out, *options, "--split", "full"]
    done = python(*run)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "recipe.json").read_text())["memory_format"] == "channel_major"
    done = python("-m", "convmixer", "classify", "--sample", "--model", out / "model.safetensors")
    assert done.returncode == 0, done.stderr
    done = python(*run, "--resume", "--memory-format", "contiguous")
    assert done.returncode == 2 and "memory_format is 'contiguous' and was 'channel_major'" in done.stderr
