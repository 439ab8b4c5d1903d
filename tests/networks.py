"""Networks of many shapes, for the engines that must give what PyTorch's operators give."""

import torch

from convmixer import ConvMixer, ConvMixerConfig


def network(seed: int = 0, **config) -> ConvMixer:
    """A random network whose batch norms are not the identity."""
    torch.manual_seed(seed)
    network = ConvMixer(ConvMixerConfig(**config)).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            torch.nn.init.uniform_(module.weight, -1, 2)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return network


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


CASES = {
    "the shipped one's": ({"dim": 64, "depth": 3, "kernel_size": 5, "patch_size": 2, "num_classes": 10}, (32, 32)),
    "relu": ({"dim": 32, "depth": 2, "kernel_size": 7, "activation": "relu"}, (70, 70)),
    "a width that fills no vector": ({"dim": 33, "depth": 2, "kernel_size": 3, "patch_size": 3}, (20, 31)),
    "a kernel larger than the map": ({"dim": 40, "depth": 2, "kernel_size": 9, "patch_size": 7}, (21, 30)),
    "grey, every pixel a patch": ({"dim": 16, "depth": 1, "kernel_size": 5, "patch_size": 1, "in_chans": 1}, (19, 150)),
    "an uncommon kernel": ({"dim": 16, "depth": 2, "kernel_size": 11, "patch_size": 2, "in_chans": 4}, (37, 26)),
}
