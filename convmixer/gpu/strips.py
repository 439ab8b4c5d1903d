"""The depthwise convolution once more, with fewer products and less shared memory: Triton functions, and a kernel.

What kernels.py says of channel-major memory, tiles and windows holds here. The matrix that leads from a window to a
tile repeats itself from strip to strip, a strip being two or four rows: what leads from the window's strip c to the
tile's strip j depends on c - j alone. For k = 9 and strips of two rows, 5 matrices of 32 x 16 stand in the place of one
of 256 x 64 that is half zeros: 5 KiB of shared memory in the place of 32, and 160 multiply-adds an output in the place
of 256.

GELU is the network's to a relative error of 8e-5 with one exponential: value * (normal distribution below value) is
max(value, 0) - |value| * tail(|value|), and the logarithm of the tail is nearly a polynomial.

Nothing here has run on a GPU: docs/gpu.md says what is proven, and how it is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import MAX_KERNEL_SIZE, TILE, WINDOW, _place, _splits, _tiling

_SIDE = tl.constexpr(TILE)
_WINDOW = tl.constexpr(WINDOW)
_TAPS = tl.constexpr(triton.next_power_of_2(MAX_KERNEL_SIZE**2))
_LEFT = tl.constexpr((WINDOW - TILE) // 2)


@triton.constexpr_function
def _strips(rows):
    """Strips of ``rows`` rows in a tile. A function: the interpreter multiplies a tuple by no tl.constexpr."""
    return TILE // rows


@triton.constexpr_function
def _bands_of(kernel_size, rows):
    """Matrices that differ: from a tile's strip to the window's as many strips further down."""
    return (kernel_size - 1 + rows - 1) // rows + 1


@triton.jit
def _tail(t):
    """The normal distribution below -t, t >= 0: 2 to the power of a polynomial, right to 8e-5 of itself up to t = 9."""
    p = ((-9.77758889e-07 * t + 4.03974422e-05) * t - 7.23609318e-04) * t + 7.50289752e-03
    return tl.exp2((((p * t - 5.14463723e-02) * t - 4.61469673e-01) * t - 1.14989290) * t - 1.00009843)


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        t = tl.abs(value)
        return tl.maximum(value, 0.0) - t * _tail(t)  # NaN stays, as t is
    return tl.where(value < 0, 0.0, value)  # and not maximum(): NaN stays


@triton.jit
def _slope(value, ACTIVATION: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "gelu":
        tail = _tail(tl.abs(value))
        density = tl.exp2(value * value * -0.7213475204444817 - 1.3257480647361593)
        return tl.where(value < 0, tail, 1 - tail) + value * density
    return tl.where(value > 0, 1.0, 0.0)


@triton.jit
def _bands(taps, KERNEL: tl.constexpr, ROWS: tl.constexpr, dtype: tl.constexpr):
    """A channel's matrices from a window's strip to a tile's, (ROWS * 16, ROWS * 8) each; see above."""
    inside, output = tl.arange(0, ROWS * _WINDOW)[:, None], tl.arange(0, ROWS * _SIDE)[None, :]
    column = inside % _WINDOW - _LEFT - output % _SIDE + KERNEL // 2
    bands = ()
    for apart in tl.static_range(_bands_of(KERNEL, ROWS)):
        row = apart * ROWS + inside // _WINDOW - output // _SIDE
        tapped = (row >= 0) & (row < KERNEL) & (column >= 0) & (column < KERNEL)
        bands = bands + (tl.load(taps + row * KERNEL + column, mask=tapped, other=0.0).to(dtype),)  # noqa: RUF005
    return bands


@triton.jit
def _window(plane, exists, first, top, left, height, width, strip: tl.constexpr, KERNEL, ROWS: tl.constexpr):
    """A strip of the tiles' windows, (TILES, ROWS * 16); zeros outside of the pictures and below the last tap."""
    inside = tl.arange(0, ROWS * _WINDOW)
    row = strip * ROWS + inside // _WINDOW - KERNEL // 2
    column = inside % _WINDOW - _LEFT
    y, x = top[:, None] + row[None, :], left[:, None] + column[None, :]
    valid = exists[:, None] & (x.to(tl.uint32) < width) & (y.to(tl.uint32) < height)  # what is negative becomes large
    if (strip + 1) * ROWS > _SIDE + KERNEL - 1:
        valid &= row[None, :] < _SIDE + KERNEL // 2
    return tl.load(plane + first[:, None] + (row * width + column)[None, :], mask=valid, other=0.0)


