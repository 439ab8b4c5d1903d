"""Pictures as people have them, which went wrong once: what they show is what is answered."""

import pytest
from picture_files import refuse

from convmixer import Classifier

SHOWN = {
    "dog_DisplayP3.jpg": "dog",
    "dog_ProPhoto.jpg": "dog",
    "IMG_0001.HEIC": "dog",
    "dog_xmp_orientation.jpg": "dog",
    "dog_no_eoi.jpg": "dog",
}


@pytest.fixture(scope="module")
def shipped() -> Classifier:
    return Classifier("convmixer_256_8_cifar10", device="cpu")


def test_every_case_has_its_line(cases):
    assert {path.name for path in cases.iterdir()} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_in_the_picture_is_answered(name, shipped, cases, photos):
    (best,), heatmap = shipped.classify_with_heatmap(cases / name, top_k=1)
    assert best.label == heatmap.label == SHOWN[name]
    assert best.score == pytest.approx(shipped.classify(photos / "dog.jpg", 1)[0].score, abs=0.02)
    assert shipped.classify(cases / name, 1)[0].label == SHOWN[name]


def test_a_file_that_lacks_rows_is_taken_on_request(cases, shipped):
    data = (cases / "dog_no_eoi.jpg").read_bytes()
    cut = data[: len(data) * 9 // 10]
    assert "cut short" in refuse(cut)
    lenient = Classifier("convmixer_256_8_cifar10", device="cpu", allow_truncated=True)
    assert lenient.classify(cut, 1)[0].label == "dog" and lenient.heatmap(cut).label == "dog"
