"""Many pictures: folders as people have them, files of answers, what was killed and goes on."""

import csv
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from file_server import FileServer, Resource

from convmixer import Classifier, ImageError
from convmixer.bulk import AHEAD, prepared
from convmixer.files import find_pictures
from convmixer.results import Results, csv_line, flat

COMMAND = [sys.executable, "-m", "convmixer", "classify"]


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
    for other in ("IMG_1.MOV", "IMG_1.AAE", "Thumbs.db", "README", "below/.hidden/x.png", ".DS_Store"):
        (top / other).write_bytes(b"\0\0\0\x14ftypqt  no picture")
    return top


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [*COMMAND, "--device", "cpu", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False, **options)


def names(folder) -> list[str]:
    return [str(folder / name) for name in ("=1+1.png", "a.png", "below/b.jpg", "below/c", "linked/d.webp")]


def test_folders_are_walked_through_links_and_once(folder):
    found = find_pictures([str(folder), str(folder), str(folder / "a.png")])
    assert found.names == names(folder)
    assert (found.unreadable, found.others) == ([], 4)


def test_what_is_no_picture_is_counted_and_what_is_broken_named(folder):
    (folder / "broken.jpg").write_bytes(b"no picture")
    done = run(folder, "--json")
    assert done.returncode == 1
    assert [json.loads(line)["image"] for line in done.stdout.splitlines()] == names(folder)
    broken, others = done.stderr.decode().splitlines()
    assert "broken.jpg cannot be read" in broken
    assert others == "convmixer: 4 files left out that are no pictures"
    (folder / "broken.jpg").unlink()
    assert run(folder).returncode == 0


def test_a_folder_that_cannot_be_looked_into_is_named(folder):
    code = (
        "import os, sys; from convmixer.files import find_pictures\n"
        "if os.getuid() == 0: os.setuid(65534)\n"  # root may look into every folder
        "print(find_pictures(sys.argv[1:]).unreadable)"
    )
    (folder / "below").chmod(0)
    for parent in folder.parents[:4]:  # those of pytest
        parent.chmod(0o755)
    try:
        command = [sys.executable, "-c", code, str(folder)]
        seen = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    finally:
        (folder / "below").chmod(0o755)
    assert seen.stdout == f"['the folder {folder / 'below'} cannot be read (Permission denied)']\n", seen


def test_pictures_are_prepared_ahead_and_in_order_and_no_further():
    begun, lock = [], threading.Lock()

    def prepare(source: int) -> int:
        with lock:
            begun.append(source)
        if source == 5:
            raise ImageError("five")
        time.sleep(0.001 * (source % 3))
        return source

    batches = prepared(iter(range(100)), prepare, 4, workers=3)
    first = next(batches)
    assert first == [0, 1, 2, 3]
    time.sleep(0.2)
    assert max(begun) < 4 * AHEAD  # no more than that are in memory
    rest = [one for batch in batches for one in batch]
    assert str(rest[1]) == "five"
    assert [one for one in rest if not isinstance(one, ImageError)] == [4, *range(6, 100)]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_answers_go_into_a_file(folder, tmp_path, suffix):
    file = tmp_path / f"answers.{suffix}"
    done = run(folder, "--output", file, "--top-k", 2)
    assert done.returncode == 0 and done.stdout == b"", done
    summary = done.stderr.decode().splitlines()[0]
    assert summary.startswith("convmixer: 5 pictures answered in 0:0") and summary.endswith(" a second")
    expected = [json.loads(line) for line in run(folder, "--json", "--top-k", 2).stdout.splitlines()]
    if suffix == "csv":
        rows = list(csv.DictReader(file.open(newline="")))
        assert [row["image"] for row in rows] == names(folder)
        assert [(row["label_1"], float(row["score_2"])) for row in rows] == [
            (each["predictions"][0]["label"], each["predictions"][1]["score"]) for each in expected
        ]
    elif suffix == "jsonl":
        assert [json.loads(line) for line in file.read_text().splitlines()] == expected
    else:
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(file).to_pylist() == [flat(each, 2) for each in expected]
    again = run(folder, "--output", file)
    assert again.returncode == 2 and again.stderr.count(b"\n") == 1
    assert (b"is finished" if suffix == "parquet" else b"add --resume") in again.stderr or suffix == "parquet"


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_what_was_killed_goes_on(tmp_path, picture, suffix):
    pictures = tmp_path / "many"
    pictures.mkdir()
    for seed in range(300):
        picture(300, 200, seed=seed).save(pictures / f"{seed:03}.png")
    file = tmp_path / f"answers.{suffix}"
    journal = tmp_path / f"answers.{suffix}.part.jsonl" if suffix == "parquet" else file
    command = [*COMMAND, "--device", "cpu", "--workers", "1", str(pictures), "--output", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 40):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    with journal.open("ab") as cut:  # as a full disk would leave it
        cut.write(b'{"image": "x' if suffix != "csv" else b"half a row,conv")
    there = journal.read_bytes().count(b"\n") - (suffix == "csv")
    assert there < 300
    done = run(pictures, "--output", file, "--resume")
    assert done.returncode == 0, done
    assert done.stderr.decode().startswith(f"convmixer: {300 - there} pictures answered")
    assert done.stderr.decode().strip().endswith(f"{there} were there already")
    with Results(tmp_path / "other.jsonl", 5) as other:
        assert other.done == set()
    if suffix == "parquet":
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(file).column("image").to_pylist()
    elif suffix == "csv":
        found = [row["image"] for row in csv.DictReader(file.open(newline=""))]
    else:
        found = [json.loads(line)["image"] for line in file.read_text().splitlines()]
    assert found == sorted(str(path) for path in pictures.iterdir())


