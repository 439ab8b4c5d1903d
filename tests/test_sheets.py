"""Contact sheets of filters, and the features of every stage as pictures."""

import warnings

import numpy as np
import pytest

from convmixer.sheets import contact_sheet, depthwise_filters, feature_maps, patch_filters, strongest_channels

PUBLISHED = [(1536, 9, 7), (768, 7, 7), (1024, 9, 14), (256, 5, 2)]  # width, kernel, patch


def stages_of(x: np.ndarray, *blocks) -> np.ndarray:
    """The features of known stages: the stem's are the picture itself, each block is a function."""
    stages = [x]
    for block in blocks:
        stages.append(block(stages[-1]))
    return np.stack(stages)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_sheet_puts_every_tile_in_its_place():
    tiles = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3), dtype=np.uint8)
    for background in ((0, 0, 0, 0), (9, 8, 7, 255)):
        sheet = pixels(contact_sheet(tiles, columns=3, gap=2, scale=3, background=background))
        expected = np.empty((2 * 6 + 2, 3 * 12 + 2 * 2, 4), int)
        expected[:] = background
        for index, tile in enumerate(tiles):
            top, left = index // 3 * 8, index % 3 * 14
            for row in range(6):
                for column in range(12):
                    expected[top + row, left + column] = (*tile[row // 3, column // 3], 255)
        assert np.array_equal(sheet, expected)
    assert np.array_equal(pixels(contact_sheet(tiles[:1, :, :, 0], gap=0, scale=1))[..., 1], tiles[0, :, :, 0])


@pytest.mark.parametrize(("count", "side"), [(dim, side) for dim, *sides in PUBLISHED for side in sides])
def test_the_published_networks_give_landscape_sheets(count, side):
    sheet = contact_sheet(np.zeros((count, side, side), np.uint8))
    assert 900 <= sheet.width <= 1200
    assert 1.2 <= sheet.width / sheet.height <= 1.8
    alpha = pixels(sheet)[..., 3]
    assert (alpha.any(axis=1)).sum() < sheet.height  # there are gaps
    shown = (alpha == 255).sum() / count / side**2
    assert shown == round(shown**0.5) ** 2  # every pixel of every tile, at a whole scale


@pytest.mark.parametrize(("count", "height", "width"), [(1, 1, 1), (2, 1, 1), (7, 300, 200), (3, 1, 9), (16, 16, 16)])
def test_few_tiles_of_any_shape_make_a_sheet(count, height, width):
    sheet = contact_sheet(np.zeros((count, height, width), np.uint8))
    assert max(height, width) <= sheet.width <= 1600
    shown = (pixels(sheet)[..., 3] == 255).sum() / (count * height * width)
    assert shown == round(shown**0.5) ** 2 > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 0}, "columns is 0"),
        ({"gap": -1}, "gap is -1"),
        ({"scale": 0}, "scale is 0"),
        ({"tiles": np.zeros((2, 3, 3))}, "float64"),
        ({"tiles": np.zeros((0, 3, 3), np.uint8)}, r"\(0, 3, 3\)"),
        ({"tiles": np.zeros((2, 3, 3, 4), np.uint8)}, r"\(2, 3, 3, 4\)"),
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
    sheet = pixels(patch_filters(stem, columns=4, gap=1, scale=1))
    assert sheet.shape == (4 * 2 + 3, 4 * 2 + 3, 4)
    tile = sheet[3:5, 6:8, :3]
    assert tile.tolist() == [[[102, 102, 102], [255, 102, 102]], [[102, 102, 0], [102, 102, 102]]]
    assert (sheet[3:5, 9:11, :3] == 128).all()
    assert (sheet[0:2, 0:2, :3].min(), sheet[0:2, 0:2, :3].max()) == (0, 255)  # each has a range of its own


def test_patch_filters_for_other_than_three_channels_are_their_mean_in_grey():
    stem = np.float32([[[[0, 1], [2, 4]], [[0, 1], [0, 0]]]])
    assert pixels(patch_filters(stem, scale=1))[..., 0].tolist() == [[0, 128], [128, 255]]
    assert pixels(patch_filters(weights(1, 1, 1, 1), scale=1)).tolist() == [[[128, 128, 128, 255]]]


def test_a_known_depthwise_filter_is_at_its_tile_in_its_colours():
    filters = weights(16, 1, 3, 3)
    filters[9, 0] = [[0, 4, 2], [-4, -2, 0], [0, 0, 0]]
    filters[10] = 0
    sheet = pixels(depthwise_filters(filters, columns=8, gap=1, scale=1))[..., :3]
    tile, empty = sheet[4:7, 4:7], sheet[4:7, 8:11]
    grey, orange, blue = tile[2, 2], tile[0, 1], tile[1, 0]
    assert np.ptp(grey) == 0 and (empty == grey).all()
    assert (tile[[0, 1, 2, 2], [0, 2, 0, 1]] == grey).all()
    assert orange[0] > orange[1] > orange[2] and blue[2] > blue[1] > blue[0]
    assert np.allclose(tile[0, 2], (grey + orange) / 2, atol=1)
    assert np.allclose(tile[1, 1], (grey + blue) / 2, atol=1)


