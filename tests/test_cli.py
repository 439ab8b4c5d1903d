"""The command line, as users run it: one picture, many, files of answers, and what was killed and goes on."""

import csv
import io
import json
import os
import pty
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pyarrow.parquet
import pytest
from conftest import ROOT
from file_server import FileServer, Resource
from PIL import Image

import convmixer
from convmixer import Classifier
from convmixer.__main__ import main
from convmixer.bulk import AHEAD, prepared
from convmixer.classify import percent
from convmixer.results import Results, csv_line
from convmixer.zoo import MODELS

COMMAND = [sys.executable, "-m", "convmixer", "classify"]
PICTURES = ("=1+1.png", "a.png", "below/b.jpg", "below/c", "linked/d.webp")


@pytest.fixture
def model(random_checkpoint, monkeypatch):
    """A random model, which is also what "auto" means."""
    path = random_checkpoint()
    monkeypatch.setenv("COG_WEIGHTS", str(path))
    return path


@pytest.fixture
def classify(call_main, model):
    """A function that runs the command in this process; gives (code, stdout, stderr)."""
    return partial(call_main, main, "classify")


@pytest.fixture
def folder(tmp_path, picture):
    """PICTURES, one of them behind a link, and what else lies in such folders."""
    top = tmp_path / "pictures"
    (top / "below" / ".hidden").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(top)
    for seed, place in enumerate(PICTURES):
        picture(seed=seed).save(top / place, "PNG" if place == "below/c" else None)
    for other in ("IMG_1.MOV", "Thumbs.db", "README", "below/.hidden/x.png", ".DS_Store"):
        (top / other).write_bytes(b"\0\0\0\x14ftypqt  no picture")
    return top


def test_a_table_for_people_and_json_for_programs(classify, model, folder):
    photo = folder / "a.png"
    best = Classifier(model).classify(photo, 3)
    code, out, err = classify(photo, "--top-k", 3)
    title, *lines = out.splitlines()
    assert (code, err, title) == (0, "", f"{photo}  (random)")
    for line, prediction in zip(lines, best, strict=True):
        assert prediction.label in line and f"{100 * prediction.score:.2f} %" in line
    assert [percent(s) for s in (0, 0.0004, 0.9999, 1)] == ["<0.01 %", "0.04 %", "99.99 %", ">99.99 %"]
    predictions = [{"label": p.label, "index": p.index, "score": p.score} for p in best]
    about = {"image": str(photo), "model": "random", "engine": "kernel", "precision": "float32"}
    assert json.loads(classify(photo, "--top-k", 3, "--json")[1]) == about | {"predictions": predictions}


def test_the_heat_map_is_written(classify, model, folder, tmp_path):
    code, out, err = classify(folder / "a.png", "--heatmap", tmp_path / "heat.png")
    expected = Classifier(model).heatmap(folder / "a.png").overlay()
    assert code == 0 and out and err.startswith(f"{tmp_path}/heat.png: where the network saw label ")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "heat.png")), np.asarray(expected))


def test_the_sample_the_models_and_the_version_need_no_file(call_main, classify, tmp_path):
    (tmp_path / "labels").write_text("\n".join("abcdefghij"))
    answer = json.loads(classify("--sample", "--json", "--labels", tmp_path / "labels")[1])
    assert answer["image"] == "sample" and answer["predictions"][0]["label"] in "abcdefghij"
    assert call_main(main, "--version") == (0, f"convmixer {convmixer.__version__}\n", "")
    assert [line.split()[0] for line in call_main(main, "models")[1].splitlines()[1:]] == list(MODELS)
    first = json.loads(call_main(main, "models", "--json")[1].splitlines()[0])
    assert (first["name"], first["parameters"], first["top1"]) == ("convmixer_1536_20", 51_625_960, 81.382)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("classify x.jpg --heatmap h.txt", ["h.txt", ".png"]),
        ("classify", ["no picture", "--sample"]),
        ("classify x.jpg --sample", ["--sample stands in for a picture"]),
        ("classify x.jpg --top-k 0", ["'0'", "at least 1"]),
        ("classify x.jpg --model convmixer_768_23", ["convmixer_768_32"]),
        ("classify x.jpg --device tpux", ["tpux", "cpu"]),
        ("classify missing.jpg", ["missing.jpg"]),
        ("classify tests/fuzz", ["tests/fuzz: no picture in this folder"]),
        ("classify x.jpg y.jpg --heatmap h.png", ["--heatmap", "one picture"]),
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