def test_cells_that_a_spreadsheet_would_run_are_defused(tmp_path):
    assert csv_line(["=1+1", "@x", "-3", "+4", "\tx", "a=b", 0.5, -2.0]) == "'=1+1,'@x,'-3,'+4,'\tx,a=b,0.5,-2.0\n"
    answer = {"image": "=a.png", "model": "m", "engine": "e", "precision": "p", "predictions": []}
    with Results(tmp_path / "a.csv", 1) as results:
        results.add(answer)
    assert "\n'=a.png," in (tmp_path / "a.csv").read_text()
    with Results(tmp_path / "a.csv", 1, resume=True) as results:
        assert results.done == {"=a.png"}
    with pytest.raises(ValueError, match="other columns; give the same --top-k"):
        Results(tmp_path / "a.csv", 2, resume=True)


def test_a_terminal_shows_how_far_it_is_while_the_answers_go_into_a_file(folder):
    main_end, terminal = pty.openpty()
    command = [*COMMAND, "--device", "cpu", str(folder), "--json"]
    code = "import convmixer.classify as c, runpy, sys; c.PROGRESS_SECONDS = 0; sys.argv[0] = 'convmixer';"
    code += "from convmixer.__main__ import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command[3:]], cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal
    )
    answers = process.communicate(timeout=60)[0]
    os.close(terminal)
    shown = os.read(main_end, 100_000).decode()
    os.close(main_end)
    assert answers.count(b"\n") == 5
    assert "  5 of 5, " in shown and " a second, 0:00 left" in shown


def test_standard_input_and_addresses(picture, tmp_path):
    picture().save(tmp_path / "a.png")
    expected = json.loads(run(tmp_path / "a.png", "--json").stdout)["predictions"]
    with (tmp_path / "a.png").open("rb") as stream:
        piped = json.loads(run("-", "--json", stdin=stream).stdout)
    assert piped == piped | {"image": "-", "predictions": expected}
    with FileServer() as server:
        server.resources["/a.png"] = Resource((tmp_path / "a.png").read_bytes())
        fetched = run(server.url("/a.png"), server.url("/missing.png"), "--json")
        assert fetched.returncode == 1
        assert json.loads(fetched.stdout)["predictions"] == expected
        assert b"missing.png cannot be fetched" in fetched.stderr and fetched.stderr.count(b"\n") == 1


def test_other_pictures_are_answered_beside_a_broken_one(random_checkpoint, picture, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no")
    classifier = Classifier(random_checkpoint(), device="cpu")
    sources = [picture(seed=1), tmp_path / "broken.png", picture(seed=2)]
    first, broken, last = classifier.classify_many(sources, errors="return")
    assert [first, last] == classifier.classify_many([sources[0], sources[2]])
    assert isinstance(broken, ImageError)
    with pytest.raises(ImageError):
        classifier.classify_many(sources)
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        classifier.classify_many(sources, errors="ignore")


def test_a_picture_that_is_cut_short_is_taken_on_request(tmp_path, picture):
    picture(300, 200).save(tmp_path / "a.jpg", quality=95)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    refused = run(tmp_path / "half.jpg")
    assert refused.returncode == 2 and refused.stderr.count(b"\n") == 1
    assert run(tmp_path / "half.jpg", "--allow-truncated").returncode == 0


def test_nobody_listens(tmp_path, picture):
    picture().save(tmp_path / "a.png")
    words = " ".join(map(shlex.quote, [*COMMAND, "--device", "cpu", str(tmp_path / "a.png")]))
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(["sh", "-c", f"{words} {closed}"], cwd=ROOT, capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b""), closed


def test_the_tiff_library_says_nothing_by_itself(tmp_path, picture):
    picture(300, 200).save(tmp_path / "a.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[2000:6000] = bytes(4000)
    (tmp_path / "b.tif").write_bytes(content)
    done = run(tmp_path / "b.tif")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"b.tif is damaged" in done.stderr
