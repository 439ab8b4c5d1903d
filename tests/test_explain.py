"""Heat maps of several classes at once."""

import io

import numpy as np
import pytest

from convmixer import Classifier
from convmixer import classifier as classifier_module


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
