"""What a network has learnt, as pictures: its filters as contact sheets, and a picture's features stage by stage.

After the figures of patch embeddings and depthwise kernels in Trockman and Kolter, "Patches Are All You Need?",
https://arxiv.org/abs/2201.09792. The filters are those of the weights alone, in the order of the channels.

A stage is a place in the network where features can be looked at: stage 0 is the stem, stage i the output of block
i - 1; a network of ``depth`` blocks has the stages 0 to ``depth``.
"""

import math
from itertools import permutations

import numpy as np
from PIL import Image

SHEET_WIDTH = 1050  # pixels that a sheet's width comes as close to as whole scales allow ...
WIDEST_TILE = 256  # ... without a tile larger than this
SHEET_ASPECT = 3 / 2
GAP = 1 / 24  # of a tile's width
STRONGEST = 16
CONSTANT = 128  # mid grey: a tile without contrast
ROUNDING = 1e-5  # differences smaller than this part of the values are rounding, and not stretched to full contrast
# Light enough at zero and dark enough at the ends to read on white and on dark pages, and to the colour-blind.
ZERO, POSITIVE, NEGATIVE = np.array([(225, 225, 225), (200, 75, 0), (0, 60, 160)])


def contact_sheet(tiles: np.ndarray, columns: int | None = None) -> Image.Image:
    """Tiles in rows from the top left, as one RGBA image of about SHEET_WIDTH; transparent between and behind them.

    tiles: uint8 (n, h, w) grey or (n, h, w, 3) RGB. columns: by default so that the sheet is about 3:2 and its last row
    nearly full.
    """
    count, height, width = tiles.shape[:3]
    columns = columns or _columns(count, height, width)
    scale = _scale(columns, width, max(height, width))
    gap = max(1, int(scale * width * GAP))
    rows = math.ceil(count / columns)
    # Every place is a tile with a gap to its right and below; the last ones are cut off.
    places = np.zeros((rows * columns, scale * height + gap, scale * width + gap, 4), np.uint8)
    pixels = tiles if tiles.ndim == 4 else tiles[..., None]
    places[:count, : scale * height, : scale * width, :3] = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    places[:count, : scale * height, : scale * width, 3] = 255
    sheet = places.reshape(rows, columns, *places.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * places.shape[1], columns * places.shape[2], 4)
    return Image.fromarray(np.ascontiguousarray(sheet[: len(sheet) - gap, : sheet.shape[1] - gap]))


def patch_filters(weight: np.ndarray) -> Image.Image:
    """The stem's filters, (dim, in_chans, p, p), in colour: what each channel looks for in a patch.

    Each tile runs from its own least weight to its own greatest, over its channels together. Filters for other than
    three channels are grey: their mean over the channels.
    """
    weight = weight.astype(np.float64)  # in which no span or square of float32 values overflows
    tiles = weight.transpose(0, 2, 3, 1) if weight.shape[1] == 3 else weight.mean(1)
    return contact_sheet(_min_max(tiles))


def depthwise_filters(weight: np.ndarray) -> Image.Image:
    """The depthwise filters, (dim, 1, k, k), of one block: how each channel is mixed in space.

    Positive weights are orange, negative ones blue and zero is pale grey; each tile is relative to its own largest
    absolute weight. Unlike grey from minimum to maximum, this shows what a filter adds, subtracts and leaves out.
    """
    weight = weight[:, 0].astype(np.float64)
    largest = abs(weight).max((1, 2), keepdims=True)
    relative = (weight / np.where(largest > 0, largest, 1))[..., None]
    tiles = ZERO + abs(relative) * (np.where(relative > 0, POSITIVE, NEGATIVE) - ZERO)
    return contact_sheet(np.uint8(np.rint(tiles)))


