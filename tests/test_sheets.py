"""Contact sheets of filters, and the features of every stage as pictures."""

import numpy as np
import pytest

from convmixer.sheets import contact_sheet, depthwise_filters, feature_maps, patch_filters, strongest_channels


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tiles_of(sheet, height: int, width: int) -> np.ndarray:
    """The tiles of a sheet whose rows are full, (n, height, width, 3), one pixel for each of theirs."""
    pixels = np.asarray(sheet).astype(int)
    shown = pixels[..., 3] == 255
    columns = 1 + np.count_nonzero(np.diff(shown[0].astype(int)) == 1)
    pixels = pixels[shown.any(1)][:, shown.any(0)]
    scale = pixels.shape[1] // (columns * width)
    tiles = pixels.reshape(-1, height, scale, columns, width, scale, 4)
    assert np.ptp(tiles, axis=(2, 5)).max() == 0  # every pixel is a square
    return tiles[:, :, 0, :, :, 0, :3].swapaxes(1, 2).reshape(-1, height, width, 3)


@pytest.mark.parametrize(("count", "side"), [(1536, 9), (768, 7), (1024, 14), (256, 2)])
def test_the_published_networks_give_landscape_sheets_with_every_tile_in_its_place(count, side):
    tiles = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    sheet = contact_sheet(tiles)
    assert 900 <= sheet.width <= 1200 and 1.2 <= sheet.width / sheet.height <= 1.8
    assert np.array_equal(tiles_of(sheet, side, side)[:count], tiles)
    assert (np.asarray(sheet)[..., 3] == 0).any()  # between the tiles


def test_a_known_patch_filter_is_at_its_tile_in_its_colours():
    stem = weights(16, 3, 2, 2)
    stem[6] = 0
    stem[6, 0, 0, 1] = 3.0  # red, top right: the greatest
    stem[6, 2, 1, 0] = -2.0  # blue, bottom left: the least
    stem[7] = 0.25  # no contrast
    stem[8] = 3e38  # nor here, where a sum overflows
    tiles = tiles_of(patch_filters(stem), 2, 2)
    assert tiles[6].tolist() == [[[102, 102, 102], [255, 102, 102]], [[102, 102, 0], [102, 102, 102]]]
    assert (tiles[7:9] == 128).all()
    assert (tiles[0].min(), tiles[0].max()) == (0, 255)  # each has a range of its own
    of_two_channels = np.float32([[[[0, 1], [2, 4]], [[0, 1], [0, 0]]]])  # grey: their mean
    assert tiles_of(patch_filters(of_two_channels), 2, 2)[0, ..., 0].tolist() == [[0, 128], [128, 255]]


def test_a_known_depthwise_filter_is_at_its_tile_in_its_colours():
    filters = weights(16, 1, 3, 3)
    filters[9, 0] = [[0, 4, 2], [-4, -2, 0], [0, 0, 0]]
    filters[10] = 0
    tile, empty = tiles_of(depthwise_filters(filters), 3, 3)[9:11]
    grey, orange, blue = tile[2, 2], tile[0, 1], tile[1, 0]
    assert np.ptp(grey) == 0 and (empty == grey).all()
    assert orange[0] > orange[1] > orange[2] and blue[2] > blue[1] > blue[0]
    assert np.allclose([tile[0, 2], tile[1, 1]], [(grey + orange) / 2, (grey + blue) / 2], atol=1)


def known_picture(strengths, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A picture of uncorrelated channels of these strengths around a mean, and the channels alone, (n, side, side)."""
    noise = np.random.default_rng(3).normal(size=(side * side, len(strengths)))
    maps = np.linalg.qr(noise - noise.mean(0))[0].T.reshape(-1, side, side)
    strongest = [m.flat[abs(m).argmax()] for m in maps]
    maps *= np.sign(strongest)[:, None, None]
    return np.float32(maps * np.reshape(strengths, (-1, 1, 1)) + 0.5), maps


def test_the_features_of_known_stages():
    x, maps = known_picture([1, 4, 2, 0])
    scaled = x * np.float32([6, 0.5, 2, 1])[:, None, None]  # the weakest is now the strongest, and so on
    one = known_picture([0, 2, 0, 0])[0] + 1e-7 * weights(*x.shape)  # what rounding may leave where there is nothing
    images = feature_maps(np.stack([x, -x, scaled, x[[3, 1, 0, 2]], one, x * 0 + 7]))
    assert [(image.size, image.mode) for image in images] == [((256, 256), "RGB")] * 6
    stem, *others, of_one, constant = (np.asarray(image)[::32, 31::32].astype(int) for image in images)
    strongest_first = maps[[1, 2, 0]].reshape(3, -1)  # each bright where it is strongest
    assert np.diag(np.corrcoef(stem.reshape(-1, 3).T, strongest_first), 3).min() > 0.97
    assert (stem.min(), stem.max()) == (0, 255)
    for same in others:  # the same maps, whatever their signs, strengths and channels
        assert abs(same - stem).max() <= 1
    assert (of_one[..., 1:] == 128).all() and (constant == 128).all()


def test_the_strongest_channels_come_first():
    x, maps = known_picture([1, 4, 2, 0])
    shown = tiles_of(strongest_channels(x, columns=2), 8, 8)[..., 0]
    for tile, m in zip(shown, maps[[1, 2, 0]], strict=False):
        assert abs(tile - np.rint(255 * (m - m.min()) / np.ptp(m))).max() <= 1
    assert len(shown) == 4 and (shown[3] == 128).all()
    assert len(tiles_of(strongest_channels(weights(40, 4, 4), columns=8), 4, 4)) == 16