def test_a_picture_that_is_cut_short_is_taken_on_request(classify, picture, tmp_path):
    picture(300, 200).save(tmp_path / "a.jpg", quality=95)
    os.truncate(tmp_path / "a.jpg", os.path.getsize(tmp_path / "a.jpg") // 2)
    assert "cut short" in classify(tmp_path / "a.jpg")[2]
    assert classify(tmp_path / "a.jpg", "--allow-truncated")[0] == 0


def test_standard_input_and_addresses(classify, folder, monkeypatch):
    content = (folder / "a.png").read_bytes()
    expected = json.loads(classify(folder / "a.png", "--json")[1])["predictions"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    answer = json.loads(classify("-", "--json")[1])
    assert (answer["image"], answer["predictions"]) == ("-", expected)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FileServer() as server:
        server.resources["/a.png"] = Resource(content)
        code, out, err = classify(server.url("/a.png"), server.url("/missing.png"), "--json")
    assert code == 1 and json.loads(out)["predictions"] == expected
    assert "missing.png cannot be fetched" in err and err.count("\n") == 1


def test_a_name_that_the_terminal_cannot_show(python, model, folder):
    name = folder / "dög \udcff.png"  # a byte that is no UTF-8, on a terminal that knows ASCII alone
    os.rename(folder / "a.png", name)
    done = python(*COMMAND[1:], name, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "d\\xf6g" in done.stdout, done


@pytest.mark.parametrize("where", ["| head -1", ">&- 2>&-"])
def test_nobody_listens(model, picture, tmp_path, where):
    for number in range(40):
        picture().save(tmp_path / f"{number}.png")
    words = f"set -o pipefail; {' '.join(COMMAND)} {tmp_path}/*.png {where}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == ("head" in where)


def test_a_terminal_shows_how_far_it_is_while_the_answers_go_into_a_file(folder, model):
    (folder / "broken.jpg").write_bytes(b"no picture")
    main_end, terminal = pty.openpty()
    code = "import sys, convmixer.classify as c, convmixer.__main__ as m\nc.PROGRESS_SECONDS = 0\nsys.exit(m.main())"
    command = [sys.executable, "-c", code, "classify", str(folder), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, timeout=120, check=False)
    os.close(terminal)
    shown = os.read(main_end, 100_000).decode()
    os.close(main_end)
    assert (done.returncode, done.stdout.count(b"\n")) == (1, 5)
    assert "  6 of 6, " in shown and " a second, 0:00 left" in shown and "\x1b[Kconvmixer: " in shown


def test_folders_are_walked_through_links_and_what_is_no_picture_is_counted(classify, folder, model):
    code, out, err = classify(folder, folder, folder / "a.png", "--json")
    assert (code, err) == (0, "convmixer: 3 files left out that are no pictures\n")
    answers, names = list(map(json.loads, out.splitlines())), [str(folder / name) for name in PICTURES]
    assert [each["image"] for each in answers] == names
    best = [best.label for (best,) in Classifier(model).classify_many(names, 1)]
    assert [each["predictions"][0]["label"] for each in answers] == best
    (folder / "broken.jpg").write_bytes(b"no picture")
    code, out, err = classify(folder, "--json")
    assert (code, out.count("\n")) == (1, 5) and "broken.jpg cannot be read" in err.splitlines()[0]


def test_a_folder_that_cannot_be_looked_into_is_named(classify, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for _ in range(20):  # deeper than a path can be long
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    code, out, err = classify(folder, "--json")
    assert (code, out.count("\n")) == (1, 5) and "cannot be read (File name too long)" in err


def test_no_more_pictures_are_prepared_than_two_batches_ahead():
    begun = []
    batches = prepared(iter(range(100)), lambda source: begun.append(source) or source, 4, workers=3)
    assert next(batches) == [0, 1, 2, 3]
    assert max(begun) < 4 * AHEAD
    assert [one for batch in batches for one in batch] == [*range(4, 100)]


def table(file) -> list[dict]:
    """The rows of a file of answers."""
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_answers_go_into_a_file(classify, folder, tmp_path, suffix):
    file = tmp_path / f"answers.{suffix}"
    code, out, err = classify(folder, "--output", file, "--top-k", 2)
    assert (code, out) == (0, "") and err.startswith("convmixer: 5 pictures answered in 0:0")
    for row, line in zip(table(file), classify(folder, "--json", "--top-k", 2)[1].splitlines(), strict=True):
        expected = json.loads(line)
        if suffix != "jsonl":
            first, second = expected["predictions"]
            expected = {"image": expected["image"], "label_1": first["label"], "score_2": second["score"]}
            row = {name: type(value)(row[name]) for name, value in expected.items()}
        assert row == expected
    code, _, err = classify(folder, "--output", file)
    assert code == 2 and err.count("\n") == 1 and "is there already; add --resume" in err


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_was_killed_goes_on(classify, tmp_path, picture, suffix):
    pictures, file = tmp_path / "many", tmp_path / f"answers.{suffix}"
    pictures.mkdir()
    picture(300, 200).save(pictures / "000.png")
    for number in range(1, 300):
        (pictures / f"{number:03}.png").write_bytes((pictures / "000.png").read_bytes())
    journal = tmp_path / "answers.parquet.part.jsonl" if suffix == "parquet" else file
    command = [*COMMAND, "--workers", "1", str(pictures), "--output", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait(30)
    with journal.open("ab") as cut:  # as a full disk would leave it
        cut.write(b'{"image": "x' if suffix == "parquet" else b"half a row,conv")
    there = journal.read_bytes().count(b"\n") - (suffix == "csv")
    code, _, err = classify(pictures, "--output", file, "--resume")
    assert code == 0 and err.startswith(f"convmixer: {300 - there} pictures answered")
    assert err.strip().endswith(f"{there} were there already")
    assert [row["image"] for row in table(file)] == sorted(str(path) for path in pictures.iterdir())
    line = "is finished" if suffix == "parquet" else "other columns; give the same --top-k"
    assert line in classify(pictures, "--output", file, "--resume", "--top-k", 2)[2]


def test_cells_that_a_spreadsheet_would_run_are_defused(tmp_path):
    assert csv_line(["=1+1", "@x", "-3", "\tx", "a=b", 0.5, -2.0]) == "'=1+1,'@x,'-3,'\tx,a=b,0.5,-2.0\n"
    with Results(tmp_path / "a.csv", 1) as results:
        results.add({"image": "=a.png", "model": "m", "engine": "e", "precision": "p", "predictions": []})
    with Results(tmp_path / "a.csv", 1, resume=True) as results:
        assert results.done == {"=a.png"}
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="does not hold answers"):
        Results(tmp_path / "other.jsonl", 1, resume=True)
