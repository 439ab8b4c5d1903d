"""What the network looked at: the exact class activation map of any class.

ConvMixer ends in global average pooling and one linear layer, so a logit is the mean over all positions of that layer
applied at each position (Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016). No gradient
and no approximation is involved.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

# Dark red to pale yellow, so that more evidence is also lighter: readable in grey and without telling red from green.
_RAMP = ((0, (60, 0, 20)), (64, (140, 10, 20)), (128, (225, 60, 10)), (192, (255, 150, 10)), (255, (255, 245, 150)))


def class_activation_map(features: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The map (h, w) of one class, from features (dim, h, w) and the class's row of the head, (dim,) and ().

    Its mean is the class's logit.
    """
    return np.tensordot(weight, features, 1) + bias


@dataclass(frozen=True)
class HeatMap:
    """The class activation map of one class over one picture.

    ``values`` float32 (h, w): one value a patch of the network's input, positive where the picture speaks for the class
    and negative where it speaks against it; the mean is the logit. ``box``: (left, top, right, bottom) in pixels of the
    picture, the part that the network saw. ``picture``: the picture, RGB.
    """

    label: str
    index: int
    values: np.ndarray
    box: tuple[float, float, float, float]
    picture: Image.Image

    def at_picture_size(self) -> np.ndarray:
        """``values``, interpolated, as float32 (height, width) of the picture; NaN where the network did not look."""
        heat = np.full((self.picture.height, self.picture.width), np.nan, np.float32)
        left, top, right, bottom = self._pixels()
        grid = Image.fromarray(self.values.astype(np.float32))
        heat[top:bottom, left:right] = grid.resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        return heat

    def overlay(self, opacity: float = 0.7) -> Image.Image:
        """The picture with the positive evidence laid over it, RGB at the picture's size.

        The strongest evidence has ``opacity`` (0 to 1), none is transparent; the part that the network did not see is
        darkened. Raises ValueError for an opacity outside 0 to 1.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity is {opacity}; it must be from 0 to 1")
        left, top, right, bottom = self._pixels()
        heat = _heat(self.values, (right - left, bottom - top))
        seen = self.picture.crop((left, top, right, bottom))
        mask = heat.point([round(opacity * value) for value in range(256)])
        result = self.picture.point(lambda value: value // 2)
        result.paste(Image.composite(_colours(heat), seen, mask), (left, top))
        return result

    def _pixels(self) -> tuple[int, int, int, int]:
        """``box`` in whole pixels, at least one wide and high."""
        left, top, right, bottom = (round(edge) for edge in self.box)
        left, top = min(left, self.picture.width - 1), min(top, self.picture.height - 1)
        return left, top, max(right, left + 1), max(bottom, top + 1)


def _heat(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Positive ``values``, relative to the largest, at ``size`` (width, height) as an 8-bit grey image."""
    largest = values.max()
    strength = values.clip(min=0) / (largest if largest > 0 else 1)
    # 8-bit before it is enlarged: a large picture would need gigabytes as floats.
    return Image.fromarray(np.uint8(np.rint(255 * strength))).resize(size, Image.Resampling.BICUBIC)


def _colours(heat: Image.Image) -> Image.Image:
    """An 8-bit grey image in the colours of the ramp."""
    return Image.merge("RGB", [heat.point(channel) for channel in _channels()])


@cache
def _channels() -> list[list[int]]:
    """R, G and B from 0 to 255 for each of 256 greys."""
    positions, colours = zip(*_RAMP, strict=True)
    return [np.interp(range(256), positions, c).astype(np.uint8).tolist() for c in zip(*colours, strict=True)]
