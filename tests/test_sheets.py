"""Contact sheets of filters, and the features of every stage as pictures."""

import numpy as np
import pytest

from convmixer.sheets import contact_sheet, depthwise_filters, feature_maps, patch_filters, strongest_channels


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_sheet_puts_every_tile_in_its_place():
    tiles = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3), dtype=np.uint8)
    sheet = pixels(contact_sheet(tiles, columns=3, gap=2, scale=3, background=(9, 8, 7, 255)))
    expected = np.empty((2 * 6 + 2, 3 * 12 + 2 * 2, 4), int)
    expected[:] = (9, 8, 7, 255)
    for index, tile in enumerate(tiles):
        top, left = index // 3 * 8, index % 3 * 14
        expected[top : top + 6, left : left + 12, :3] = tile.repeat(3, axis=0).repeat(3, axis=1)
    assert np.array_equal(sheet, expected)


@pytest.mark.parametrize(("count", "side"), [(1536, 9), (768, 7), (1024, 14), (256, 2)])
def test_the_published_networks_give_landscape_sheets(count, side):
    sheet = contact_sheet(np.zeros((count, side, side), np.uint8))
    assert 900 <= sheet.width <= 1200 and 1.2 <= sheet.width / sheet.height <= 1.8
    shown = (pixels(sheet)[..., 3] == 255).sum() / count / side**2
    assert shown == round(shown**0.5) ** 2  # every pixel of every tile, at a whole scale
    assert contact_sheet(np.zeros((7, 300, 200), np.uint8)).width >= 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 0}, "columns is 0"),
        ({"gap": -1}, "gap is -1"),
        ({"tiles": np.zeros((2, 3, 3))}, "float64"),
        ({"tiles": np.zeros((0, 3, 3), np.uint8)}, r"\(0, 3, 3\)"),
    ],
)
def test_an_impossible_sheet_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        contact_sheet(**{"tiles": np.zeros((2, 3, 3), np.uint8)} | change)


def test_a_known_patch_filter_is_at_its_tile_in_its_colours():
    stem = weights(16, 3, 2, 2)
    stem[6] = 0
    stem[6, 0, 0, 1] = 3.0  # red, top right: the greatest
    stem[6, 2, 1, 0] = -2.0  # blue, bottom left: the least
    stem[7] = 0.25  # no contrast
    stem[8] = 3e38  # nor here, where a sum overflows
    sheet = pixels(patch_filters(stem, columns=4, gap=1, scale=1))
    tile = sheet[3:5, 6:8, :3]
    assert tile.tolist() == [[[102, 102, 102], [255, 102, 102]], [[102, 102, 0], [102, 102, 102]]]
    assert (sheet[3:5, 9:11, :3] == 128).all() and (sheet[6:8, 0:2, :3] == 128).all()
    assert (sheet[0:2, 0:2, :3].min(), sheet[0:2, 0:2, :3].max()) == (0, 255)  # each has a range of its own
    of_two_channels = np.float32([[[[0, 1], [2, 4]], [[0, 1], [0, 0]]]])  # grey: their mean
    assert pixels(patch_filters(of_two_channels, scale=1))[..., 0].tolist() == [[0, 128], [128, 255]]


def test_a_known_depthwise_filter_is_at_its_tile_in_its_colours():
    filters = weights(16, 1, 3, 3)
    filters[9, 0] = [[0, 4, 2], [-4, -2, 0], [0, 0, 0]]
    filters[10] = 0
    sheet = pixels(depthwise_filters(filters, columns=8, gap=1, scale=1))[..., :3]
    tile, empty = sheet[4:7, 4:7], sheet[4:7, 8:11]
    grey, orange, blue = tile[2, 2], tile[0, 1], tile[1, 0]
    assert np.ptp(grey) == 0 and (empty == grey).all()
    assert orange[0] > orange[1] > orange[2] and blue[2] > blue[1] > blue[0]
    assert np.allclose(tile[0, 2], (grey + orange) / 2, atol=1)
    assert np.allclose(tile[1, 1], (grey + blue) / 2, atol=1)


