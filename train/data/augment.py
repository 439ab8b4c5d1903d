"""Random changes to batches of pictures, on the device that holds them: torchvision's operations, a batch at a time.

Every picture gets its own crop, flip and operations; pictures that got the same one go through torchvision together.
All random numbers come from one NumPy generator, drawn for the whole batch before anything is computed, so they do not
depend on the device. Several batches can be put together: each picture comes out as it would in its own.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as F

from train.recipe import Augmentation

MAGNITUDES = 30  # RandAugment's magnitudes are 0 to 30

Chances = dict[str, np.ndarray]  # what `draw` drew; the first axis of every array counts the pictures


def draw(n: int, size: int, augmentation: Augmentation, rng: np.random.Generator) -> Chances:
    """What is to happen to each of n pictures with a side of ``size``."""
    chances = {}
    if augmentation.scale < 1.0:
        chances["boxes"] = crop_boxes(n, size, augmentation, rng)
    chances["flip"] = rng.random(n) < augmentation.flip
    for turn in range(augmentation.ra_n):
        chances[f"operation {turn}"], chances[f"negative {turn}"] = draw_operations(n, rng)
    if augmentation.jitter:
        chances["factors"], chances["order"] = draw_jitter(n, augmentation.jitter, rng)
    return chances


def together(batches: list[Chances]) -> Chances:
    """The chances of several batches as those of one."""
    return {name: np.concatenate([chances[name] for chances in batches]) for name in batches[0]}


def augment(images: Tensor, augmentation: Augmentation, chances: Chances) -> Tensor:
    """Crop, flip, RandAugment and ColorJitter on uint8 (N, 3, S, S); gives a new tensor of the same kind."""
    if augmentation.scale < 1.0:
        images = resized_crop(images, chances["boxes"])
    flip = torch.from_numpy(chances["flip"]).to(images.device)
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    for turn in range(augmentation.ra_n):
        images = randaugment(images, augmentation.ra_m, chances[f"operation {turn}"], chances[f"negative {turn}"])
    if augmentation.jitter:
        images = color_jitter(images, chances["factors"], chances["order"])
    return images


def crop_boxes(n: int, size: int, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """RandomResizedCrop's boxes, int64 (N, 4): top, left, height, width. A box that does not fit is drawn again.

    torchvision tries ten times and then takes a centre crop. Eight in ten crops of ImageNet's settings fit at once, so
    that this differs for one picture in millions.
    """
    boxes = np.zeros((n, 4), np.int64)
    open_ = np.arange(n)
    low, high = map(math.log, augmentation.ratio)
    while len(open_):
        area = size * size * rng.uniform(augmentation.scale, 1.0, len(open_))
        ratio = np.exp(rng.uniform(low, high, len(open_)))
        width, height = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
        fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
        top, left = (np.floor(rng.random(len(open_)) * (size - side + 1)) for side in (height, width))
        boxes[open_[fits]] = np.stack([top, left, height, width], 1)[fits]
        open_ = open_[~fits]
    return boxes


def resized_crop(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Each picture's own box, as `crop_boxes` gives them, enlarged to the full size with bilinear interpolation."""
    size = images.shape[2]
    top, left, height, width = torch.from_numpy(boxes).to(images.device, torch.float32).unsqueeze(2).unbind(1)  # (N, 1)
    centres = (torch.arange(size, device=images.device) + 0.5) / size  # of the pixels, in 0..1

    def coordinates(start: Tensor, side: Tensor) -> Tensor:
        # Outside the centres of the box's outermost pixels the box's own edge is repeated, not what lies beyond it.
        inside = (start + centres * side - 0.5).clamp(min=start, max=start + side - 1)
        return (2 * inside + 1) / size - 1  # grid_sample's unit: -1 to 1 over the picture

    y, x = coordinates(top, height), coordinates(left, width)
    grid = torch.stack(torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2)), dim=-1)
    enlarged = torch.nn.functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return enlarged.round().clamp(0, 255).to(torch.uint8)


def _signed(top: float) -> Callable[[int], float]:
    return lambda m: top * m / MAGNITUDES


