"""The Triton kernels: ConvMixer with every convolution a product on the GPU's matrix units.

Why. Libraries compute a depthwise convolution on the vector units, one multiply-add at a time: 81 for each output of
a 9 x 9 kernel. The 1x1 convolutions beside it run on the matrix units, which are more than ten times as fast, so that
the smaller half of the arithmetic takes most of the time.

The depthwise convolution as a matrix product. Take one channel, and tiles of 8 x 8 outputs. A tile depends on a
window of 16 x 16 inputs (for k = 9: 8 + k - 1), and linearly: outputs = window @ band, where ``band`` is a 256 x 64
matrix that holds the channel's k * k taps, each 64 times, and zeros. All tiles of all pictures share it, so a channel
is one product of (tiles x 256) by (256 x 64). That is 256 multiply-adds an output in the place of 81, on units that
are faster by more than that. Smaller kernels need fewer rows of the window: 192 multiply-adds for k = 5. The window
always begins 4 columns to the left of its tile, so that a row of it is four aligned reads of 8 bytes; that is why k
is 9 at most (MAX_KERNEL_SIZE).

Memory is channel-major: a feature map is (C, N, H, W). Then a 1x1 convolution and both its gradients are plain matrix
products of (out, in) by (in, N * H * W) without any transposition; a channel's bias, norm and taps are constants of a
program; the windows above are read from memory that is contiguous; and batch norm's sums run over contiguous memory.

What surrounds the product rides along: bias, activation, batch norm as scale and shift, and the residual addition are
applied while the outputs are in registers, so that a block's first half reads its feature map once and writes it
once.

Gradients. The one of the inputs is the same convolution with the taps turned round. The one of the taps is the
product turned round: for each channel (64 x tiles) by (tiles x 256), the gradient of ``band``. Its entries that hold
the same tap lie on a diagonal, and `tap_gradient` sums them through a strided view. Nothing is added by atomics: on
one kind of GPU the same input gives the same bits.

Rounding. Products are exact and are added up in float32; taps and results are rounded to the dtype of the feature
map. The activation is GELU as the network has it (the one with erf), to a relative error of 7e-5.

Variants. Triton compiles a kernel anew for what it is told of its arguments. Of the whole numbers it is told of the
width alone, whether it is 1 or a multiple of 16, so that one compiled kernel serves all batches (convmixer/gpu/ahead.py
compiles them before there is a GPU). Configurations are written down, and not searched for on the machine: docs/gpu.md
has what was measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8  # the side of a tile of outputs
WINDOW = 16  # columns of a tile's window
MAX_KERNEL_SIZE = 9
DTYPES = (torch.bfloat16, torch.float16)  # what the matrix units multiply without rounding it first
INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter runs the kernels, on the CPU

_SIDE = tl.constexpr(TILE)
_OUTPUTS = tl.constexpr(TILE * TILE)
_WINDOW = tl.constexpr(WINDOW)
_LEFT = tl.constexpr((WINDOW - TILE) // 2)
_CHUNK = tl.constexpr(2 * WINDOW)  # two rows of a window are multiplied at a time


@triton.constexpr_function
def _chunks(kernel_size):
    """Pairs of rows in a window, which has TILE + k - 1 of them: an even number, for k is odd."""
    return (TILE + kernel_size - 1) // 2


@triton.jit
def _place(block, tiles, height, width, across, down, TILES: tl.constexpr):
    """Where the tiles of a block lie: whether they exist, their first element, and their first row and column."""
    tile = block * TILES + tl.arange(0, TILES)
    left = tile % across * _SIDE
    top = tile // across % down * _SIDE
    picture = tile // (across * down)
    return tile < tiles, (picture * height + top) * width + left, top, left


@triton.jit
def _window(plane, exists, first, top, left, height, width, chunk: tl.constexpr, KERNEL: tl.constexpr):
    """Rows 2 * chunk and 2 * chunk + 1 of the tiles' windows, (TILES, 32); zeros outside of the pictures."""
    inside = tl.arange(0, _CHUNK)
    row = chunk * 2 + inside // _WINDOW - KERNEL // 2
    column = inside % _WINDOW - _LEFT
    y, x = top[:, None] + row[None, :], left[:, None] + column[None, :]
    valid = exists[:, None] & (x.to(tl.uint32) < width) & (y.to(tl.uint32) < height)  # what is negative becomes large
    return tl.load(plane + first[:, None] + (row * width + column)[None, :], mask=valid, other=0.0)


@triton.jit
def _outputs(exists, first, top, left, height, width):
    """Offsets of the tiles' outputs in the channel's plane, and which of them are in the picture; (TILES, 64) each."""
    output = tl.arange(0, _OUTPUTS)
    row, column = output // _SIDE, output % _SIDE
    valid = exists[:, None] & (top[:, None] + row[None, :] < height) & (left[:, None] + column[None, :] < width)
    return first[:, None] + (row * width + column)[None, :], valid


