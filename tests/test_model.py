"""The network against timm's, against the paper's few lines, and against the published parameter counts."""

import pytest
import timm
import torch
from torch import nn

from convmixer.config import ConvMixerConfig, count_parameters
from convmixer.model import ConvMixer, build
from convmixer.zoo import MODELS
from tests.networks import network

PARAMETERS = {  # as published; the last one is the shipped model's
    "convmixer_1536_20": 51_625_960,
    "convmixer_768_32": 21_110_248,
    "convmixer_1024_20_ks9_p14": 24_383_464,
    "convmixer_256_8_cifar10": 594_186,
}


def paper_lines(dim, depth, kernel_size, patch_size, classes):
    """The paper's network as one nn.Sequential, written down here once more as an oracle."""

    class AddInput(nn.Sequential):
        def forward(self, x):
            return self[0](x) + x

    def norm(*conv):
        return (*conv, nn.GELU(), nn.BatchNorm2d(dim))

    depthwise = [nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same") for _ in range(depth)]
    return nn.Sequential(
        *norm(nn.Conv2d(3, dim, patch_size, patch_size)),
        *[nn.Sequential(AddInput(nn.Sequential(*norm(c))), *norm(nn.Conv2d(dim, dim, 1))) for c in depthwise],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, classes),
    )


@pytest.mark.parametrize("name", list(PARAMETERS)[:3])
@torch.inference_mode()
def test_logits_equal_timms_bit_for_bit(name):
    config = MODELS[name].config
    reference = timm.create_model(name).eval()
    reference.load_state_dict(network(**vars(config)).state_dict())
    assert list(reference.state_dict()) == list(ConvMixer(config).state_dict())
    x = torch.randn(1, 3, 98, 112)
    assert torch.equal(build(config, reference.state_dict()).eval()(x), reference(x))


@torch.inference_mode()
def test_logits_equal_the_papers_lines_bit_for_bit():
    net = network(dim=16, depth=2, kernel_size=9, patch_size=7, num_classes=10)
    reference = paper_lines(16, 2, 9, 7, 10).eval()
    # Both list their tensors from stem to head.
    reference.load_state_dict(dict(zip(reference.state_dict(), net.state_dict().values(), strict=True)))
    x = torch.randn(3, 3, 56, 42)
    assert torch.equal(net(x), reference(x))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name):
    config = MODELS[name].config
    with torch.device("meta"):
        net = ConvMixer(config)
    assert sum(p.numel() for p in net.parameters()) == count_parameters(config) == PARAMETERS[name]


@torch.inference_mode()
def test_intermediates_lead_to_the_logits():
    net = network(dim=16, depth=3, kernel_size=5, patch_size=4, num_classes=7, in_chans=1, activation="relu")
    x = torch.randn(2, 1, 19, 26)  # sides that are no multiple of the patch are rounded down
    features = net.forward_intermediates(x)
    assert [f.shape for f in features] == [(2, 16, 4, 6)] * 4
    assert torch.equal(features[-1], net.forward_features(x))
    assert torch.equal(net.forward_head(features[-1]), net(x))
    assert torch.equal(features[2], net.blocks[1](features[1]))


def test_build_takes_the_weights_over_without_a_copy():
    config = ConvMixerConfig(16, 2, 5, 2, num_classes=10)
    state_dict = ConvMixer(config).state_dict()
    assert build(config, state_dict).head.weight.data_ptr() == state_dict["head.weight"].data_ptr()
    with pytest.raises(RuntimeError, match=r"stem\.0\.weight"):
        build(ConvMixerConfig(24, 2, 5, 2, num_classes=10), state_dict)


@pytest.mark.parametrize("fields", [{"dim": 0}, {"depth": 2.0}, {"kernel_size": 4}, {"activation": "swish"}])
def test_an_impossible_config_is_named(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is {fields[name]!r}; it must be"):
        ConvMixerConfig(**({"dim": 8, "depth": 1} | fields))