# torchvision's RandAugment (Cubuk et al., https://arxiv.org/abs/1909.13719): what an operation does to a batch at a
# value, the value at magnitude m for 32-pixel pictures, and whether its sign is random.
OPERATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], Callable[[int], float], bool]] = {
    "Identity": (lambda x, v: x, lambda m: 0.0, False),
    "ShearX": (lambda x, v: _shear(x, v, 0.0), _signed(0.3), True),
    "ShearY": (lambda x, v: _shear(x, 0.0, v), _signed(0.3), True),
    "TranslateX": (lambda x, v: _translate(x, v * x.shape[3], 0.0), _signed(150 / 331), True),
    "TranslateY": (lambda x, v: _translate(x, 0.0, v * x.shape[2]), _signed(150 / 331), True),
    "Rotate": (lambda x, v: F.rotate(x, v), _signed(30.0), True),
    "Brightness": (lambda x, v: F.adjust_brightness(x, 1.0 + v), _signed(0.9), True),
    "Color": (lambda x, v: F.adjust_saturation(x, 1.0 + v), _signed(0.9), True),
    "Contrast": (lambda x, v: F.adjust_contrast(x, 1.0 + v), _signed(0.9), True),
    "Sharpness": (lambda x, v: F.adjust_sharpness(x, 1.0 + v), _signed(0.9), True),
    "Posterize": (lambda x, v: F.posterize(x, int(v)), lambda m: 8 - round(m / (MAGNITUDES / 4)), False),
    "Solarize": (lambda x, v: F.solarize(x, v), lambda m: 255.0 * (1 - m / MAGNITUDES), False),
    "AutoContrast": (lambda x, v: F.autocontrast(x), lambda m: 0.0, False),
    "Equalize": (lambda x, v: equalize(x), lambda m: 0.0, False),
}


def draw_operations(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For n pictures: the number in OPERATIONS, evenly, and whether the operation goes the other way, if it can."""
    return rng.integers(len(OPERATIONS), size=n), rng.random(n) < 0.5


def randaugment(images: Tensor, magnitude: int, operations: np.ndarray, negative: np.ndarray) -> Tensor:
    """One operation a picture, as `draw_operations` gave them, at ``magnitude`` 0 to 30."""
    changed = images.clone()
    for number, (operation, value_at, signed) in enumerate(OPERATIONS.values()):
        for sign in (1, -1) if signed else (1,):
            chosen = operations == number
            if signed:
                chosen &= negative == (sign < 0)
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
            if len(rows):
                changed[rows] = operation(images[rows], sign * value_at(magnitude))
    return changed


def _shear(images: Tensor, x: float, y: float) -> Tensor:
    """Shifts rows (x) or columns (y) in proportion to their distance from the upper left corner, as Pillow does."""
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0])


def _translate(images: Tensor, x: float, y: float) -> Tensor:
    return F.affine(images, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])


def equalize(images: Tensor) -> Tensor:
    """Equalises the histogram of each channel of each picture of uint8 (N, C, H, W), as torchvision does one by one."""
    flat = images.flatten(2).flatten(0, 1).long()  # (N * C, pixels)
    histogram = torch.zeros(len(flat), 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(1, flat, torch.ones_like(flat))
    # The step is the number of pixels but for those of the brightest value, over 255; 0 leaves the channel as it is.
    brightest = flat.max(1, keepdim=True).values
    step = (flat.shape[1] - histogram.gather(1, brightest)) // 255
    table = (histogram.cumsum(1) + step // 2) // step.clamp(min=1)
    table = torch.nn.functional.pad(table, (1, 0))[:, :-1].clamp(0, 255)
    return torch.where(step == 0, flat, table.gather(1, flat)).to(torch.uint8).view_as(images)


def draw_jitter(n: int, strength: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For n pictures, (n, 3) each: the factors of brightness, contrast and saturation, and the order of the three."""
    factors = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength, (3, n)).astype(np.float32)
    return factors.T, rng.permuted(np.tile(np.arange(3), (n, 1)), axis=1)


def color_jitter(images: Tensor, factors: np.ndarray, order: np.ndarray) -> Tensor:
    """torchvision's ColorJitter of brightness, contrast and saturation, as `draw_jitter` gave them."""
    references = (_black, _mean_grey, F.rgb_to_grayscale)  # what brightness, contrast and saturation move away from
    for position in range(3):
        changed = images.clone()
        for number, reference in enumerate(references):
            rows = torch.from_numpy(np.flatnonzero(order[:, position] == number)).to(images.device)
            factor = torch.from_numpy(factors[:, number].copy()).to(images.device)[rows].view(-1, 1, 1, 1)
            chosen = images[rows]
            blended = factor * chosen.float() + (1.0 - factor) * reference(chosen).float()
            changed[rows] = blended.clamp(0, 255).to(torch.uint8)
        images = changed
    return images


def _black(images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def _mean_grey(images: Tensor) -> Tensor:
    return F.rgb_to_grayscale(images).float().mean((1, 2, 3), keepdim=True)
