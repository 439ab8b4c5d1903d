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

COMMAND = [sys.executable, "-m", "convmixer"]


@pytest.fixture
def model(random_checkpoint, monkeypatch):
    """A random model, which is also what "auto" means."""
    path = random_checkpoint()
    monkeypatch.setenv("COG_WEIGHTS", str(path))
    return path


@pytest.fixture
def photo(picture, tmp_path):
    picture(60, 40).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_table_for_people_and_json_for_programs(call_main, model, photo):
    best = Classifier(model).classify(photo, 3)
    code, out, err = call_main(main, "classify", photo, "--top-k", 3)
    lines = out.splitlines()
    assert (code, err, lines[0], len(lines)) == (0, "", f"{photo}  (random)", 4)
    for line, prediction in zip(lines[1:], best, strict=True):
        assert prediction.label in line and f"{100 * prediction.score:.2f} %" in line
    code, out, err = call_main(main, "classify", photo, "--top-k", 3, "--json", "--model", model)
    assert [percent(s) for s in (0, 0.0004, 0.9999, 1)] == ["<0.01 %", "0.04 %", "99.99 %", ">99.99 %"]
    assert json.loads(out) == {
        "image": str(photo),
        "model": "random",
        "engine": "kernel",
        "precision": "float32",
        "predictions": [{"label": p.label, "index": p.index, "score": p.score} for p in best],
    }


def test_the_heat_map_is_written(call_main, model, photo, tmp_path):
    code, out, err = call_main(main, "classify", photo, "--heatmap", tmp_path / "heat.png")
    expected = Classifier(model).heatmap(photo).overlay()
    assert code == 0 and out and err.startswith(f"{tmp_path}/heat.png: where the network saw label ")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "heat.png")), np.asarray(expected))


def test_the_sample_and_the_version_need_no_file(call_main, model):
    assert json.loads(call_main(main, "classify", "--sample", "--json")[1])["image"] == "sample"
    assert call_main(main, "--version") == (0, f"convmixer {convmixer.__version__}\n", "")


def test_models_lists_every_name(call_main):
    code, out, _ = call_main(main, "models")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(MODELS)
    rows = {row["name"]: row for row in map(json.loads, call_main(main, "models", "--json")[1].splitlines())}
    assert (rows["convmixer_1536_20"]["parameters"], rows["convmixer_1536_20"]["top1"]) == (51_625_960, 81.382)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", ["COMMAND"]),
        ("classify", ["no picture", "--sample"]),
        ("classify x.jpg --top-k 0", ["'0'", "at least 1"]),
        ("classify x.jpg --modle auto", ["--modle"]),
        ("classify x.jpg --model convmixer_768_23", ["convmixer_768_32"]),
        ("classify x.jpg --device tpux", ["tpux", "cpu"]),
        ("classify missing.jpg", ["missing.jpg"]),
        ("classify tests/fuzz", ["tests/fuzz: no picture in this folder"]),
        ("classify x.jpg y.jpg --heatmap h.png", ["--heatmap", "one picture"]),
        ("classify x.jpg --heatmap h.txt", ["h.txt", ".png"]),
        ("classify x.jpg --output no/such/a.csv", ["no/such/a.csv"]),
        ("classify x.jpg --resume", ["--output"]),
        ("classify x.jpg --output a.txt", ["a.txt", ".parquet"]),
        ("download convmixer_999", ["convmixer_999", "convmixer_768_32"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(call_main, model, arguments, parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = call_main(main, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Traceback" not in err and all(part in err for part in parts), err


def test_a_picture_that_is_cut_short_is_taken_on_request(call_main, model, picture, tmp_path):
    picture(300, 200).save(tmp_path / "a.jpg", quality=95)
    os.truncate(tmp_path / "a.jpg", os.path.getsize(tmp_path / "a.jpg") // 2)
    assert "cut short" in call_main(main, "classify", tmp_path / "a.jpg")[2]
    assert call_main(main, "classify", tmp_path / "a.jpg", "--allow-truncated")[0] == 0


# In processes of their own


def test_a_name_that_the_terminal_cannot_show(python, model, photo):
    name = "dög \udcff.png"  # a byte that is no UTF-8, on a terminal that knows ASCII alone
    os.rename(photo, photo.with_name(name))
    done = python(*COMMAND[1:], "classify", photo.with_name(name), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "d\\xf6g" in done.stdout, done


@pytest.mark.parametrize("where", ["| head -1", ">&- 2>&-"])
def test_nobody_listens(model, photo, where):
    for number in range(40):
        photo.with_name(f"{number}.png").write_bytes(photo.read_bytes())
    words = f"set -o pipefail; {' '.join(COMMAND)} classify {photo.parent} {where}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == ("head" in where)


def test_the_tiff_library_says_nothing_by_itself(python, model, picture, tmp_path):
    picture(300, 200).save(tmp_path / "a.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[2000:6000] = bytes(4000)
    (tmp_path / "a.tif").write_bytes(content)
    done = python(*COMMAND[1:], "classify", tmp_path / "a.tif")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a.tif is damaged" in done.stderr
