"""The second source: a file from an address, continued where it was cut off; and the lines that show how far it is."""

import random
import re
import resource as limits
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO

import pytest
from file_server import FileServer, Resource

from convmixer import download
from convmixer.download import DownloadError, fetch, terminal_progress

BODY = random.Random(0).randbytes(700_000)
FETCH = "import sys, pathlib, convmixer.download as d; d.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between two tries
    with FileServer() as server:
        server.resources["/model"] = Resource(BODY)
        server.resources["/moved"] = Resource(redirect="/model")
        yield server


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "cache" / "model.bin"


def leave_part(destination, content=BODY[:300_000]):
    destination.parent.mkdir(exist_ok=True)
    destination.with_name("model.bin.part").write_bytes(content)


def test_whole_file_over_a_connection_that_is_cut_with_progress_and_only_once(server, destination):
    server.resources["/model"].cuts = [300_000, 200_000]
    reports = []
    for _ in range(2):
        assert fetch(server.url("/model"), destination, lambda *report: reports.append(report)) == destination
    assert destination.read_bytes() == BODY and len(server.requests) == 3
    assert reports[0] == (0, 700_000) and reports[-1] == (700_000, 700_000) and reports == sorted(reports)


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_next_call_continues_where_the_server_can(server, destination, takes_ranges):
    server.resources["/model"].takes_ranges = takes_ranges
    leave_part(destination)
    reports = []
    fetch(server.url("/moved"), destination, lambda *report: reports.append(report))
    assert destination.read_bytes() == BODY and server.requests[-1] == ("/model", "bytes=300000-")
    assert reports[0] == (300_000, 700_000) or not takes_ranges


@pytest.mark.parametrize(
    ("part", "message"),
    [(b"of another version", "/model: it is not a model"), (BODY + b"longer", "HTTP 416")],
)
def test_a_part_of_another_version_is_discarded(server, destination, part, message):
    """The address has no version. What is joined wrongly is no whole checkpoint, and the next call starts anew."""
    leave_part(destination, part)

    def check(path):
        if path.read_bytes() != BODY:
            raise ValueError("it is not a model")

    with pytest.raises(DownloadError, match=message):
        fetch(server.url("/model"), destination, check=check)
    assert not destination.exists()
    assert fetch(server.url("/model"), destination, check=check).read_bytes() == BODY


def test_what_cannot_be_had_is_one_line_and_only_http_is_followed(server, destination):
    server.resources["/astray"] = Resource(redirect="file:///etc/passwd")
    wrong = {server.url("/missing"): "HTTP 404 Not Found", "http://127.0.0.1:9/x": "refused", "file:///etc/passwd": ""}
    for address, line in (wrong | {server.url("/astray"): "", "http://[bad": ""}).items():
        with pytest.raises(DownloadError, match=rf"^{re.escape(address)}: [^\n]*{line}[^\n]*$"):
            fetch(address, destination)
        assert not destination.exists()


def test_a_disk_that_takes_no_more(server, destination, tmp_path):
    before = limits.getrlimit(limits.RLIMIT_FSIZE)
    limits.setrlimit(limits.RLIMIT_FSIZE, (699_999, before[1]))
    try:
        with pytest.raises(DownloadError, match=r"/model: cannot write to .*: File too large$"):
            fetch(server.url("/model"), destination)
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, before)
    assert fetch(server.url("/model"), destination).read_bytes() == BODY


def test_of_two_processes_one_downloads_and_the_other_goes_on_if_it_is_killed(server, destination):
    server.resources["/model"].pause = threading.Event()
    first = subprocess.Popen([sys.executable, "-c", FETCH, server.url("/model"), str(destination)])
    with first, ThreadPoolExecutor(1) as second:
        while not server.requests:
            assert first.poll() is None
            time.sleep(0.005)
        fetched = second.submit(fetch, server.url("/model"), destination)
        time.sleep(0.3)  # were there no lock, the second would send its request about now
        assert len(server.requests) == 1
        first.kill()
        server.resources["/model"].pause.set()
        assert fetched.result(60).read_bytes() == BODY
    assert len(server.requests) == 2


def test_progress_on_a_terminal_is_one_calm_line(monkeypatch):
    stream, clock = StringIO(), iter([10.0, 10.01, 10.2, 10.2, 10.21])
    stream.isatty = lambda: True
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    report = terminal_progress("convmixer", stream)
    report(0, None)
    for megabytes in (20, 50, 100):  # the first too soon to be drawn
        report(megabytes * 10**6, 10**8)
    drawn = ["convmixer: 0.0 MB", "convmixer: 50.0 of 100.0 MB,  50%", "convmixer: 100.0 of 100.0 MB, 100%"]
    assert [line.rstrip() for line in stream.getvalue().split("\r")] == drawn
