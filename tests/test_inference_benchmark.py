"""The benchmarks of inference: they run, write what they should, and notice wrong logits. No speed is tested."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.answer import Stopwatch, taken_apart
from benchmarks.inference import Failure, check_logits
from benchmarks.inference_report import markdown, summary
from convmixer import Classifier

SHIPPED = "convmixer_256_8_cifar10"


def contestant(seconds: float, precision: str = "float32") -> dict:
    """What race says of a contestant, here of a batch of 4 where timm eager takes 8 s and the ceiling is 2 s."""
    return {
        "precision": precision,
        "median_s": seconds,
        "images_per_s": 4 / seconds,
        "against_timm_eager": 8 / seconds,
        "share_of_ceiling": 2 / seconds,
        "megabytes": 100 * seconds,
        "largest_difference": 0.001 * seconds,
        "first_call_s": 2 * seconds,
        "times_s": [seconds] * 3,
    }


@pytest.fixture
def result() -> dict:
    contestants = {
        "timm eager": contestant(8),
        "ONNX Runtime": contestant(4),
        "OpenVINO as it comes": contestant(1, "bfloat16"),
        "ours float32": contestant(2.5),
        "oneDNN product": contestant(2),
    }
    cell = {"model": SHIPPED, "batch": 4, "rounds": 3, "largest_logit": 5, "floor_s": 2, "skipped": {}}
    machine = {"processor": "a processor", "features": [], "cores": 2, "python": "3.11", "versions": {"torch": "2.11"}}
    return {"machine": machine, "threads": None, "total_s": 60, "cells": [cell | {"contestants": contestants}]}


def test_a_run_writes_its_figures_and_a_plot(python, tmp_path):
    files = [tmp_path / "figures.json", tmp_path / "plot.png"]
    words = ["--models", SHIPPED, "--batches", 1, "--only", "ours float32", "oneDNN product", "--rounds", 2]
    done = python("benchmarks/inference.py", *words, "--threads", 1, "--json", files[0], "--plot", files[1])
    assert done.returncode == 0, done.stderr
    figures = json.loads(files[0].read_text())
    assert [cell["batch"] for cell in figures["cells"]] == [1]
    assert figures["machine"]["versions"]["torch"]
    for cell in figures["cells"]:
        assert cell["rounds"] == 2
        assert list(cell["contestants"]) == ["timm eager", "ours float32", "oneDNN product"]
        for about in cell["contestants"].values():
            assert len(about["times_s"]) == 2
            assert about["images_per_s"] == pytest.approx(cell["batch"] / about["median_s"])
            assert about["share_of_ceiling"] == pytest.approx(cell["floor_s"] / about["median_s"])
            assert about["megabytes"] is None or about["megabytes"] > 0
        assert cell["contestants"]["ours float32"]["largest_difference"] <= 1e-4 * cell["largest_logit"]
    assert f"| `{SHIPPED}` | batch 1 |" in done.stdout
    with Image.open(files[1]) as image:
        assert image.format == "PNG" and min(image.size) > 200


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--models", "resnet50"], "resnet50"),
        (["--batches", "0"], "'0' is not a whole number above 0"),
        (["--rounds", "many"], "'many' is not a whole number above 0"),
        (["--only", "tensorflow"], "tensorflow"),
        (["--json", "no/such/folder/figures.json"], "there is no folder for no/such/folder/figures.json"),
        (["--plot", "plot.bmp"], "must end in .png"),
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


def test_the_tables_say_what_was_measured(result):
    text = markdown(result)
    assert "| ONNX Runtime | 1.00 (50 %) | 400 | 4.0e-03 |" in text
    assert "| **ours float32** | **1.60 (80 %)** | 250 | 2.5e-03 |" in text
    assert "| OpenVINO as it comes (bfloat16) | 4.00 (200 %) | 100 | 1.0e-03 |" in text
    assert "oneDNN product | 2.00 (100 %) |" in text


def test_the_best_peer_is_one_of_the_same_precision(result):
    assert [*summary(result["cells"])][-1] == f"| ours float32 | `{SHIPPED}` | 4 | 3.20 | 1.60 (ONNX Runtime) | 80 % |"
    del result["cells"][0]["contestants"]["ours float32"]
    assert [*summary(result["cells"])] == []


def test_the_parts_of_an_answer_add_up(python, tmp_path):
    file = tmp_path / "figures.json"
    done = python("benchmarks/answer.py", "--models", SHIPPED, "--rounds", 1, "--threads", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    pictures = json.loads(file.read_text())["milliseconds"][SHIPPED]
    assert [what.split(",")[0] for what in pictures] == ["JPEG 4000 x 3000", "JPEG 640 x 480", "PNG 32 x 32"]
    for parts in pictures.values():  # of a single round, so that each median is the value itself
        whole = parts.pop("classify")
        assert whole == pytest.approx(sum(parts.values()))
        assert all(parts[part] > 0 for part in ("read and decode", "resize and crop", "tensor", "network"))
    assert f"| `{SHIPPED}`, milliseconds |" in done.stdout


def test_an_inner_part_is_not_counted_twice():
    watch = Stopwatch(clock=iter([10, 11, 15, 18]).__next__)  # outer begins, inner begins, inner ends, outer ends
    inner = watch.timed("read and decode", lambda: "answer")
    assert watch.timed("network", inner)() == "answer"
    assert (watch.seconds["network"], watch.seconds["read and decode"]) == (1 + 3, 4)


def test_classify_is_as_before_once_it_was_taken_apart():
    before = Classifier.classify, Classifier.logits
    with taken_apart():
        assert Classifier.classify is not before[0]
    assert (Classifier.classify, Classifier.logits) == before


def test_answer_names_a_wrong_argument_in_one_line(python):
    done = python("benchmarks/answer.py", "--json", "no/such/folder/figures.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "there is no folder for no/such/folder/figures.json" in done.stderr