def known_picture(strengths, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """A picture of uncorrelated channels of these strengths around a mean, and the channels alone, (n, side, side)."""
    noise = np.random.default_rng(3).normal(size=(side * side, len(strengths)))
    maps = np.linalg.qr(noise - noise.mean(0))[0].T.reshape(-1, side, side)
    strongest = [m.flat[abs(m).argmax()] for m in maps]
    maps *= np.sign(strongest)[:, None, None]
    return np.float32(maps * np.reshape(strengths, (-1, 1, 1)) + 0.5), maps


def as_colours(maps: np.ndarray) -> np.ndarray:
    """What feature_maps draws of three maps, computed one by one."""
    channels = []
    for m in maps:
        clipped = np.clip(m, -2.5 * m.std(), 2.5 * m.std())
        channels.append(255 * (clipped - clipped.min()) / (clipped.max() - clipped.min()))
    return np.rint(np.stack(channels, axis=-1)).astype(int)


def test_the_features_of_known_stages():
    x, maps = known_picture([1, 4, 2, 0])
    scaled = x * np.float32([6, 0.5, 2, 1])[:, None, None]  # the weakest is now the strongest, and so on
    images = feature_maps(np.stack([x, -x, scaled, x[[3, 1, 0, 2]], x * 0 + 7]), scale=1)
    assert [(image.size, image.mode) for image in images] == [((8, 8), "RGB")] * 5
    stem = pixels(images[0])
    assert abs(stem - as_colours(maps[[1, 2, 0]])).max() <= 1  # the strongest first, each bright where it is strongest
    for same in images[1:4]:  # the same maps, whatever their signs, strengths and channels
        assert abs(pixels(same) - stem).max() <= 1
    assert (pixels(images[4]) == 128).all()
    assert feature_maps(x[None])[0].size == (256, 256)


def test_the_colours_are_the_principal_components():
    features = weights(40, 3) @ weights(3, 16 * 12) + 0.3 * weights(40, 16 * 12)
    centred = features.T.astype(np.float64)
    maps = np.linalg.svd(centred - centred.mean(0))[0][:, :3].T.reshape(3, 16, 12)
    maps = np.stack([m * np.sign(m.flat[abs(m).argmax()]) for m in maps])
    difference = abs(pixels(feature_maps(features.reshape(1, 40, 16, 12), scale=1)[0]) - as_colours(maps))
    assert difference[..., 0].mean() < 2 and difference.mean() < 6


def test_fewer_than_three_components_leave_the_others_grey():
    x, maps = known_picture([0, 2, 0, 0])
    rounding = 1e-7 * weights(*x.shape)  # what arithmetic may leave where there is nothing
    image = pixels(feature_maps((x + rounding)[None], scale=1)[0])
    assert abs(image[..., 0] - as_colours(maps[1:2])[..., 0]).max() <= 1 and (image[..., 1:] == 128).all()
    one_colour = np.full((4, 8, 8), 0.3, np.float32) + rounding
    assert (pixels(feature_maps(one_colour[None])[0]) == 128).all()
    assert (pixels(strongest_channels(one_colour, gap=0))[..., :3] == 128).all()


def test_the_strongest_channels_come_first():
    x, maps = known_picture([1, 4, 2, 0])
    sheet = pixels(strongest_channels(x, columns=1, gap=0, scale=1))
    shown = sheet[..., 0].reshape(-1, 8, 8)
    for tile, m in zip(shown, maps[[1, 2, 0]], strict=False):
        assert abs(tile - np.rint(255 * (m - m.min()) / np.ptp(m))).max() <= 1
    assert len(shown) == 4 and (shown[3] == 128).all()
    assert np.array_equal(pixels(strongest_channels(x, count=2, columns=1, gap=0, scale=1)), sheet[:16])
    with pytest.raises(ValueError, match="count is 0"):
        strongest_channels(x, count=0)
