"""The second source: a file from an address, continued where it was cut off; and the lines that show how far it is."""

import os
import random
import resource as limits
import signal
import socket
import subprocess
import sys
import threading
import time
from io import StringIO

import pytest
from file_server import FileServer, Resource

from convmixer import download
from convmixer.download import DownloadError, fetch, terminal_progress

BODY = random.Random(0).randbytes(700_000)
NEWER_BODY = random.Random(1).randbytes(700_000)

FETCH_SCRIPT = """
import sys
from pathlib import Path
from convmixer.download import DownloadError, fetch
try:
    print(fetch(sys.argv[1], Path(sys.argv[2])))
except DownloadError as error:
    print(error)
"""


@pytest.fixture
def server():
    with FileServer() as server:
        server.resources["/model"] = Resource(BODY, takes_if_range=False)
        yield server


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "cache" / "model.bin"


def start_fetch(url, destination, **options):
    command = [sys.executable, "-c", FETCH_SCRIPT, url, str(destination)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def leave_part(destination, size=300_000):
    destination.parent.mkdir(exist_ok=True)
    destination.with_name("model.bin.part").write_bytes(BODY[:size])


def test_whole_file_with_progress(server, destination):
    reports = []
    assert fetch(server.url("/model"), destination, lambda *report: reports.append(report)) == destination
    assert destination.read_bytes() == BODY
    assert reports[0] == (0, 700_000) and reports[-1] == (700_000, 700_000) and reports == sorted(reports)
    assert {"model.bin"} <= {*os.listdir(destination.parent)} <= {"model.bin", "model.bin.lock"}


def test_file_that_is_here_is_not_fetched(server, destination):
    destination.parent.mkdir()
    destination.write_bytes(b"here")
    assert fetch(server.url("/model"), destination).read_bytes() == b"here"
    assert server.requests == []


def test_next_call_continues(server, destination):
    leave_part(destination)
    reports = []
    fetch(server.url("/model"), destination, lambda *report: reports.append(report))
    assert destination.read_bytes() == BODY
    assert server.requests == [("/model", "bytes=300000-")]
    assert reports[0] == (300_000, 700_000)


def test_a_connection_that_was_cut_is_continued_within_the_call(server, destination):
    server.resources["/model"].cuts = [300_000, 200_000]
    fetch(server.url("/model"), destination)
    assert destination.read_bytes() == BODY
    assert server.requests[0] == ("/model", None) and len(server.requests) == 3


def test_server_that_ignores_ranges(server, destination):
    server.resources["/model"].takes_ranges = False
    leave_part(destination)
    fetch(server.url("/model"), destination)
    assert destination.read_bytes() == BODY


def test_redirect_is_followed_when_continuing_too(server, destination):
    server.resources["/moved"] = Resource(redirect="/model")
    leave_part(destination)
    fetch(server.url("/moved"), destination)
    assert destination.read_bytes() == BODY
    assert server.requests[-1] == ("/model", "bytes=300000-")


def test_pieces_of_two_versions_are_discarded(server, destination):
    """The address has no version. What is joined wrongly is no whole checkpoint, and the next call starts anew."""
    server.resources["/model"].body = NEWER_BODY
    leave_part(destination)

    def check(path):
        if path.read_bytes() != NEWER_BODY:
            raise ValueError("it is not a model")

    with pytest.raises(DownloadError, match="/model: it is not a model"):
        fetch(server.url("/model"), destination, check=check)
    assert not destination.exists()
    fetch(server.url("/model"), destination, check=check)
    assert destination.read_bytes() == NEWER_BODY


def test_part_longer_than_the_file_now_is_discarded(server, destination):
    server.resources["/model"].body = BODY[:1000]
    leave_part(destination)
    with pytest.raises(DownloadError, match="HTTP 416"):
        fetch(server.url("/model"), destination)
    assert fetch(server.url("/model"), destination).read_bytes() == BODY[:1000]


def test_errors_are_one_line(server, destination):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/model"
        with pytest.raises(DownloadError, match=rf"^{dead}: .*refused[^\n]*$"):
            fetch(dead, destination)
    with pytest.raises(DownloadError, match=r"/missing: HTTP 404 Not Found$"):
        fetch(server.url("/missing"), destination)
    for address in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://[bad", ""):
        with pytest.raises(DownloadError):
            fetch(address, destination)
    assert not destination.exists()


def test_only_http_is_followed(server, destination, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    server.resources["/moved"] = Resource(redirect=f"file://{tmp_path}/secret")
    with pytest.raises(DownloadError):
        fetch(server.url("/moved"), destination)
    assert not destination.exists()


def test_full_disk_then_room_again(server, destination):
    def allow_all_but_one_byte():  # writing more fails, as it does on a full disk
        limits.setrlimit(limits.RLIMIT_FSIZE, (699_999, 699_999))

    process = start_fetch(server.url("/model"), destination, preexec_fn=allow_all_but_one_byte)
    output, _ = process.communicate(timeout=60)
    assert output.startswith(server.url("/model")) and output.endswith(": File too large\n")
    fetch(server.url("/model"), destination)
    assert destination.read_bytes() == BODY


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=r"cannot write to .*/file: Not a directory"):
        fetch(server.url("/model"), tmp_path / "file" / "cache" / "model.bin")
    assert server.requests == []


def test_killed_process_is_continued_by_the_next(server, destination):
    process = start_fetch(server.url("/model"), destination)
    part = destination.with_name("model.bin.part")
    wait_until(part.exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    fetch(server.url("/model"), destination)
    assert destination.read_bytes() == BODY


def test_of_two_processes_one_downloads(server, destination):
    server.resources["/model"].pause = threading.Event()
    first = start_fetch(server.url("/model"), destination)
    wait_until(lambda: server.requests)
    second = start_fetch(server.url("/model"), destination)
    time.sleep(1)  # were there no lock, the second would send its request about now
    server.resources["/model"].pause.set()
    for process in (first, second):
        assert process.communicate(timeout=60)[0] == f"{destination}\n"
    assert destination.read_bytes() == BODY
    assert len(server.requests) == 1


def test_progress_off_a_terminal_is_a_first_and_a_last_line():
    stream = StringIO()
    report = terminal_progress("convmixer", stream)
    for done in (0, 50_000_000, 100_000_000):
        report(done, 100_000_000)
    assert stream.getvalue() == "convmixer: 0.0 of 100.0 MB,   0%\nconvmixer: 100.0 of 100.0 MB, 100%\n"


def test_progress_on_a_terminal_is_one_calm_line(monkeypatch):
    stream = StringIO()
    stream.isatty = lambda: True
    clock = iter([10.0, 10.01, 10.2, 10.2, 10.21])
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    report = terminal_progress("convmixer", stream)
    report(0, None)
    report(20_000_000, 100_000_000)  # too soon to be drawn
    report(50_000_000, 100_000_000)
    report(100_000_000, 100_000_000)
    drawn = [line.rstrip() for line in stream.getvalue().split("\r")]
    assert drawn == ["convmixer: 0.0 MB", "convmixer: 50.0 of 100.0 MB,  50%", "convmixer: 100.0 of 100.0 MB, 100%"]
    assert stream.getvalue().count("\n") == 1
