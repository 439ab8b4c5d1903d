"""Triton kernels that take half a block at a time: convolution, activation, batch norm and residual, forward and back.

The depthwise convolution and batch norm both stay within a channel, batch statistics and all gradients included. So a
program that owns a channel needs no other: it makes the convolution and the statistics in a first loop, and in a second
one, over what is then still in the L2 cache, it normalises. The second half of a block is the same behind a
product, one program a row. A loop that reads what other threads of the program wrote in the one before stands
behind a barrier.

Statistics are sums of differences from a pivot, and of their squares. The pivot is the activation of about the mean of
what goes into it, so that no digits are lost where the mean is large.

Nothing here has run on a GPU: docs/gpu.md says what is proven, and how it is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import TILE, WINDOW, _capability, _place, _tiling
from .strips import _activated, _added, _bands, _bands_of, _level, _outputs, _slope, _strips, _total, _window

_SIDE, _WINDOW = tl.constexpr(TILE), tl.constexpr(WINDOW)
_GROUP = tl.constexpr(64)  # neighbours in a row of a block


@triton.jit
def _moments(first, second, pivot, positions):
    """Mean and biased variance, from the lanes' sums of differences from ``pivot`` and of their squares."""
    apart = tl.sum(tl.sum(first, 0), 0) / positions
    return pivot + apart, tl.maximum(tl.sum(tl.sum(second, 0), 0) / positions - apart * apart, 0.0)


