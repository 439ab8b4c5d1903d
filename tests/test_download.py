import json
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
from pathlib import Path

import pytest
from file_server import FileServer, Resource

from convmixer import download
from convmixer.download import DiskError, DownloadError, fetch, terminal_progress

BODY = random.Random(0).randbytes(700_000)
NEWER_BODY = random.Random(1).randbytes(700_000)

# The module alone, without the package around it: it starts fast, and must need nothing beyond the standard library.
FETCH_SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(download.__file__).parent)!r})
from download import DownloadError, fetch
assert "urllib.request" not in sys.modules  # slow to import, and most uses of the package download nothing
print("ready", flush=True)
try:
    print(fetch([sys.argv[1]], sys.argv[2]))
except DownloadError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def server():
    with FileServer() as server:
        yield server


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def destination(tmp_path):
    return tmp_path / "cache" / "model.bin"


def start_fetch(url, destination, **options):
    command = [sys.executable, "-c", FETCH_SCRIPT, url, str(destination)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def leave_part(server, destination, path="/model", size=300_000):
    """Have a first call fetch ``size`` bytes and fail."""
    server.resources[path].cuts = [size]
    with pytest.raises(DownloadError, match=f"ended after {size} of 700000 bytes"):
        fetch([server.url(path)], destination, retries=0)
    assert size_of(destination.with_name("model.bin.part")) == size
    server.requests.clear()


def test_whole_file_with_progress(server, destination):
    server.resources["/model"] = Resource(BODY)
    reports = []
    assert fetch([server.url("/model")], destination, progress=lambda *report: reports.append(report)) == destination
    assert destination.read_bytes() == BODY
    assert reports[0] == (0, 700_000) and reports[-1] == (700_000, 700_000)
    assert reports == sorted(reports) and len(reports) > 2
    assert os.listdir(destination.parent) == ["model.bin"]


def test_file_that_is_here_is_not_fetched(server, destination):
    destination.parent.mkdir()
    destination.write_bytes(b"here")
    assert fetch([server.url("/model")], destination).read_bytes() == b"here"
    assert server.requests == []


def test_unknown_length(server, destination):
    server.resources["/model"] = Resource(BODY, sends_length=False)
    reports = []
    fetch([server.url("/model")], destination, progress=lambda *report: reports.append(report))
    assert destination.read_bytes() == BODY
    assert reports[0] == (0, None) and reports[-1] == (700_000, 700_000)


def test_cut_connections_are_continued_within_a_call(server, destination):
    server.resources["/model"] = Resource(BODY, cuts=[300_000, 200_000])
    reports = []
    fetch([server.url("/model")], destination, progress=lambda *report: reports.append(report))
    assert destination.read_bytes() == BODY
    assert [range for _, range in server.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert (500_000, 700_000) in reports and reports == sorted(reports)


def test_next_call_continues(server, destination):
    server.resources["/model"] = Resource(BODY)
    leave_part(server, destination)
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert server.requests == [("/model", "bytes=300000-")]


def test_interrupt_leaves_the_part(server, destination):
    server.resources["/model"] = Resource(BODY)

    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch([server.url("/model")], destination, progress=interrupt)
    size = size_of(destination.with_name("model.bin.part"))
    assert 0 < size < 700_000
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert server.requests[1:] == [("/model", f"bytes={size}-")]


def test_complete_part_needs_no_request(server, destination):
    server.resources["/model"] = Resource(BODY)
    leave_part(server, destination)
    destination.with_name("model.bin.part").write_bytes(BODY)
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert server.requests == []


def test_server_that_ignores_ranges(server, destination):
    server.resources["/model"] = Resource(BODY, takes_ranges=False)
    leave_part(server, destination)
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY


@pytest.mark.parametrize("takes_if_range", [True, False])
def test_pieces_of_two_versions_are_not_joined(server, destination, takes_if_range):
    server.resources["/model"] = Resource(BODY)
    leave_part(server, destination)
    server.resources["/model"] = Resource(NEWER_BODY, etag='"v2"', takes_if_range=takes_if_range)
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == NEWER_BODY


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_validator_the_file_is_fetched_anew(server, destination, etag):
    server.resources["/model"] = Resource(BODY, etag=etag)
    leave_part(server, destination)
    server.resources["/model"].body = NEWER_BODY
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == NEWER_BODY
    assert server.requests == [("/model", None)]


def test_part_longer_than_the_file_now(server, destination):
    server.resources["/model"] = Resource(BODY)
    leave_part(server, destination)
    server.resources["/model"] = Resource(NEWER_BODY[:1000], takes_if_range=False)
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == NEWER_BODY[:1000]


def test_damaged_notes_start_anew(server, destination):
    server.resources["/model"] = Resource(BODY)
    for notes in ["", "{", "[]", "{}", json.dumps({"url": server.url("/model")})]:
        leave_part(server, destination)
        destination.with_name("model.bin.part.json").write_text(notes)
        fetch([server.url("/model")], destination)
        assert destination.read_bytes() == BODY
        destination.unlink()


def test_missing_file_goes_to_the_next_source_at_once(server, destination):
    server.resources["/model"] = Resource(BODY)
    fetch([server.url("/missing"), server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["/missing", "/model"]


def test_part_of_one_source_is_not_continued_from_another(server, destination):
    server.resources["/model"] = Resource(BODY)
    server.resources["/other"] = Resource(NEWER_BODY)
    leave_part(server, destination)
    fetch([server.url("/other")], destination)
    assert destination.read_bytes() == NEWER_BODY
    assert server.requests == [("/other", None)]


def test_busy_server_is_asked_again(server, destination):
    server.resources["/model"] = Resource(BODY, statuses=[503, 429])
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY


def test_truncated_body_is_never_finished(server, destination):
    server.resources["/model"] = Resource(BODY, takes_ranges=False, cuts=[300_000] * 9)
    with pytest.raises(DownloadError, match="ended after 300000 of 700000 bytes"):
        fetch([server.url("/model")], destination, retries=2)
    assert len(server.requests) == 3
    assert not destination.exists()


def test_redirect_is_followed_when_continuing_too(server, destination):
    server.resources["/files/model"] = Resource(BODY, cuts=[300_000])
    server.resources["/model"] = Resource(redirect="/files/model")
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert server.requests[-1] == ("/files/model", "bytes=300000-")


def test_error_is_one_line_with_every_source_and_reason(server, destination):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/model"
        with pytest.raises(DownloadError) as caught:
            fetch([dead, server.url("/missing")], destination, retries=1)
    assert str(caught.value) == (
        f"could not download model.bin: {dead}: Connection refused; {server.url('/missing')}: HTTP 404 Not Found"
    )


def test_silent_server_times_out(server, destination):
    server.resources["/model"] = Resource(BODY, pause=threading.Event())
    with pytest.raises(DownloadError, match="timed out"):
        fetch([server.url("/model")], destination, timeout=0.1, retries=0)
    assert size_of(destination.with_name("model.bin.part")) == 350_000


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_only_http_is_followed(server, destination, tmp_path, scheme):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    address = f"{scheme}://{secret}"
    server.resources["/model"] = Resource(redirect=address)
    for url in (address, server.url("/model"), str(secret), "http://[bad", ""):
        with pytest.raises(DownloadError, match="could not download"):
            fetch([url], destination, retries=0)
    assert not destination.exists()


def test_failed_check_discards_and_goes_on(server, destination):
    server.resources["/model"] = Resource(BODY)
    server.resources["/other"] = Resource(NEWER_BODY)

    def check(path):
        if path.read_bytes() != NEWER_BODY:
            raise ValueError("it is not a model")

    with pytest.raises(DownloadError, match="/model: it is not a model"):
        fetch([server.url("/model")], destination, check=check)
    assert not destination.exists() and not destination.with_name("model.bin.part").exists()
    fetch([server.url("/model"), server.url("/other")], destination, check=check)
    assert destination.read_bytes() == NEWER_BODY


def test_full_disk_then_room_again(server, destination):
    server.resources["/model"] = Resource(BODY)

    def allow_all_but_one_byte():  # writing more fails, as it does on a full disk
        limits.setrlimit(limits.RLIMIT_FSIZE, (699_999, 699_999))

    process = start_fetch(server.url("/model"), destination, preexec_fn=allow_all_but_one_byte)
    output, _ = process.communicate(timeout=20)
    assert output == f"DiskError cannot write to {destination.parent}: File too large (0.7 MB are needed)\n"
    assert size_of(destination.with_name("model.bin.part")) == 699_999
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert [range for _, range in server.requests] == [None, "bytes=699999-"]


def test_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=r"cannot write to .*file/cache: Not a directory"):
        fetch([server.url("/model")], tmp_path / "file" / "cache" / "model.bin")
    assert server.requests == []


def test_killed_process_is_continued_by_the_next(server, destination):
    server.resources["/model"] = Resource(BODY, pause=threading.Event())
    process = start_fetch(server.url("/model"), destination)
    wait_until(lambda: size_of(destination.with_name("model.bin.part")) == 350_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.resources["/model"].pause.set()
    assert not destination.exists()
    fetch([server.url("/model")], destination)
    assert destination.read_bytes() == BODY
    assert [range for _, range in server.requests] == [None, "bytes=350000-"]


def test_of_two_processes_one_downloads(server, destination):
    server.resources["/model"] = Resource(BODY, pause=threading.Event())
    first = start_fetch(server.url("/model"), destination)
    wait_until(lambda: size_of(destination.with_name("model.bin.part")) == 350_000)
    second = start_fetch(server.url("/model"), destination)
    time.sleep(0.2)  # were there no lock, the second would send its request now
    server.resources["/model"].pause.set()
    for process in (first, second):
        assert process.communicate(timeout=20)[0] == f"{destination}\n"
    assert destination.read_bytes() == BODY
    assert len(server.requests) == 1
    assert os.listdir(destination.parent) == ["model.bin"]


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
