"""The halves of a block in training, batch statistics included, as PyTorch operators with gradients: a kernel each way.

As in ops.py, Triton's kernels run where they can and PyTorch's operators elsewhere, and z is what is kept for the way
back: the map before the activation. Batch norm's gain and offset, its mean and its biased variance are float32 (C,).
"""

import torch
from torch import Tensor

from .ops import ACTIVATIONS, _by_channel, _convolved, _wide, depthwise_taps, triton_runs

try:
    from . import fused
except ImportError:  # as in ops.py
    fused = None


@torch.library.custom_op("convmixer::mix", mutates_args=())
def mix(
    x: Tensor, taps: Tensor, bias: Tensor, gain: Tensor, offset: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A block's first half, batch_norm(activation(depthwise(x))) + x: that, z, mean and variance; x (C, N, H, W)."""
    if triton_runs(x, taps.shape[-1]):
        return fused.mix(x.contiguous(), taps, bias, gain, offset, eps, activation)
    z = _convolved(x, taps, bias)
    y, mean, variance = _normed(z, gain, offset, eps, activation)
    return (y + x).to(x.dtype).contiguous(), z.to(x.dtype).contiguous(), mean, variance


@torch.library.custom_op("convmixer::mix_backward", mutates_args=())
def mix_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    taps: Tensor,
    gain: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `mix`'s x, taps, bias, gain and offset."""
    grad, x = grad.contiguous(), x.contiguous()
    if triton_runs(x, taps.shape[-1]):
        return fused.unmix(grad, x, z, taps, gain, mean, variance, eps, activation)
    of_z, *vectors = _differentiated(grad, _wide(z), gain, mean, variance, eps, activation)
    of_x = _convolved(of_z, taps.to(x.dtype).flip(1, 2), taps.new_zeros(len(x))) + grad
    return of_x.to(x.dtype).contiguous(), depthwise_taps(_wide(x), of_z, taps.shape[-1]), *vectors


@torch.library.custom_op("convmixer::norm", mutates_args=())
def norm(
    z: Tensor, bias: Tensor, gain: Tensor, offset: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows a product: batch_norm(activation(z + bias)); that, mean and variance; z (C, positions)."""
    if triton_runs(z):
        return fused.norm(z.contiguous(), bias, gain, offset, eps, activation)
    y, mean, variance = _normed(_wide(z) + _by_channel(bias, _wide(z)), gain, offset, eps, activation)
    return y.to(z.dtype).contiguous(), mean, variance


@torch.library.custom_op("convmixer::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, z: Tensor, bias: Tensor, gain: Tensor, mean: Tensor, variance: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `norm`'s z, bias, gain and offset."""
    grad, z = grad.contiguous(), z.contiguous()
    if triton_runs(z):
        return fused.unnorm(grad, z, bias, gain, mean, variance, eps, activation)
    value = _wide(z) + _by_channel(bias, _wide(z))
    of_z, *vectors = _differentiated(grad, value, gain, mean, variance, eps, activation)
    return of_z.to(z.dtype), *vectors


def _normed(z: Tensor, gain: Tensor, offset: Tensor, eps: float, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    value = ACTIVATIONS[activation](z)
    variance, mean = torch.var_mean(value.flatten(1), 1, correction=0)
    scale = gain * torch.rsqrt(variance + eps)
    return (value - _by_channel(mean, z)) * _by_channel(scale, z) + _by_channel(offset, z), mean, variance


def _differentiated(
    grad: Tensor, z: Tensor, gain: Tensor, mean: Tensor, variance: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of z and of bias, gain and offset."""
    grad, inverse = grad.to(z.dtype), torch.rsqrt(variance + eps)
    normed = (ACTIVATIONS[activation](z) - _by_channel(mean, z)) * _by_channel(inverse, z)
    of_gain, of_offset = (grad * normed).flatten(1).sum(1), grad.flatten(1).sum(1)
    count = z[0].numel()
    grad = grad - _by_channel(of_offset / count, z) - normed * _by_channel(of_gain / count, z)
    grad = grad * _by_channel(gain * inverse, z)
    of_z = torch.ops.aten.gelu_backward(grad, z) if activation == "gelu" else grad * (z > 0)
    return of_z, of_z.flatten(1).sum(1), of_gain, of_offset


@mix.register_fake
def _(x, taps, bias, gain, offset, eps, activation):
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like), torch.empty_like(gain), torch.empty_like(gain)


@mix_backward.register_fake
def _(grad, x, z, taps, gain, mean, variance, eps, activation):
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(taps, memory_format=torch.contiguous_format), *(torch.empty_like(gain) for _ in "bgo")


@norm.register_fake
def _(z, bias, gain, offset, eps, activation):
    like = torch.empty_like(z, memory_format=torch.contiguous_format)
    return like, torch.empty_like(gain), torch.empty_like(gain)


@norm_backward.register_fake
def _(grad, z, bias, gain, mean, variance, eps, activation):
    like = torch.empty_like(z, memory_format=torch.contiguous_format)
    return like, *(torch.empty_like(gain) for _ in "bgo")


def _keep_mix(ctx, inputs, output) -> None:
    x, taps, _, gain, _, *ctx.rest = inputs
    _keep(ctx, output, x, output[1], taps, gain)


def _keep_norm(ctx, inputs, output) -> None:
    z, bias, gain, _, *ctx.rest = inputs
    _keep(ctx, output, z, bias, gain)


def _keep(ctx, output, *tensors: Tensor) -> None:
    ctx.save_for_backward(*tensors, *output[-2:])
    ctx.set_materialize_grads(False)  # or z's gradient, which nobody asks for, would be a map of zeros


def _mix_gradients(ctx, grad, *unused):
    if grad is None:
        return (None,) * 7
    return *mix_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


def _norm_gradients(ctx, grad, *unused):
    if grad is None:
        return (None,) * 6
    return *norm_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


mix.register_autograd(_mix_gradients, setup_context=_keep_mix)
norm.register_autograd(_norm_gradients, setup_context=_keep_norm)