@triton.jit
def _positions(start, positions, BLOCK: tl.constexpr):
    """A block of a row, (BLOCK / 64, 64), and which of it there is."""
    where = start + tl.arange(0, BLOCK // _GROUP)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    return where, where < positions


@triton.jit
def _normalise(z, bias, mean, scale, shift, x, y, positions, ACTIVATION, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr):
    """y = (activation(z + bias) - mean) * scale + shift, plus x."""
    for start in range(0, positions, BLOCK):
        where, valid = _positions(start, positions, BLOCK)
        value = _activated(tl.load(z + where, mask=valid, other=0.0).to(tl.float32) + bias, ACTIVATION)
        value = (value - mean) * scale + shift
        if RESIDUAL:
            value += tl.load(x + where, mask=valid, other=0.0).to(tl.float32)
        tl.store(y + where, value.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _differentiate(
    grad,
    z,
    b,
    gains,
    means,
    variances,
    of_z,
    of_bias,
    of_gain,
    of_offset,
    positions,
    eps,
    ACTIVATION,
    BLOCK: tl.constexpr,
):
    """Writes the gradients of z + b and of the vectors."""
    channel = tl.program_id(0)
    mean, inverse = tl.load(means + channel), tl.rsqrt(tl.load(variances + channel) + eps)
    scale = tl.load(gains + channel) * inverse
    by_gain = tl.full((BLOCK // _GROUP, _GROUP), 0.0, tl.float32)
    by_offset, by_bias = by_gain, by_gain
    for start in range(0, positions, BLOCK):
        where, valid = _positions(start, positions, BLOCK)
        value = tl.load(z + where, mask=valid, other=0.0).to(tl.float32) + b
        slope = tl.load(grad + where, mask=valid, other=0.0).to(tl.float32)
        by_offset += slope
        by_gain += slope * (_activated(value, ACTIVATION) - mean)
    total_gain, total_offset = tl.sum(tl.sum(by_gain, 0), 0) * inverse, tl.sum(tl.sum(by_offset, 0), 0)
    along, level = total_gain * inverse / positions, total_offset / positions
    for start in range(0, positions, BLOCK):
        where, valid = _positions(start, positions, BLOCK)
        value = tl.load(z + where, mask=valid, other=0.0).to(tl.float32) + b
        slope = tl.load(grad + where, mask=valid, other=0.0).to(tl.float32)
        slope -= level + (_activated(value, ACTIVATION) - mean) * along
        slope = tl.where(valid, slope * scale * _slope(value, ACTIVATION), 0.0)
        by_bias += slope
        tl.store(of_z + where, slope.to(of_z.dtype.element_ty), mask=valid)
    tl.store(of_bias + channel, tl.sum(tl.sum(by_bias, 0), 0))
    tl.store(of_gain + channel, total_gain)
    tl.store(of_offset + channel, total_offset)


@triton.jit(do_not_specialize=["tiles", "height", "across", "down"])
def _mix(
    x,  # (C, N, H, W)
    taps,  # (C, KERNEL, KERNEL), float32
    bias,  # (C,), float32, as all that is called so
    gain,
    offset,
    z,  # the convolution with its bias; as x
    y,  # as x
    means,  # (C,), float32, as variances: written
    variances,
    tiles,
    height,
    width,
    across,
    down,
    eps,
    KERNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,  # of a strip
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0)
    positions = tiles // (across * down) * height * width
    x += channel.to(tl.int64) * positions
    y += channel.to(tl.int64) * positions
    z += channel.to(tl.int64) * positions
    taps += channel * (KERNEL * KERNEL)
    bands = _bands(taps, KERNEL, ROWS, x.dtype.element_ty)
    b = tl.load(bias + channel)
    pivot = _activated(_level(x, positions) * _total(taps, KERNEL) + b, ACTIVATION)
    first_sum = tl.full((TILES, ROWS * _SIDE), 0.0, tl.float32)
    second_sum = first_sum
    for block in range(0, (tiles + TILES - 1) // TILES):
        exists, first, top, left = _place(block, tiles, height, width, across, down, TILES)
        totals = (tl.full((TILES, ROWS * _SIDE), 0.0, tl.float32) + b,) * _strips(ROWS)
        for strip in tl.static_range(_strips(ROWS) + _bands_of(KERNEL, ROWS) - 1):
            window = _window(x, exists, first, top, left, height, width, strip, KERNEL, ROWS)
            totals = _added(totals, window, bands, strip, ROWS)
        for strip in tl.static_range(_strips(ROWS)):
            where, valid = _outputs(exists, first, top, left, height, width, strip, ROWS)
            tl.store(z + where, totals[strip].to(z.dtype.element_ty), mask=valid)
            apart = tl.where(valid, _activated(totals[strip], ACTIVATION) - pivot, 0.0)
            first_sum += apart
            second_sum += apart * apart
    mean, variance = _moments(first_sum, second_sum, pivot, positions)
    tl.store(means + channel, mean)
    tl.store(variances + channel, variance)
    tl.debug_barrier()  # other threads of this program read z
    scale = tl.load(gain + channel) * tl.rsqrt(variance + eps)
    _normalise(z, 0.0, mean, scale, tl.load(offset + channel), x, y, positions, ACTIVATION, BLOCK, True)


@triton.jit(do_not_specialize=["tiles", "height", "across", "down"])
def _unmix(
    grad,  # of y; (C, N, H, W), as x, z, of_z and of_x
    x,
    z,
    taps,  # turned round
    gain,
    means,
    variances,
    of_z,  # written, as all that follows
    of_x,
    partial,  # (C, bands, ROWS * 16, ROWS * 8), float32: sums of windows of of_z times x
    of_bias,  # (C,), float32
    of_gain,
    of_offset,
    tiles,
    height,
    width,
    across,
    down,
    eps,
    KERNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,  # of a strip
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0)
    positions = tiles // (across * down) * height * width
    grad += channel.to(tl.int64) * positions
    x += channel.to(tl.int64) * positions
    z += channel.to(tl.int64) * positions
    of_z += channel.to(tl.int64) * positions
    of_x += channel.to(tl.int64) * positions
    maps, vectors = (grad, z, 0.0, gain, means, variances, of_z), (of_bias, of_gain, of_offset)
    _differentiate(*maps, *vectors, positions, eps, ACTIVATION, BLOCK)
    tl.debug_barrier()  # other threads of this program read of_z
    bands = _bands(taps + channel * (KERNEL * KERNEL), KERNEL, ROWS, x.dtype.element_ty)
    of_bands = (tl.full((ROWS * _WINDOW, ROWS * _SIDE), 0.0, tl.float32),) * _bands_of(KERNEL, ROWS)
    for block in range(0, (tiles + TILES - 1) // TILES):
        exists, first, top, left = _place(block, tiles, height, width, across, down, TILES)
        tiled = ()
        for strip in tl.static_range(_strips(ROWS)):
            where, valid = _outputs(exists, first, top, left, height, width, strip, ROWS)
            tiled = tiled + (tl.load(x + where, mask=valid, other=0.0),)  # noqa: RUF005
        totals = (tl.full((TILES, ROWS * _SIDE), 0.0, tl.float32),) * _strips(ROWS)
        for strip in tl.static_range(_strips(ROWS) + _bands_of(KERNEL, ROWS) - 1):
            window = _window(of_z, exists, first, top, left, height, width, strip, KERNEL, ROWS)
            totals = _added(totals, window, bands, strip, ROWS)
            summed = ()
            for apart in tl.static_range(_bands_of(KERNEL, ROWS)):
                total = of_bands[apart]
                if strip >= apart and strip - apart < _strips(ROWS):
                    total = tl.dot(tl.trans(window), tiled[strip - apart], total, input_precision="ieee")
                summed = summed + (total,)  # noqa: RUF005
            of_bands = summed
        for strip in tl.static_range(_strips(ROWS)):
            where, valid = _outputs(exists, first, top, left, height, width, strip, ROWS)
            total = totals[strip] + tl.load(grad + where, mask=valid, other=0.0).to(tl.float32)
            tl.store(of_x + where, total.to(of_x.dtype.element_ty), mask=valid)
    size: tl.constexpr = ROWS * _WINDOW * ROWS * _SIDE
    entry = tl.arange(0, ROWS * _WINDOW)[:, None] * (ROWS * _SIDE) + tl.arange(0, ROWS * _SIDE)[None, :]
    for apart in tl.static_range(_bands_of(KERNEL, ROWS)):
        tl.store(partial + (channel * _bands_of(KERNEL, ROWS) + apart) * size + entry, of_bands[apart])


@triton.jit
def _norm(z, bias, gain, offset, y, means, variances, positions, eps, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(0)
    z += channel.to(tl.int64) * positions
    y += channel.to(tl.int64) * positions
    b = tl.load(bias + channel)
    pivot = _activated(_level(z, positions) + b, ACTIVATION)
    first_sum = tl.full((BLOCK // _GROUP, _GROUP), 0.0, tl.float32)
    second_sum = first_sum
    for start in range(0, positions, BLOCK):
        where, valid = _positions(start, positions, BLOCK)
        value = _activated(tl.load(z + where, mask=valid, other=0.0).to(tl.float32) + b, ACTIVATION)
        apart = tl.where(valid, value - pivot, 0.0)
        first_sum += apart
        second_sum += apart * apart
    mean, variance = _moments(first_sum, second_sum, pivot, positions)
    tl.store(means + channel, mean)
    tl.store(variances + channel, variance)
    scale = tl.load(gain + channel) * tl.rsqrt(variance + eps)
    _normalise(z, b, mean, scale, tl.load(offset + channel), z, y, positions, ACTIVATION, BLOCK, False)


@triton.jit
def _unnorm(
    grad,
    z,
    bias,
    gain,
    means,
    variances,
    of_z,
    of_bias,
    of_gain,
    of_offset,
    positions,
    eps,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0)
    plane, b = channel.to(tl.int64) * positions, tl.load(bias + channel)
    maps, vectors = (grad + plane, z + plane, b, gain, means, variances, of_z + plane), (of_bias, of_gain, of_offset)
    _differentiate(*maps, *vectors, positions, eps, ACTIVATION, BLOCK)


MIX = {"TILES": 64, "ROWS": 2, "BLOCK": 2048, "num_warps": 4, "num_stages": 1}
NORM = {"BLOCK": 4096, "num_warps": 8}


def unmix_configuration(capability: int) -> dict[str, int]:
    """What `_unmix` is launched with. capability: 90 for compute capability 9.0."""
    tiles = 64 if capability // 10 in (9, 10) else 32  # more do not fit into the registers
    return {"TILES": tiles, "ROWS": 4, "BLOCK": 2048, "num_warps": 4, "num_stages": 1}


def _vectors(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(count))


def mix(x: Tensor, taps: Tensor, bias: Tensor, gain: Tensor, offset: Tensor, eps: float, activation: str):
    """norm(activation(depthwise(x))) + x with batch statistics: (y, the convolution, its activation's mean, variance).

    As in `kernels.convolve`; gain and offset are batch norm's, mean and biased variance float32 (C,).
    """
    y, z, (mean, variance) = torch.empty_like(x), torch.empty_like(x), _vectors(x, 2)
    options = {"KERNEL": taps.shape[-1], "ACTIVATION": activation, **MIX}
    _mix[(len(x),)](x, taps.contiguous(), bias, gain, offset, z, y, mean, variance, **_tiling(x), eps=eps, **options)
    return y, z, mean, variance


def unmix(grad: Tensor, x: Tensor, z: Tensor, taps, gain, mean, variance, eps: float, activation: str):
    """The gradients of `mix`'s x, taps, bias, gain and offset from its results and the gradient of y."""
    k, (of_z, of_x) = taps.shape[-1], (torch.empty_like(x), torch.empty_like(x))
    configuration = unmix_configuration(_capability())
    strip = configuration["ROWS"]
    rows = ((k + strip - 2) // strip + 1) * strip
    partial = torch.empty(len(x), rows, WINDOW, strip, TILE, dtype=torch.float32, device=x.device)
    vectors = _vectors(x, 3)
    options = {"KERNEL": k, "ACTIVATION": activation, **configuration}
    inputs = grad, x, z, taps.flip(1, 2).contiguous(), gain, mean, variance
    _unmix[(len(x),)](*inputs, of_z, of_x, partial, *vectors, **_tiling(x), eps=eps, **options)
    # Output (i, j) of a strip and tap (r, s) meet in row i + r of the window, column j + s + what k is narrower by.
    whole, row, column, i, j = partial.stride()
    strides, start = (whole, row + i, column + j, row, column), ((WINDOW - TILE) // 2 - k // 2) * column
    diagonals = partial.as_strided((len(x), strip, TILE, k, k), strides, start)
    return of_x, diagonals.sum((1, 2)).flip(1, 2), *vectors


def norm(z: Tensor, bias: Tensor, gain: Tensor, offset: Tensor, eps: float, activation: str):
    """Batch norm of activation(z + bias) with batch statistics: (y, mean, biased variance); z (C, ...)."""
    y, (mean, variance) = torch.empty_like(z), _vectors(z, 2)
    launch = _norm[(len(z),)]
    launch(z, bias, gain, offset, y, mean, variance, z[0].numel(), eps, ACTIVATION=activation, **NORM)
    return y, mean, variance


def unnorm(grad: Tensor, z: Tensor, bias: Tensor, gain, mean, variance, eps: float, activation: str):
    """The gradients of `norm`'s z, bias, gain and offset."""
    of_z, vectors = torch.empty_like(z), _vectors(z, 3)
    inputs = grad, z, bias, gain, mean, variance
    _unnorm[(len(z),)](*inputs, of_z, *vectors, z[0].numel(), eps, ACTIVATION=activation, **NORM)
    return of_z, *vectors
