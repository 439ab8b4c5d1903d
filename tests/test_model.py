"""The network against timm's, against the paper's few lines, and against the published parameter counts."""

import pytest
import timm
import torch
from torch import nn

from convmixer.config import ConvMixerConfig, count_parameters
from convmixer.model import ConvMixer, build

PUBLISHED = {
    "convmixer_1536_20": (ConvMixerConfig(1536, 20, 9, 7), 51_625_960),
    "convmixer_768_32": (ConvMixerConfig(768, 32, 7, 7, activation="relu"), 21_110_248),
    "convmixer_1024_20_ks9_p14": (ConvMixerConfig(1024, 20, 9, 14), 24_383_464),
}
SHIPPED = (ConvMixerConfig(256, 8, 5, 2, num_classes=10), 594_186)


def trained_like(network: nn.Module) -> nn.Module:
    """The network with batch-norm statistics and scales that are not the identity, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_equal_timms_bit_for_bit(name):
    config, _ = PUBLISHED[name]
    torch.manual_seed(0)
    reference = trained_like(timm.create_model(name))
    network = build(config, reference.state_dict()).eval()
    x = torch.randn(2, 3, 98, 112)
    with torch.inference_mode():
        expected = reference(x)
        assert expected.std() > 0.01
        assert torch.equal(network(x), expected)


@pytest.mark.parametrize(("dim", "depth", "kernel_size", "patch_size"), [(24, 3, 5, 2), (16, 2, 9, 7)])
def test_logits_equal_the_papers_lines_bit_for_bit(dim, depth, kernel_size, patch_size):
    torch.manual_seed(0)
    reference = trained_like(paper_lines(dim, depth, kernel_size, patch_size, 10))
    network = ConvMixer(ConvMixerConfig(dim, depth, kernel_size, patch_size, num_classes=10))
    # Both list their tensors from stem to head.
    network.load_state_dict(dict(zip(network.state_dict(), reference.state_dict().values(), strict=True)))
    x = torch.randn(3, 3, 56, 42)
    with torch.inference_mode():
        assert torch.equal(network.eval()(x), reference(x))


@pytest.mark.parametrize(("config", "parameters"), [*PUBLISHED.values(), SHIPPED])
def test_parameter_counts_are_the_published_ones(config, parameters):
    with torch.device("meta"):
        network = ConvMixer(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert count_parameters(config) == parameters


def test_parameter_names_are_timms():
    config = ConvMixerConfig(16, 3, 5, 2, num_classes=10)
    reference = timm.models.convmixer.ConvMixer(dim=16, depth=3, kernel_size=5, patch_size=2, num_classes=10)
    assert list(ConvMixer(config).state_dict()) == list(reference.state_dict())


def test_intermediates_lead_to_the_logits():
    torch.manual_seed(0)
    network = ConvMixer(ConvMixerConfig(16, 3, 5, 4, num_classes=7, in_chans=1, activation="relu")).eval()
    x = torch.randn(2, 1, 19, 26)  # sides that are no multiple of the patch are rounded down
    with torch.inference_mode():
        features = network.forward_intermediates(x)
        assert [f.shape for f in features] == [(2, 16, 4, 6)] * 4
        assert torch.equal(features[-1], network.forward_features(x))
        assert torch.equal(network.forward_head(features[-1]), network(x))
        assert torch.equal(features[2], network.blocks[1](features[1]))


def test_build_takes_the_weights_over_without_a_copy():
    config = ConvMixerConfig(16, 2, 5, 2, num_classes=10)
    state_dict = ConvMixer(config).state_dict()
    network = build(config, state_dict)
    assert network.head.weight.data_ptr() == state_dict["head.weight"].data_ptr()
    with pytest.raises(RuntimeError, match=r"stem\.0\.weight"):
        build(ConvMixerConfig(24, 2, 5, 2, num_classes=10), state_dict)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"depth": 2.0}, "depth is 2.0"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"patch_size": -1}, "patch_size is -1"),
        ({"num_classes": True}, "num_classes is True"),
        ({"activation": "swish"}, "one of gelu, relu"),
    ],
)
def test_an_impossible_config_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        ConvMixerConfig(**({"dim": 8, "depth": 1} | fields))
