"""Many pictures: folders as people have them, files of answers, what was killed and goes on."""

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial

import pyarrow.parquet
import pytest
from conftest import ROOT
from file_server import FileServer, Resource

from convmixer import Classifier
from convmixer.__main__ import main
from convmixer.bulk import AHEAD, prepared
from convmixer.results import Results, csv_line


@pytest.fixture
def model(random_checkpoint):
    return random_checkpoint()


@pytest.fixture
def classify(call_main, model):
    """A function that runs the command in this process with a random model; gives (code, stdout, stderr)."""
    return partial(call_main, main, "classify", "--device", "cpu", "--model", model)


@pytest.fixture
def folder(tmp_path, picture):
    """Five good pictures in folders, one of them behind a link, and what else lies in such folders."""
    top = tmp_path / "pictures"
    (top / "below" / ".hidden").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for seed, place in enumerate(("a.png", "below/b.jpg", "below/c", "../elsewhere/d.webp", "=1+1.png")):
        picture(seed=seed).save(top / place, {"below/c": "PNG"}.get(place))
    (top / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(top)
    for other in ("IMG_1.MOV", "Thumbs.db", "README", "below/.hidden/x.png", ".DS_Store"):
        (top / other).write_bytes(b"\0\0\0\x14ftypqt  no picture")
    return top


def names(folder) -> list[str]:
    return [str(folder / name) for name in ("=1+1.png", "a.png", "below/b.jpg", "below/c", "linked/d.webp")]


def table(file) -> list[dict]:
    """The rows of a file of answers."""
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines) if file.suffix == ".csv" else map(json.loads, lines))


def test_folders_are_walked_through_links_and_what_is_no_picture_is_counted(classify, folder, model):
    code, out, err = classify(folder, folder, folder / "a.png", "--json")
    assert (code, err) == (0, "convmixer: 3 files left out that are no pictures\n")
    answers = list(map(json.loads, out.splitlines()))
    assert [each["image"] for each in answers] == names(folder)
    best = [best for (best,) in Classifier(model, device="cpu").classify_many(names(folder), 1)]
    assert [each["predictions"][0]["label"] for each in answers] == [each.label for each in best]
    (folder / "broken.jpg").write_bytes(b"no picture")
    code, out, err = classify(folder, "--json")
    assert (code, out.count("\n")) == (1, 5) and "broken.jpg cannot be read" in err.splitlines()[0]


def test_a_folder_that_cannot_be_looked_into_is_named(classify, folder, monkeypatch):
    scandir = os.scandir

    def closed(path):  # root may look into every real one
        if path.endswith("below"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    code, out, err = classify(folder, "--json")
    assert (code, out.count("\n")) == (1, 3)
    assert err.startswith(f"convmixer: the folder {folder / 'below'} cannot be read (Permission denied)\n")


def test_no_more_pictures_are_prepared_than_two_batches_ahead():
    begun = []
    batches = prepared(iter(range(100)), lambda source: begun.append(source) or source, 4, workers=3)
    assert next(batches) == [0, 1, 2, 3]
    assert max(begun) < 4 * AHEAD
    assert [one for batch in batches for one in batch] == [*range(4, 100)]


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
def test_what_was_killed_goes_on(classify, model, tmp_path, picture, suffix):
    pictures, file = tmp_path / "many", tmp_path / f"answers.{suffix}"
    pictures.mkdir()
    picture(300, 200).save(pictures / "000.png")
    for number in range(1, 300):
        (pictures / f"{number:03}.png").write_bytes((pictures / "000.png").read_bytes())
    journal = tmp_path / "answers.parquet.part.jsonl" if suffix == "parquet" else file
    command = [sys.executable, "-m", "convmixer", "classify", "--workers", "1", "--model", str(model), str(pictures)]
    process = subprocess.Popen([*command, "--output", str(file)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
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


def test_a_terminal_shows_how_far_it_is_while_the_answers_go_into_a_file(folder, model):
    (folder / "broken.jpg").write_bytes(b"no picture")
    main_end, terminal = pty.openpty()
    code = "import sys, convmixer.classify as c, convmixer.__main__ as m\nc.PROGRESS_SECONDS = 0\nsys.exit(m.main())"
    command = [sys.executable, "-c", code, "classify", str(folder), "--json", "--model", str(model)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, timeout=120, check=False)
    os.close(terminal)
    shown = os.read(main_end, 100_000).decode()
    os.close(main_end)
    assert (done.returncode, done.stdout.count(b"\n")) == (1, 5)
    assert "  6 of 6, " in shown and " a second, 0:00 left" in shown and "\x1b[Kconvmixer: " in shown


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
