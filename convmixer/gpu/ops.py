"""ConvMixer's steps on channel-major feature maps, (C, N, H, W): through Triton where it can, else through PyTorch.

They are registered operators (``torch.ops.convmixer``), so torch.compile and CUDA graphs work around them. Which way
a call goes is decided by its tensors (`triton_runs`). The plain way computes the same: products of the rounded
inputs, added up in float32 at least, and one rounding at the end.
"""

import functools
import os
import warnings

import torch
from torch import Tensor, nn

from ..engine import GPU_KERNEL_CAPABILITY

try:
    from . import kernels, strips
except ImportError:  # PyTorch for the CPU, for macOS or for Windows comes without Triton
    kernels = strips = None

STRIPS = os.environ.get("CONVMIXER_GPU_STRIPS") == "1"  # inference through strips.py, which has met no GPU: docs/gpu.md

ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}


def triton_runs(x: Tensor, kernel_size: int = 1) -> bool:
    """Whether the Triton kernels run for ``x``: on a GPU of compute capability 8 or more, in 16 bits, up to 9 x 9."""
    if kernels is None or x.dtype not in kernels.DTYPES or kernel_size > kernels.MAX_KERNEL_SIZE:
        return False
    return x.is_cuda and _triton_works(x.device.index)


def triton_works(device: torch.device | str) -> bool:
    """Whether the Triton kernels run on a GPU."""
    index = torch.device(device).index
    return _triton_works(torch.cuda.current_device() if index is None else index)


@functools.cache
def _triton_works(index: int) -> bool:
    """Tries a small kernel on a GPU, once: Triton wants a C compiler and Python's headers, which may be missing."""
    if kernels is None or torch.version.hip or torch.cuda.get_device_capability(index) < GPU_KERNEL_CAPABILITY:
        return False
    try:
        with torch.cuda.device(index):
            one = torch.ones(1, device="cuda")
            few = torch.ones(1, 16, device="cuda", dtype=torch.bfloat16)  # 16: the variant that networks use, too
            kernels.activate(few, one, one, one, "relu")
    except Exception as error:  # of whatever kind, the network still runs
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"Triton cannot be used ({reason}); PyTorch's operators are", stacklevel=2)
        return False
    return True


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _convolved(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The convolution by PyTorch, in float32 or float64."""
    wide = _wide(x).transpose(0, 1)
    taps = taps.to(x.dtype).to(wide.dtype)  # rounded as the matrix units take them
    out = nn.functional.conv2d(wide, taps.unsqueeze(1), bias.to(wide.dtype), padding=taps.shape[-1] // 2, groups=len(x))
    return out.transpose(0, 1)


def _surround(z: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](z) * _by_channel(scale, z) + _by_channel(shift, z)


def _by_channel(vector: Tensor, z: Tensor) -> Tensor:
    return vector.to(z.dtype).view(-1, *[1] * (z.ndim - 1))


@torch.library.custom_op("convmixer::depthwise", mutates_args=())
def depthwise(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """A depthwise convolution with stride 1 and "same" padding; has gradients.

    x: (C, N, H, W), any floating dtype, which is the result's. taps: float32 (C, k, k), k odd. bias: float32 (C,).
    """
    if triton_runs(x, taps.shape[-1]):
        return kernels.convolve(x.contiguous(), taps, bias)
    return _convolved(x, taps, bias).to(x.dtype).contiguous()


@torch.library.custom_op("convmixer::depthwise_taps", mutates_args=())
def depthwise_taps(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """The gradient of `depthwise`'s taps, (C, k, k), float32 or float64, from x and the output's gradient, alike."""
    if triton_runs(x, kernel_size):
        return kernels.tap_gradient(x.contiguous(), grad.contiguous(), kernel_size)
    wide = _wide(x).transpose(0, 1)
    shape, pad = (len(x), 1, kernel_size, kernel_size), kernel_size // 2
    return nn.grad.conv2d_weight(wide, shape, _wide(grad).transpose(0, 1), padding=pad, groups=len(x)).squeeze(1)


@torch.library.custom_op("convmixer::mix_positions", mutates_args=())
def mix_positions(x: Tensor, taps: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    """A block's first half, for inference: activation(depthwise(x)) * scale + shift + x; "gelu" or "relu".

    Shapes and dtypes as in `depthwise`; scale and shift, batch norm's, are float32 (C,).
    """
    if triton_runs(x, taps.shape[-1]):
        convolve = strips.convolve if STRIPS else kernels.convolve
        return convolve(x.contiguous(), taps, bias, activation, scale, shift)
    mixed = _surround(_convolved(x, taps, bias), scale, shift, activation) + x
    return mixed.to(x.dtype).contiguous()


@torch.library.custom_op("convmixer::activate", mutates_args=())
def activate(z: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    """What follows a product in inference: activation(z + bias) * scale + shift; z (C, ...), else float32 (C,)."""
    if triton_runs(z):
        return kernels.activate(z.contiguous(), bias, scale, shift, activation)
    return _surround(_wide(z) + _by_channel(bias, _wide(z)), scale, shift, activation).to(z.dtype).contiguous()


@depthwise.register_fake
def _(x, taps, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@depthwise_taps.register_fake
def _(x, grad, kernel_size):
    return x.new_empty(len(x), kernel_size, kernel_size, dtype=_wide(x.new_empty(0)).dtype)


@mix_positions.register_fake
def _(x, taps, bias, scale, shift, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@activate.register_fake
def _(z, bias, scale, shift, activation):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:
    x, taps, _ = inputs
    ctx.save_for_backward(x, taps)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, taps = ctx.saved_tensors
    of_x = of_taps = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = depthwise(grad, taps.flip(1, 2), taps.new_zeros(len(x)))
    if ctx.needs_input_grad[1]:
        of_taps = depthwise_taps(x, grad, taps.shape[-1]).to(taps.dtype)
    if ctx.needs_input_grad[2]:
        of_bias = grad.sum((1, 2, 3), dtype=taps.dtype)
    return of_x, of_taps, of_bias


depthwise.register_autograd(_backward, setup_context=_keep)
