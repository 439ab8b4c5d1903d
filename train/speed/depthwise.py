"""A depthwise convolution whose weight gradient is fast on the CPU.

oneDNN computes the weight gradient of a depthwise convolution several times slower than the arithmetic needs, and in
bfloat16 slower still. The gradient of a grouped convolution of `GROUP` channels holds the same numbers on its diagonal:
computing it does `GROUP` times the arithmetic, but on a path that fills the vector units, and comes out ahead.
"""

import torch
from torch import Tensor, nn

GROUP = 8  # channels computed together; 8 was fastest or close to it with AVX2, AVX-512 and AVX-512 bfloat16


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # casts under autocast only
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        channels, kernel_size = x.shape[1], weight.shape[-1]

        def gradients(weight: Tensor, groups: int, mask: list[bool]) -> tuple[Tensor | None, ...]:
            same = [kernel_size // 2] * 2
            return torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], same, [1, 1], False, [0, 0], groups, mask
            )

        grad_x = gradients(weight, channels, [True, False, False])[0] if ctx.needs_input_grad[0] else None
        wide = weight.new_empty(channels, GROUP, kernel_size, kernel_size)  # only its shape is read
        grad_wide = gradients(wide, channels // GROUP, [False, True, False])[1]
        channel = torch.arange(channels)
        grad_weight = torch.empty_like(weight)  # with the strides of the weight, which DistributedDataParallel expects
        grad_weight.copy_(grad_wide[channel, channel % GROUP].unsqueeze(1))
        # Its own sum: asking convolution_backward for the bias gradient too takes several times as long.
        return grad_x, grad_weight, grad.sum((0, 2, 3))


class DepthwiseConv2d(nn.Conv2d):
    """An nn.Conv2d with one filter a channel, stride 1 and "same" padding, whose backward is faster on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and self.training and self.in_channels % GROUP == 0:
            return _DepthwiseConvolution.apply(x, self.weight, self.bias)
        return super().forward(x)


def use_fast_depthwise(network: nn.Module) -> None:
    """Switches every depthwise convolution of a ConvMixer to DepthwiseConv2d, in place; the parameters stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.groups == module.in_channels > 1:
            module.__class__ = DepthwiseConv2d  # same parameters and attributes; only forward differs