def test_extreme_weights_make_a_sheet():
    stem, filters = weights(4, 3, 2, 2), weights(4, 1, 3, 3)
    for weight in (stem, filters):
        weight[0], weight[1], weight[2], weight[3] = 3e38, 0, 1e-45, 1
        weight[0, 0, 0, 0], weight[2, 0, 0, 0], weight[3, 0, 0, 0] = -3e38, 0, 1 + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sheet = pixels(patch_filters(stem, columns=4, gap=0, scale=1))[..., 0]
        depthwise_filters(filters)
    assert sheet.tolist() == [[0, 255, 128, 128, 0, 255, 128, 128], [255, 255, 128, 128, 255, 255, 128, 128]]


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
    scales = np.float32([6, 0.5, 2, 1])[:, None, None]  # the weakest is now the strongest, and so on
    stages = stages_of(x, lambda x: -x, lambda x: x * scales, lambda x: x[[3, 1, 0, 2]], lambda x: x * 0 + 7)
    images = feature_maps(stages, scale=1)
    assert [(image.size, image.mode) for image in images] == [((8, 8), "RGB")] * 5
    stem = pixels(images[0])
    assert abs(stem - as_colours(maps[[1, 2, 0]])).max() <= 1  # the strongest first, each bright where it is strongest
    for same in images[1:4]:  # the same maps, whatever their signs, strengths and channels
        assert abs(pixels(same) - stem).max() <= 1
    assert (pixels(images[4]) == 128).all()
    assert [image.size for image in feature_maps(stages)] == [(256, 256)] * 5
    assert np.array_equal(pixels(feature_maps(stages, scale=3)[1])[::3, 2::3], pixels(images[1]))


def test_the_colours_are_the_principal_components():
    features = weights(40, 3) @ weights(3, 16 * 12) + 0.3 * weights(40, 16 * 12)
    centred = features.T.astype(np.float64)
    maps = np.linalg.svd(centred - centred.mean(0))[0][:, :3].T.reshape(3, 16, 12)
    maps = np.stack([m * np.sign(m.flat[abs(m).argmax()]) for m in maps])
    difference = abs(pixels(feature_maps(features.reshape(1, 40, 16, 12), scale=1)[0]) - as_colours(maps))
    assert difference[..., 0].mean() < 2 and difference.mean() < 6


def test_colours_keep_their_signs_from_stage_to_stage():
    x, maps = known_picture([0, 4, 0, 0])
    brightest = 0.5 + 4 * abs(maps[1].min()) / 2  # less than what is darkest: taken alone, the sign would turn round
    stages = stages_of(x, lambda x: x.clip(max=brightest))
    first, second = (pixels(image)[..., 0] for image in feature_maps(stages, scale=1))
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.8


def noise(x: np.ndarray) -> np.ndarray:
    """What rounding may leave where exact arithmetic leaves nothing."""
    return 1e-7 * weights(*x.shape)


def test_fewer_than_three_components_leave_the_others_grey():
    x, maps = known_picture([0, 2, 0, 0])
    for image in map(pixels, feature_maps(stages_of(x, lambda x: x + noise(x)), scale=1)):
        assert abs(image[..., 0] - as_colours(maps[1:2])[..., 0]).max() <= 1
        assert (image[..., 1:] == 128).all()
    assert (pixels(feature_maps(np.ones((2, 1, 1, 1), np.float32))[1]) == 128).all()


def test_one_bright_position_is_not_lost():
    x = np.zeros((4, 16, 16), np.float32)
    x[:, 5, 6] = 1
    image = pixels(feature_maps(x[None], scale=1)[0])[..., 0]
    assert image[5, 6] == 255 and image.sum() == 255


def test_a_picture_of_one_colour_shows_no_rounding():
    x = np.full((4, 8, 8), 0.3, np.float32)
    stages = stages_of(x, lambda x: x + noise(x))
    assert all((pixels(image) == 128).all() for image in feature_maps(stages))
    assert (pixels(strongest_channels(stages[1], gap=0))[..., :3] == 128).all()


def test_the_strongest_channels_come_first():
    x, maps = known_picture([1, 4, 2, 0])
    stages = stages_of(x, lambda x: x * np.float32([8, 1, 1, 1])[:, None, None])

    def channels(stage, **options):
        sheet = pixels(strongest_channels(stages[stage], columns=1, gap=0, scale=1, **options))
        return sheet[..., 0].reshape(-1, 8, 8)

    expected = [np.rint(255 * (m - m.min()) / np.ptp(m)) for m in maps[:3]]
    for stage, order in ((0, [1, 2, 0]), (1, [0, 1, 2])):
        shown = channels(stage)
        assert len(shown) == 4  # all that there are
        for tile, index in zip(shown, order, strict=False):
            assert abs(tile - expected[index]).max() <= 1
        assert (shown[3] == 128).all()
        assert np.array_equal(channels(stage, count=2), shown[:2])
    with pytest.raises(ValueError, match="count is 0"):
        strongest_channels(x, count=0)
