"""Networks for the benchmarks: with random weights, and timm's with the same weights."""

import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from convmixer.config import ConvMixerConfig
from convmixer.model import ACTIVATIONS, ConvMixer


def random_network(config: ConvMixerConfig, size: int) -> ConvMixer:
    """A network for pictures of ``size`` pixels, in evaluation mode, with random weights.

    Through 32 blocks PyTorch's initial weights amplify the rounding of float32 to 2e-4 of the logits. So batch norm's
    variances have a floor, biases keep most values where ReLU lets them through, and the residual branches are half as
    large: rounding then stays below 1e-5. Logits are around 10, features around 1.
    """

    def take_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance.clamp(min=0.3 * variance.median().item()))

    torch.manual_seed(0)
    network, hooks = ConvMixer(config).eval(), []
    with torch.no_grad():
        for place, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                module.bias.uniform_(0, 1)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5).mul_(0.5 if ".fn." in place else 1)
                module.bias.normal_(std=0.2)
                hooks.append(module.register_forward_pre_hook(take_statistics))
        network.head.weight.mul_(16)
        network(torch.randn(4, config.in_chans, size, size))
    for hook in hooks:
        hook.remove()
    return network


def timm_network(config: ConvMixerConfig, weights: dict[str, Tensor]) -> nn.Module:
    """timm's network, in evaluation mode."""
    sizes = {name: getattr(config, name) for name in ("dim", "depth", "kernel_size", "patch_size", "num_classes")}
    network = TimmConvMixer(**sizes, act_layer=ACTIVATIONS[config.activation])
    network.load_state_dict(weights)
    return network.eval()