def feature_maps(features: np.ndarray) -> list[Image.Image]:
    """How one picture changes on its way through the network: an RGB image for each stage, the stem first.

    features: (depth + 1, dim, h, w), as `Classifier.features` gives them. A position has as many pixels as fit into
    WIDEST_TILE.

    A position's red, green and blue are the first three principal components of the stage's features over the
    positions, each from its minimum to its maximum within 2.5 standard deviations. In the stem the first is red, and
    each is bright where it is strongest; from then on, order and signs are those that correlate most with the stage
    before.
    """
    images, maps = [], None
    for stage in features:
        before, maps = maps, _principal_maps(stage.astype(np.float64))
        if before is not None:
            maps = _aligned(maps, before)
        spread = 2.5 * maps.std((1, 2), keepdims=True)
        tile = _min_max(maps.clip(-spread, spread)).transpose(1, 2, 0)
        each = max(1, WIDEST_TILE // max(tile.shape[:2]))
        images.append(Image.fromarray(tile.repeat(each, axis=0).repeat(each, axis=1)))
    return images


def strongest_channels(features: np.ndarray, columns: int | None = None) -> Image.Image:
    """The STRONGEST channels of one stage that vary most over one picture, strongest first; all where there are fewer.

    features: (dim, h, w). The tiles are grey, each from its least value to its greatest. columns: as in
    `contact_sheet`.
    """
    features = features.astype(np.float64)
    order = np.argsort(-features.var((1, 2)), kind="stable")[:STRONGEST]  # stable: the same order of equals everywhere
    return contact_sheet(_min_max(features[order]), columns)


def _columns(count: int, height: int, width: int) -> int:
    """How many tiles a row: near SHEET_ASPECT, with few empty places in the last row."""

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        aspect = columns * width / (rows * height)
        return abs(math.log(aspect / SHEET_ASPECT)) + 4 * (1 - count / (rows * columns))

    return min(range(1, count + 1), key=cost)


def _scale(columns: int, width: int, longer: int) -> int:
    return max(1, min(round(SHEET_WIDTH / (columns * width * (1 + GAP))), WIDEST_TILE // longer))


def _min_max(tiles: np.ndarray) -> np.ndarray:
    """Each tile of (n, ...) from its minimum to its maximum as uint8 0 to 255."""
    flat = tiles.reshape(len(tiles), -1)
    low, span = flat.min(1, keepdims=True), np.ptp(flat, axis=1, keepdims=True)
    constant = span <= ROUNDING * abs(flat).max(1, keepdims=True)
    scaled = np.where(constant, CONSTANT, 255 * (flat - low) / np.where(constant, 1, span))
    return np.uint8(np.rint(scaled)).reshape(tiles.shape)


def _principal_maps(features: np.ndarray) -> np.ndarray:
    """The first three principal components of features (dim, h, w) over the positions: (3, h, w), strongest first.

    Each is positive where it is strongest, and zero where there are fewer components. By orthogonal iteration (Halko et
    al., https://arxiv.org/abs/0909.4061), since a full decomposition would take longer than the network: the maps of
    photographs correlate with the exact ones to six digits.
    """
    dim, height, width = features.shape
    positions = height * width
    x = features.reshape(dim, positions).T
    size, x = np.linalg.norm(x), x - x.mean(0)
    basis = np.random.default_rng(0).standard_normal((positions, min(16, positions)))
    for _ in range(5):
        basis, _ = np.linalg.qr(x @ (x.T @ basis))
    rotation, strengths, _ = np.linalg.svd(basis.T @ x, full_matrices=False)
    strengths[strengths <= ROUNDING * size] = 0
    maps = np.zeros((3, positions))
    found = (basis @ rotation * strengths).T[:3]
    maps[: len(found)] = found
    strongest = np.take_along_axis(maps, abs(maps).argmax(1)[:, None], axis=1)
    return np.where(strongest < 0, -maps, maps).reshape(3, height, width)


def _aligned(maps: np.ndarray, before: np.ndarray) -> np.ndarray:
    """``maps`` (3, h, w) in the order and with the signs that correlate most with those ``before``."""
    # The maps have mean zero, so that their scalar products over their norms are the correlations.
    a, b = (m.reshape(3, -1) / np.maximum(np.linalg.norm(m, axis=(1, 2)), 1e-30)[:, None] for m in (before, maps))
    correlations = a @ b.T
    order = max(permutations(range(3)), key=lambda order: abs(correlations[range(3), order]).sum())
    signs = np.where(correlations[range(3), order] < 0, -1, 1)
    return signs[:, None, None] * maps[list(order)]
