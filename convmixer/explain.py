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
# Orange for and blue against, the pair that every common kind of colour blindness tells apart.
_FOR = ((0, (220, 80, 0)), (255, (255, 150, 0)))
_AGAINST = ((0, (0, 70, 190)), (255, (20, 130, 255)))
LAYER_SIZE = 256  # pixels of a layer's longer side: several to each patch, so that a browser enlarges it smoothly


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
        heat = _heat(self.values, self.values.max(), (right - left, bottom - top))
        seen = self.picture.crop((left, top, right, bottom))
        mask = heat.point([round(opacity * value) for value in range(256)])
        result = self.picture.point(lambda value: value // 2)
        result.paste(Image.composite(_colours(heat, _RAMP), seen, mask), (left, top))
        return result

    def layer(self, signed: bool = False) -> Image.Image:
        """The evidence alone, to be laid over ``box`` and enlarged to it; the longer side has LAYER_SIZE pixels.

        Alpha is the strength: greatest at the strongest evidence, 0 where there is none. Laid over the picture with an
        opacity, it gives what `overlay` gives. signed: evidence for the class is orange and evidence against it blue,
        both relative to the largest absolute value; otherwise it is only evidence for it, in the colours of `overlay`.

        The image has mode P with an RGBA palette: as PNG it is made ten times as fast as with pixels of RGBA.
        """
        left, top, right, bottom = self._pixels()
        scale = LAYER_SIZE / max(right - left, bottom - top)
        size = max(1, round(scale * (right - left))), max(1, round(scale * (bottom - top)))
        if not signed:
            heat = np.asarray(_heat(self.values, self.values.max(), size))
            return _with_palette(heat, [(*_table(_RAMP)[strength], strength) for strength in range(256)])
        # Enlarged apart: together, the interpolation would swing below zero, and draw blue rings around orange.
        largest = abs(self.values).max()
        positive, negative = (np.int16(_heat(sign * self.values, largest, size)) for sign in (1, -1))
        # Entry 128 of the palette is no evidence, 255 the strongest for the class and 1 the strongest against it.
        indices = np.uint8(128 + np.rint((positive - negative) * (127 / 255)))
        strengths = [min(255, round(abs(index - 128) * (255 / 127))) for index in range(256)]
        ramps = [_table(_FOR if index > 128 else _AGAINST) for index in range(256)]
        return _with_palette(indices, [(*ramp[each], each) for ramp, each in zip(ramps, strengths, strict=True)])

    def _pixels(self) -> tuple[int, int, int, int]:
        """``box`` in whole pixels, at least one wide and high."""
        left, top, right, bottom = (round(edge) for edge in self.box)
        left, top = min(left, self.picture.width - 1), min(top, self.picture.height - 1)
        return left, top, max(right, left + 1), max(bottom, top + 1)


def _heat(values: np.ndarray, largest: float, size: tuple[int, int]) -> Image.Image:
    """Positive ``values``, relative to ``largest``, at ``size`` (width, height) as an 8-bit grey image."""
    strength = values.clip(min=0) / (largest if largest > 0 else 1)
    # 8-bit before it is enlarged: a large picture would need gigabytes as floats.
    return Image.fromarray(np.uint8(np.rint(255 * strength))).resize(size, Image.Resampling.BICUBIC)


def _colours(heat: Image.Image, ramp: tuple) -> Image.Image:
    """An 8-bit grey image as colours of a ramp."""
    return Image.merge("RGB", [heat.point(channel) for channel in zip(*_table(ramp), strict=True)])


@cache
def _table(ramp: tuple) -> list[tuple[int, int, int]]:
    """The 256 colours of a ramp, R, G and B from 0 to 255."""
    positions, colours = zip(*ramp, strict=True)
    channels = [np.interp(range(256), positions, channel).astype(np.uint8) for channel in zip(*colours, strict=True)]
    return list(zip(*(channel.tolist() for channel in channels), strict=True))


def _with_palette(indices: np.ndarray, palette: list[tuple[int, int, int, int]]) -> Image.Image:
    """An image of uint8 indices (h, w) into 256 colours, R, G, B and alpha."""
    image = Image.frombytes("P", indices.shape[::-1], np.ascontiguousarray(indices).tobytes())
    image.putpalette(bytes(value for colour in palette for value in colour), "RGBA")
    return image
