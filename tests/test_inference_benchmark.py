"""The benchmarks of inference: they run, write what they should, and notice wrong logits. No speed is tested."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.harness import Failure
from benchmarks.inference import check_logits

SHIPPED = "convmixer_256_8_cifar10"


def test_a_run_writes_its_figures_and_a_plot(python, tmp_path):
    files = [tmp_path / "figures.json", tmp_path / "plot.png"]
    words = ["--models", SHIPPED, "--batches", 1, "--only", "ours float32", "oneDNN product", "--rounds", 2]
    done = python("benchmarks/inference.py", *words, "--threads", 1, "--json", files[0], "--plot", files[1])
    assert done.returncode == 0, done.stderr
    figures = json.loads(files[0].read_text())
    assert figures["machine"]["versions"]["torch"]
    (cell,) = figures["result"]
    assert list(cell["contestants"]) == ["timm eager", "ours float32", "oneDNN product"]
    floor = cell["contestants"]["oneDNN product"]["median_s"]
    for about in cell["contestants"].values():
        assert len(about["times_s"]) == 2
        assert about["images_per_s"] == pytest.approx(1 / about["median_s"])
        assert about["share_of_ceiling"] == pytest.approx(floor / about["median_s"])
        assert about["megabytes"] is None or about["megabytes"] > 0
    assert cell["contestants"]["ours float32"]["largest_difference"] <= 1e-4 * cell["largest_logit"]
    assert "| ours float32 |" in done.stdout and "x timm eager, the best peer" in done.stdout
    with Image.open(files[1]) as image:
        assert image.format == "PNG" and min(image.size) > 150


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--models", "resnet50"], "resnet50"),
        (["--batches", "0"], "'0' is not a whole number above 0"),
        (["--rounds", "many"], "'many' is not a whole number above 0"),
        (["--only", "tensorflow"], "tensorflow"),
        (["--json", "no/such/folder/figures.json"], "there is no folder for no/such/folder/figures.json"),
    ],
)
def test_wrong_arguments_get_one_line(python, words, reason):
    done = python("benchmarks/inference.py", *words)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and reason in done.stderr


def test_a_float32_contestant_with_wrong_logits_ends_the_run():
    right = np.array([[1.0, -2.0], [0.5, 1.5]], np.float32)
    wrong = right + np.float32([[0, 0], [0, 3e-4]])
    both = {"timm eager": right, "ours float32": wrong}
    precisions = dict.fromkeys(both, "float32")
    with pytest.raises(Failure, match=r"ours float32: WRONG LOGITS, off by 3\.0e-04, where the largest is 2"):
        check_logits(both, precisions)
    assert check_logits(both, precisions | {"ours float32": "bfloat16"})["ours float32"] == pytest.approx(3e-4, 1e-2)
    assert check_logits(both | {"ours float32": right + np.float32(1e-4)}, precisions)["timm eager"] == 0


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan), np.zeros((1, 2))])
def test_logits_that_are_none_end_the_run_in_any_precision(bad):
    logits = {"timm eager": np.ones((2, 2)), "ours int8": bad}
    with pytest.raises(Failure, match="ours int8"):
        check_logits(logits, {"timm eager": "float32", "ours int8": "int8"})
