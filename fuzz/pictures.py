"""Fuzzing of convmixer.images and Classifier.prepare: any bytes give a safe RGB image, or ImageError with one line."""

import ctypes
import math
from functools import cache
from pathlib import Path

import numpy as np

from convmixer import Classifier
from convmixer.images import MAX_PIXELS, ImageError, load_image
from fuzz.mutations import chance, mutate, some_bytes
from fuzz.valid_pictures import FORMATS, KINDS, valid_picture

EXTRA_MEMORY = 1536 * 2**20  # bytes: six times the 256 MB of the largest picture, for conversions
COMPARED_PIXELS = 4_000_000  # larger pictures are not decoded twice
MAX_MESSAGE = 500
_M_PERTURB = -6  # of glibc's mallopt


def make(seed: int, number: int) -> bytes:
    """The bytes of one case: every tenth is a valid picture, a few are noise, and the others are damaged pictures."""
    rng = np.random.default_rng((seed, number, 2))
    kind = int(rng.integers(KINDS))
    picture = valid_picture(seed, kind)
    if is_valid(number):
        return picture
    if chance(rng, 0.01):
        return picture[: int(rng.integers(16))] + some_bytes(rng, 2000)
    # A splice of two files of the same kind goes deeper.
    away = int(rng.integers(KINDS)) * (len(FORMATS) if chance(rng, 0.7) else 1)
    return mutate(rng, picture, valid_picture(seed, (kind + away) % KINDS))


def is_valid(number: int) -> bool:
    return number % 10 == 0


@cache
def classifier() -> Classifier:
    return Classifier("convmixer_256_8_cifar10", device="cpu")


def warm_up() -> None:
    """What is loaded once must not count for the first case."""
    for kind in range(len(FORMATS)):
        check(valid_picture(0, kind), None)


def check(content: bytes, folder: Path | None, valid: bool = False) -> str:
    """Raises AssertionError if loading ``content`` breaks a promise; says what became of it."""
    try:
        picture = load_image(content)
    except ImageError as error:
        check_message(str(error))
        assert not valid, f"a valid picture is refused: {error}"
        _check_truncated(content)
        return _check_refused_alike(content, str(error))
    assert picture.mode == "RGB", f"mode {picture.mode}"
    assert 0 < math.prod(picture.size) <= MAX_PIXELS, f"size {picture.size}"
    assert not picture.info, f"metadata left: {list(picture.info)}"
    if math.prod(picture.size) <= COMPARED_PIXELS:
        first = picture.tobytes()
        with_other_memory(0xA5, lambda: _check_same(first, load_image(content)))
    try:
        prepared = classifier().prepare(content)
    except ImageError as error:
        raise AssertionError(f"load_image gives a picture, Classifier.prepare refuses it: {error}") from error
    side = classifier().preprocessing.size
    assert prepared.shape == (3, side, side), f"shape {prepared.shape}"
    assert np.isfinite(prepared).all(), "values that are not finite"
    return "picture"


def check_message(message: str) -> None:
    assert message and message.isprintable(), f"the message is not one printable line: {message!r:.300}"
    assert len(message) < MAX_MESSAGE, f"the message has {len(message)} characters: {message:.100}"


def _check_refused_alike(content: bytes, message: str) -> str:
    try:
        classifier().prepare(content)
    except ImageError as error:
        check_message(str(error))
        return "refused: too much memory" if "memory" in message else "refused"
    raise AssertionError(f"Classifier.prepare gives a tensor, load_image refuses: {message}")


def _check_truncated(content: bytes) -> None:
    """What there is of a picture that is cut short is taken on request, with the same for the rest every time."""
    try:
        picture = load_image(content, allow_truncated=True)
    except ImageError as error:
        return check_message(str(error))
    if math.prod(picture.size) <= COMPARED_PIXELS:
        first = picture.tobytes()
        with_other_memory(0xA5, lambda: _check_same(first, load_image(content, allow_truncated=True)))


def _check_same(expected: bytes, picture) -> None:
    found = picture.tobytes()
    if found != expected:
        a, b = (np.frombuffer(each, np.uint8) for each in (expected, found))
        where = np.flatnonzero(a != b) if len(a) == len(b) else []
        raise AssertionError(f"the same bytes give other pixels: {len(where):,} of {len(a):,} values differ")


def with_other_memory(fill: int, action) -> None:
    """Runs ``action`` while malloc fills what it hands out with another value: what reads unset memory is seen."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return action()
    mallopt(_M_PERTURB, fill)
    try:
        return action()
    finally:
        mallopt(_M_PERTURB, 0)
