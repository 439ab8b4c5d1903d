"""JPEGs: decoded at the scale that is needed, and told apart where their end is missing."""

import io
import math
import os
import zlib
from typing import BinaryIO

from PIL.JpegImagePlugin import JpegImageFile

# A JPEG read at 1/2, 1/4 or 1/8 of its sides costs a fraction of the time. What is left is at least so many times what
# the caller needs, so that the resize after it still averages over several pixels and hides the difference.
DRAFT_MARGIN = 3

_END = b"\xff\xd9"
# Codes that no picture ends in, before each of the markers that a decoder may be waiting for.
_OTHER_DATA = b"".join(bytes(n * 89 % 255 for n in range(120)) + bytes([0xFF, 0xD0 + n]) for n in range(8))


class Jpeg(JpegImageFile):
    """A JPEG that is decoded also where the file ends too early: ``is_cut`` says so, and grey is what it lacks.

    Whatever its header says, it is the first picture of the file: phones add lists of further ones, which may be
    broken.
    """

    is_cut = False
    scale = 1  # the sides are decoded at 1 / scale

    def load_read(self, read_bytes: int) -> bytes:
        data = self.fp.read(read_bytes)
        if data or self.is_cut:
            return data
        self.is_cut = True
        return _END

    def lacks_data(self, stream: BinaryIO) -> bool:
        """Whether more is missing than the end marker: what is read in the place of the rest then makes a difference.

        stream: the file. To be called once the picture is loaded; decodes it a second time.
        """
        stream.seek(0)
        other = JpegImageFile(io.BytesIO(stream.read() + _OTHER_DATA + _END))
        _scale(other, self.scale)
        other.load()
        return zlib.crc32(self.tobytes()) != zlib.crc32(other.tobytes())


def reduce(image: Jpeg, stream: BinaryIO, max_pixels: int, target_size: int | None) -> None:
    """Have libjpeg decode at the scale that load_image describes, if there is one."""
    width, height = image.size
    too_large = width * height > max_pixels
    if too_large:
        if not _has_one_scan(image, stream):
            return
        scales = [s for s in (2, 4, 8) if math.ceil(width / s) * math.ceil(height / s) <= max_pixels]
    else:  # other scales would stretch the picture by what is missing in its last column or row
        scales = [s for s in (1, 2, 4, 8) if width % s == height % s == 0]
    if scales:
        enough = [s for s in scales if target_size and min(width, height) // s >= DRAFT_MARGIN * target_size]
        image.scale = max(enough, default=scales[0])
        _scale(image, image.scale)


def _scale(image: JpegImageFile, scale: int) -> None:
    if scale > 1:
        image.draft(None, (max(1, image.width // scale), max(1, image.height // scale)))


def _has_one_scan(image: Jpeg, stream: BinaryIO) -> bool:
    """Whether the first scan holds the whole picture. If not, libjpeg keeps all coefficients in memory at full size."""
    # Pillow has just read that scan's header: its length in two bytes, the number of components, two bytes for each,
    # three more.
    length = 6 + 2 * image.layers
    stream.seek(-length, os.SEEK_CUR)
    return stream.read(3) == bytes([0, length, image.layers]) and "progressive" not in image.info