@triton.jit
def _outputs(exists, first, top, left, height, width, strip: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of a strip of the tiles, and which of them are in the picture; (TILES, ROWS * 8) each."""
    output = tl.arange(0, ROWS * _SIDE)
    row, column = strip * ROWS + output // _SIDE, output % _SIDE
    valid = exists[:, None] & (top[:, None] + row[None, :] < height) & (left[:, None] + column[None, :] < width)
    return first[:, None] + (row * width + column)[None, :], valid


@triton.jit
def _added(totals, window, bands, strip: tl.constexpr, ROWS: tl.constexpr):
    """The tiles' strips, float32 (TILES, ROWS * 8) each, with what a strip of the windows adds to them."""
    added = ()
    for place in tl.static_range(_strips(ROWS)):
        total = totals[place]
        if strip >= place and strip - place < len(bands):
            total = tl.dot(window, bands[strip - place], total, input_precision="ieee")
        added = added + (total,)  # noqa: RUF005
    return added


@triton.jit
def _level(x, positions):
    """The mean of the first values."""
    first = tl.arange(0, 64)
    return tl.sum(tl.load(x + first, mask=first < positions, other=0.0).to(tl.float32), 0) / 64


@triton.jit
def _total(taps, KERNEL: tl.constexpr):
    tap = tl.arange(0, _TAPS)
    return tl.sum(tl.load(taps + tap, mask=tap < KERNEL * KERNEL, other=0.0), 0)


@triton.jit(do_not_specialize=["tiles", "height", "across", "down"])
def _convolve(
    x,  # (C, N, H, W)
    taps,  # (C, KERNEL, KERNEL), float32
    bias,  # (C,), float32, as scale and shift
    scale,
    shift,
    y,  # as x
    tiles,  # of all pictures
    height,
    width,
    across,  # tiles in a row of a picture
    down,
    KERNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES: tl.constexpr,  # tiles multiplied at a time
    ROWS: tl.constexpr,  # of a strip
    STAGES: tl.constexpr,
):
    channel = tl.program_id(0)
    plane = channel.to(tl.int64) * (tiles // (across * down)) * height * width
    x += plane
    y += plane
    bands = _bands(taps + channel * (KERNEL * KERNEL), KERNEL, ROWS, x.dtype.element_ty)
    start = tl.full((TILES, ROWS * _SIDE), 0.0, tl.float32) + tl.load(bias + channel)
    gain, offset = tl.load(scale + channel), tl.load(shift + channel)
    for block in tl.range(tl.program_id(1), (tiles + TILES - 1) // TILES, tl.num_programs(1), num_stages=STAGES):
        exists, first, top, left = _place(block, tiles, height, width, across, down, TILES)
        totals = (start,) * _strips(ROWS)
        for strip in tl.static_range(_strips(ROWS) + _bands_of(KERNEL, ROWS) - 1):
            window = _window(x, exists, first, top, left, height, width, strip, KERNEL, ROWS)
            totals = _added(totals, window, bands, strip, ROWS)
        for strip in tl.static_range(_strips(ROWS)):
            where, valid = _outputs(exists, first, top, left, height, width, strip, ROWS)
            residual = tl.load(x + where, mask=valid, other=0.0).to(tl.float32)
            total = _activated(totals[strip], ACTIVATION) * gain + offset + residual
            tl.store(y + where, total.to(y.dtype.element_ty), mask=valid)


CONVOLVE = {"TILES": 64, "ROWS": 2, "STAGES": 1, "num_warps": 4, "num_stages": 1}


def convolve(x: Tensor, taps: Tensor, bias: Tensor, activation: str, scale: Tensor, shift: Tensor) -> Tensor:
    """activation(depthwise(x) + bias) * scale + shift + x, as `kernels.convolve` says."""
    y, tiling = torch.empty_like(x), _tiling(x)
    if tiling["tiles"]:
        launch = _convolve[len(x), _splits(x, tiling["tiles"])]
        options = {"KERNEL": taps.shape[-1], "ACTIVATION": activation, **CONVOLVE}
        launch(x, taps.contiguous(), bias, scale, shift, y, **tiling, **options)
    return y
