"""The command line, run as users run it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import convmixer
from convmixer import Classifier
from convmixer.__main__ import main
from convmixer.classify import percent
from convmixer.zoo import MODELS


@pytest.fixture
def run(random_checkpoint, capsys, monkeypatch):
    """A function that runs the command line in this process, with a random model; gives (code, stdout, stderr)."""
    path = random_checkpoint()
    monkeypatch.setenv("COG_WEIGHTS", str(path))

    def call(*arguments: object):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    call.model = path
    return call


def assert_one_line(text: str, *parts: str) -> None:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    for part in parts:
        assert part in text


def test_a_table_for_people(run, picture, tmp_path):
    picture().save(tmp_path / "a.png")
    code, out, err = run("classify", tmp_path / "a.png", "--top-k", 3)
    best = Classifier(str(run.model)).classify(tmp_path / "a.png", 3)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"{tmp_path / 'a.png'}  (random)"
    assert len(lines) == 4
    for line, prediction in zip(lines[1:], best, strict=True):
        assert prediction.label in line
        assert f"{100 * prediction.score:.2f} %" in line


def test_json_for_programs(run, picture, tmp_path):
    picture().save(tmp_path / "b.png")
    code, out, _ = run("classify", "--json", tmp_path / "b.png", "--model", run.model)
    best = Classifier(str(run.model)).classify(tmp_path / "b.png")
    assert code == 0
    assert json.loads(out) == {
        "image": str(tmp_path / "b.png"),
        "model": "random",
        "engine": "kernel",
        "precision": "float32",
        "predictions": [{"label": p.label, "index": p.index, "score": p.score} for p in best],
    }


def test_a_folder_of_good_and_broken_pictures(run, picture, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i in range(10):
        picture(seed=i).save(folder / ("below" if i % 2 else "") / f"good{i}.png")
        (folder / f"broken{i}.jpg").write_bytes(b"\xff\xd8\xff" * i)
    (folder / ".hidden.jpg").write_bytes(b"")
    code, out, err = run("classify", "--json", folder)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert sorted(os.path.basename(a["image"]) for a in answers) == [f"good{i}.png" for i in range(10)]
    for answer in answers:  # each answer belongs to its picture
        best = Classifier(str(run.model)).classify(answer["image"], 1)[0]
        assert answer["predictions"][0]["label"] == best.label
        assert answer["predictions"][0]["score"] == pytest.approx(best.score, abs=1e-6)
    errors = err.splitlines()
    assert len(errors) == 10
    for i in range(10):
        assert sum(f"broken{i}.jpg" in line for line in errors) == 1


def test_only_broken_pictures_are_a_failure(run, tmp_path):
    (tmp_path / "x.jpg").write_text("text")
    code, out, err = run("classify", tmp_path / "x.jpg")
    assert (code, out) == (2, "")
    assert_one_line(err, "x.jpg")


def test_the_heat_map_is_written(run, picture, tmp_path):
    picture(60, 40).save(tmp_path / "c.png")
    code, out, err = run("classify", tmp_path / "c.png", "--heatmap", tmp_path / "heat.png")
    expected = Classifier(str(run.model)).heatmap(tmp_path / "c.png").overlay()
    assert code == 0
    assert out
    assert_one_line(err, "heat.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "heat.png")), np.asarray(expected))


def test_the_sample_needs_no_file(run):
    code, out, _ = run("classify", "--sample", "--json", "--top-k", 1)
    assert code == 0
    assert json.loads(out)["image"] == "sample"


def test_models_lists_every_name(run):
    code, out, _ = run("models")
    assert code == 0
    assert all(any(line.startswith(name + " ") for line in out.splitlines()) for name in MODELS)
    code, out, _ = run("models", "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert list(rows) == list(MODELS)
    assert rows["convmixer_1536_20"]["parameters"] == 51_625_960
    assert rows["convmixer_1536_20"]["top1"] == 81.382


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND"]),
        (["clasify"], ["clasify", "classify"]),
        (["classify"], ["no picture", "--sample"]),
        (["classify", "x.jpg", "--sample"], ["--sample"]),
        (["classify", "x.jpg", "--top-k", "0"], ["'0'", "at least 1"]),
        (["classify", "x.jpg", "--top-k", "many"], ["'many'"]),
        (["classify", "x.jpg", "--modle", "auto"], ["--modle"]),
        (["classify", "x.jpg", "--model", "convmixer_768_23"], ["convmixer_768_32"]),
        (["classify", "x.jpg", "--model", "no/such.safetensors"], ["no/such.safetensors"]),
        (["classify", "x.jpg", "--device", "tpux"], ["tpux", "cpu"]),
        (["classify", "missing.jpg"], ["missing.jpg"]),
        (["classify", "x.jpg", "y.jpg", "--heatmap", "h.png"], ["--heatmap", "one picture"]),
        (["classify", "x.jpg", "--heatmap", "h.txt"], ["h.txt", ".png"]),
        (["classify", "x.jpg", "--heatmap", "no/such/h.png"], ["no/such/h.png"]),
        (["download", "convmixer_999"], ["convmixer_999", "convmixer_768_32"]),
        (["download"], ["NAME"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, arguments, parts):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert_one_line(err, *parts)


def test_an_empty_folder_is_named(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run("classify", tmp_path / "empty")
    assert code == 2
    assert_one_line(err, "empty")


def test_what_is_small_is_not_called_zero():
    assert [percent(s) for s in (0, 1e-9, 0.0004, 0.5)] == ["<0.01 %", "<0.01 %", "0.04 %", "50.00 %"]
    assert [percent(s) for s in (0.9999, 0.99999, 1)] == ["99.99 %", ">99.99 %", ">99.99 %"]


def test_a_name_that_the_terminal_cannot_show(python, random_checkpoint, picture, tmp_path):
    name = "dög \udcff.png"  # a byte that is no UTF-8, on a terminal that knows ASCII alone
    picture().save(tmp_path / "plain.png")
    os.rename(tmp_path / "plain.png", tmp_path / name)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COG_WEIGHTS": str(random_checkpoint())}
    result = python("-m", "convmixer", "classify", tmp_path / name, env=env)
    assert result.returncode == 0, result.stderr
    assert "d\\xf6g" in result.stdout


def test_a_reader_that_leaves_early(random_checkpoint, tmp_path, picture):
    """`| head -1` ends quietly."""
    for i in range(40):
        picture(seed=i).save(tmp_path / f"{i}.png")
    command = f"{sys.executable} -m convmixer classify --model {random_checkpoint()} {tmp_path}/*.png | head -1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(str(tmp_path))
    assert result.stderr == ""


def test_the_real_photographs_with_the_shipped_model(run, photos, capsys):
    if not MODELS["convmixer_256_8_cifar10"].shipped.exists():
        pytest.skip("the shipped weights are not in this checkout")
    for name in ("dog", "cat"):
        code, out, _ = run("classify", "--json", "--model", "convmixer_256_8_cifar10", photos / f"{name}.jpg")
        answer = json.loads(out)
        assert code == 0
        assert answer["model"] == "convmixer_256_8_cifar10"
        assert answer["predictions"][0]["label"] == name and answer["predictions"][0]["score"] > 0.99


def test_version(run):
    assert run("--version") == (0, f"convmixer {convmixer.__version__}\n", "")
