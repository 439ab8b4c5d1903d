"""Heat maps as layers, and of several classes at once."""

import io

import numpy as np
import pytest
from PIL import Image

from convmixer import Classifier
from convmixer import classifier as classifier_module
from convmixer.explain import LAYER_SIZE, HeatMap


def heatmap_of(values, box=(0.0, 0.0, 256.0, 256.0), size=(256, 256)) -> HeatMap:
    """A heat map over a picture of smooth colours."""
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(size)
    return HeatMap("x", 0, np.float32(values), box, picture)


def rgba(layer: Image.Image) -> Image.Image:
    """A layer as it is shown: through PNG, with the colours of its palette."""
    buffer = io.BytesIO()
    layer.save(buffer, "PNG")
    return Image.open(buffer).convert("RGBA")


@pytest.fixture
def for_and_against():
    """Evidence in row 1 and column 2 of 4 x 4, half as much against in row 3 and column 0, and none elsewhere."""
    values = np.zeros((4, 4))
    values[1, 2], values[3, 0] = 6, -3
    return heatmap_of(values)


def test_a_layer_shows_the_evidence_for_the_class(for_and_against):
    layer = np.asarray(rgba(for_and_against.layer())).astype(int)
    assert layer.shape == (256, 256, 4)
    alpha = layer[..., 3]
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    assert (row // 64, column // 64) == (1, 2)
    assert alpha.max() >= 254
    red, green, blue, _ = layer[96, 160]  # the middle of the patch
    assert red > 240 and green > 200 and red > blue + 90  # the ramp's pale yellow
    assert not alpha[192:, :64].any()  # evidence against
    assert not alpha[:, 64 * 3 + 60 :].any()  # no evidence


def test_a_signed_layer_is_orange_for_and_blue_against(for_and_against):
    layer = np.asarray(rgba(for_and_against.layer(signed=True))).astype(int)
    alpha = layer[..., 3]
    row, column = np.unravel_index(alpha.argmax(), alpha.shape)
    assert (row // 64, column // 64) == (1, 2)
    assert alpha.max() >= 254
    red, _, blue, _ = layer[96, 160]
    assert red > blue + 150
    red, _, blue, strength = layer[224, 32]
    assert blue > red + 150
    assert strength == pytest.approx(127, abs=3)  # relative to the largest absolute value, not to its own
    # Nothing else is seen: above all no ring of the other colour, where the interpolation overshoots.
    seen = alpha > 0
    assert (layer[:160, :, 0] > layer[:160, :, 2])[seen[:160]].all()
    assert (layer[192:, :64, 2] > layer[192:, :64, 0])[seen[192:, :64]].all()
    assert not alpha[:, 252:].any() and not alpha[:60, :90].any()


def test_a_layer_turned_round_swaps_only_the_colours():
    values = np.random.default_rng(0).normal(size=(16, 16))
    layer, turned = (np.asarray(rgba(heatmap_of(each).layer(signed=True))).astype(int) for each in (values, -values))
    assert np.array_equal(layer[..., 3], turned[..., 3])
    strong = layer[..., 3] > 10
    assert np.array_equal((layer[..., 0] > layer[..., 2])[strong], (turned[..., 0] < turned[..., 2])[strong])


@pytest.mark.parametrize("opacity", [0.7, 1.0])
def test_a_layer_over_the_picture_is_the_overlay(opacity):
    heatmap = heatmap_of(np.random.default_rng(0).normal(size=(9, 9)))
    layer = rgba(heatmap.layer())
    mask = layer.getchannel("A").point([round(opacity * value) for value in range(256)])
    assert Image.composite(layer.convert("RGB"), heatmap.picture, mask) == heatmap.overlay(opacity)


@pytest.mark.filterwarnings("error")  # such as a division by zero
def test_without_evidence_a_layer_is_transparent():
    assert rgba(heatmap_of(np.full((3, 3), -2.0)).layer()).getchannel("A").getextrema() == (0, 0)
    assert rgba(heatmap_of(np.full((3, 3), -2.0)).layer(signed=True)).getchannel("A").getextrema() == (255, 255)
    for signed in (False, True):
        assert rgba(heatmap_of(np.zeros((3, 3))).layer(signed)).getchannel("A").getextrema() == (0, 0)


@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((100.0, 0.0, 900.0, 400.0), (LAYER_SIZE, LAYER_SIZE // 2)),
        ((0.0, 10.4, 30.0, 50.3), (LAYER_SIZE * 3 // 4, LAYER_SIZE)),
        ((3.0, 3.0, 3.2, 3.2), (LAYER_SIZE, LAYER_SIZE)),  # less than a pixel
        ((0.0, 0.0, 1000.0, 1.0), (LAYER_SIZE, 1)),
    ],
)
def test_a_layer_has_the_proportions_of_the_box(box, size):
    heatmap = heatmap_of(np.eye(2), box, (1000, 400))
    for signed in (False, True):
        assert rgba(heatmap.layer(signed)).size == size


def test_the_maps_of_the_best_classes_come_from_one_pass(random_checkpoint, picture, monkeypatch):
    classifier = Classifier(str(random_checkpoint()), device="cpu")
    wide = picture(90, 30)
    logits = classifier.logits([wide])[0]
    single = [classifier.heatmap(wide, index) for index in range(10)]
    passes, loads = [], []
    run = classifier.engine.run
    monkeypatch.setattr(classifier.engine, "run", lambda *a, **k: passes.append(1) or run(*a, **k))
    load = classifier_module.load_image
    monkeypatch.setattr(classifier_module, "load_image", lambda *a, **k: loads.append(1) or load(*a, **k))
    predictions, heatmaps = classifier.classify_with_heatmaps(wide, top_k=4)
    assert (len(passes), len(loads)) == (1, 2)  # what the network sees, and what is shown
    assert predictions == classifier.classify(wide, top_k=4)
    assert [(h.index, h.label) for h in heatmaps] == [(p.index, p.label) for p in predictions]
    for heatmap in heatmaps:
        assert heatmap.values.mean(dtype=np.float64) == pytest.approx(logits[heatmap.index].item(), abs=1e-5)
        assert np.array_equal(heatmap.values, single[heatmap.index].values)
        assert heatmap.box == single[heatmap.index].box == (30, 0, 60, 30)
        assert heatmap.picture is heatmaps[0].picture
    assert len({heatmap.values.tobytes() for heatmap in heatmaps}) == 4
    assert len(classifier.classify_with_heatmaps(wide, top_k=99)[1]) == 10
    with pytest.raises(ValueError, match="top_k is 0"):
        classifier.classify_with_heatmaps(wide, top_k=0)


@pytest.mark.parametrize("kind", ["bytes", "path", "file", "pipe"])
def test_the_network_sees_the_same_with_a_heat_map_and_without(random_checkpoint, picture, tmp_path, kind):
    """A large JPEG is read at a fraction of its sides for the network, and at more of them to be shown."""
    classifier = Classifier(str(random_checkpoint()), device="cpu")
    path = tmp_path / "large.jpg"
    picture(1600, 1200).save(path)
    content = path.read_bytes()

    class Pipe(io.BytesIO):
        def seek(self, *_):
            raise OSError("a pipe cannot go back")

    def source():
        return {"bytes": content, "path": path, "file": io.BytesIO(content), "pipe": Pipe(content)}[kind]

    predictions, heatmap = classifier.classify_with_heatmap(source())
    assert predictions == classifier.classify(source())
    assert classifier.classify_with_heatmaps(source())[0] == predictions
    assert heatmap.picture.size == (1600, 1200)