@triton.jit
def _activated(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        # value * (normal distribution below value). The tail below -t is exp(-t * t / 2) times a function that is
        # smooth in 1 / (1 + 0.45 t); the polynomial was fitted to the least relative error, 7e-5 up to t = 9. bfloat16
        # rounds by 30 times that. With 0.5 * (1 + erf) the loop of _convolve has 1,835 instructions for 1,024 outputs
        # on an H200, and 1,417 like this; and float32 has no right digit of 1 + erf below -6.
        u = 1 / (1 + 0.45 * tl.abs(value))
        tail = (((-0.12457927 * u + 0.32649165) * u + 0.10574913) * u + 0.19333852) * u - 0.00097901
        tail *= tl.exp2(value * value * -0.7213475204444817)
        return value * tl.where(value < 0, tail, 1 - tail)
    return tl.where(value < 0, 0.0, value)  # and not maximum(): NaN stays


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
    ACTIVATION: tl.constexpr,  # "gelu", "relu", or "": the convolution alone, without activation, norm and residual
    TILES: tl.constexpr,  # tiles multiplied at a time
    STAGES: tl.constexpr,
):
    channel = tl.program_id(0)
    plane = channel.to(tl.int64) * (tiles // (across * down)) * height * width
    x += plane
    y += plane

    inside, output = tl.arange(0, _CHUNK), tl.arange(0, _OUTPUTS)
    band = ()
    for chunk in tl.static_range(_chunks(KERNEL)):
        # Which tap leads from an element of the window to an output.
        row = (chunk * 2 + inside // _WINDOW)[:, None] - (output // _SIDE)[None, :]
        column = (inside % _WINDOW - _LEFT)[:, None] - (output % _SIDE)[None, :] + KERNEL // 2
        tapped = (row >= 0) & (row < KERNEL) & (column >= 0) & (column < KERNEL)
        tap = tl.load(taps + channel * (KERNEL * KERNEL) + row * KERNEL + column, mask=tapped, other=0.0)
        band = band + (tap.to(x.dtype.element_ty),)  # noqa: RUF005  Triton has no other way to append

    for block in tl.range(tl.program_id(1), (tiles + TILES - 1) // TILES, tl.num_programs(1), num_stages=STAGES):
        exists, first, top, left = _place(block, tiles, height, width, across, down, TILES)
        total = tl.full((TILES, _OUTPUTS), 0.0, tl.float32)
        for chunk in tl.static_range(_chunks(KERNEL)):
            window = _window(x, exists, first, top, left, height, width, chunk, KERNEL)
            total = tl.dot(window, band[chunk], total, input_precision="ieee")
        where, valid = _outputs(exists, first, top, left, height, width)
        total += tl.load(bias + channel)
        if ACTIVATION != "":
            residual = tl.load(x + where, mask=valid, other=0.0).to(tl.float32)
            total = _activated(total, ACTIVATION) * tl.load(scale + channel) + tl.load(shift + channel) + residual
        tl.store(y + where, total.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["tiles", "height", "across", "down", "channels"])
def _differentiate(
    x,  # (C, N, H, W)
    grad,  # of the convolution's output; as x
    partial,  # (splits, C, 64, rows of a window, 16), float32: sums of window times output gradient
    tiles,
    height,
    width,
    across,
    down,
    channels,
    KERNEL: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    channel, split = tl.program_id(0), tl.program_id(1)
    plane = channel.to(tl.int64) * (tiles // (across * down)) * height * width
    x += plane
    grad += plane
    totals = (tl.full((_OUTPUTS, _CHUNK), 0.0, tl.float32),) * _chunks(KERNEL)
    for block in tl.range(split, (tiles + TILES - 1) // TILES, tl.num_programs(1), num_stages=STAGES):
        exists, first, top, left = _place(block, tiles, height, width, across, down, TILES)
        where, valid = _outputs(exists, first, top, left, height, width)
        of_outputs = tl.trans(tl.load(grad + where, mask=valid, other=0.0))
        added = ()
        for chunk in tl.static_range(_chunks(KERNEL)):
            window = _window(x, exists, first, top, left, height, width, chunk, KERNEL)
            added = added + (tl.dot(of_outputs, window, totals[chunk], input_precision="ieee"),)  # noqa: RUF005
        totals = added
    size: tl.constexpr = _chunks(KERNEL) * _CHUNK  # of a window
    partial += (split * channels + channel).to(tl.int64) * (_OUTPUTS * size)
    for chunk in tl.static_range(_chunks(KERNEL)):
        where = tl.arange(0, _OUTPUTS)[:, None] * size + chunk * _CHUNK + tl.arange(0, _CHUNK)[None, :]
        tl.store(partial + where, totals[chunk])


@triton.jit
def _activate(z, bias, scale, shift, y, positions, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.program_id(1)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = channel.to(tl.int64) * positions + position
    value = tl.load(z + where, mask=position < positions, other=0.0).to(tl.float32) + tl.load(bias + channel)
    value = _activated(value, ACTIVATION) * tl.load(scale + channel) + tl.load(shift + channel)
    tl.store(y + where, value.to(y.dtype.element_ty), mask=position < positions)


PROGRAMS = 1024  # wanted at least: some for each of a large GPU's 132 multiprocessors
ACTIVATE_BLOCK = 1024  # elements of a program


def _configuration(tiles: int, warps: int, stages: int) -> dict[str, int]:
    return {"TILES": tiles, "STAGES": stages, "num_warps": warps, "num_stages": stages}


def convolve_configuration(capability: int, kernel_size: int, activation: str) -> dict[str, int]:
    """What `_convolve` is launched with. capability: 90 for compute capability 9.0."""
    if capability // 10 == 10:  # with stages, the loop has four times the instructions there
        return _configuration(64, 4, 1)
    return _configuration(64, 4, 3 if kernel_size <= 5 and not activation else 2)  # the fastest on an H200


def differentiate_configuration(capability: int) -> dict[str, int]:
    """What `_differentiate` is launched with."""
    if capability // 10 == 10:
        return _configuration(64, 8, 1)
    if capability // 10 == 9:
        return _configuration(64, 8, 2)  # the fastest on an H200
    return _configuration(32, 4, 1)  # 64 tiles do not fit into the registers: up to 3,856 bytes a thread are spilled


def _capability() -> int:
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def _splits(x: Tensor, tiles: int) -> int:
    """Programs that share a channel: more where there are few channels, while each has 128 tiles."""
    return max(1, min(-(-PROGRAMS // len(x)), tiles // 128))


def _tiling(x: Tensor) -> dict[str, int]:
    """The kernels' whole-number arguments."""
    _, pictures, height, width = x.shape
    across, down = -(-width // TILE), -(-height // TILE)
    return {"tiles": pictures * across * down, "height": height, "width": width, "across": across, "down": down}


def convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor,
    activation: str = "",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The depthwise convolution of x (C, N, H, W) with taps (C, k, k) and "same" padding; gives a tensor like x.

    With an ``activation``, "gelu" or "relu": activation(convolution + bias) * scale + shift + x. x has a dtype of
    DTYPES and is contiguous, k is odd and at most MAX_KERNEL_SIZE, and all else is float32; bias, scale and shift (C,).
    """
    y = torch.empty_like(x)
    taps, tiling = taps.contiguous(), _tiling(x)
    if tiling["tiles"]:
        vectors = (bias, bias if scale is None else scale, bias if shift is None else shift)
        kernel_size = taps.shape[-1]
        options = convolve_configuration(_capability(), kernel_size, activation)
        launch = _convolve[len(x), _splits(x, tiling["tiles"])]
        launch(x, taps, *vectors, y, **tiling, KERNEL=kernel_size, ACTIVATION=activation, **options)
    return y


def tap_gradient(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """The gradient of `convolve`'s taps, float32 (C, k, k), from x and the output's gradient, alike and contiguous."""
    tiling, window = _tiling(x), (TILE + kernel_size - 1) * WINDOW
    splits = _splits(x, tiling["tiles"])
    partial = torch.empty(splits, len(x), TILE * TILE, window, dtype=torch.float32, device=x.device)
    if not tiling["tiles"]:
        return partial.new_zeros(len(x), kernel_size, kernel_size)
    options = differentiate_configuration(_capability())
    _differentiate[len(x), splits](x, grad, partial, **tiling, channels=len(x), KERNEL=kernel_size, **options)
    # Output (i, j) and tap (r, s) meet in the window's row i + r and column j + s + (what the kernel is narrower by).
    row, k = TILE * window, kernel_size
    diagonals = partial.as_strided(
        (splits, len(x), TILE, TILE, k, k),
        (len(x) * TILE * row, TILE * row, row + WINDOW, window + 1, WINDOW, 1),
        (WINDOW - TILE) // 2 - k // 2,
    )
    return diagonals.sum((0, 2, 3))


def activate(z: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    """activation(z + bias) * scale + shift of z (C, ...), contiguous; bias, scale and shift are float32 (C,)."""
    y, positions = torch.empty_like(z), z[0].numel()
    if positions:
        grid = (triton.cdiv(positions, ACTIVATE_BLOCK), len(z))
        _activate[grid](z, bias, scale, shift, y, positions, ACTIVATION=activation, BLOCK=ACTIVATE_BLOCK)
    return y
