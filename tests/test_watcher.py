"""serving/watcher.py and serving/supervisor.py over small processes; test_killed_server.py has the real server."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cog_server import PATIENCE, ROOT, wait_until
from processes import children

from serving import watcher

# The watcher, over a process that stands for the server.


@contextlib.contextmanager
def waiting(ignored: str = "") -> Iterator[subprocess.Popen]:
    """A process that waits for a signal."""
    code = "import signal, time; "
    code += f"signal.signal(signal.{ignored}, signal.SIG_IGN); " if ignored else ""
    code += "print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def says(status: str) -> Iterator[int]:
    """The port of a server whose health is always this."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"status": status}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


def watch(server: subprocess.Popen, said: bytes, stays: bool = False, port: int = 9, under_way: int = 0) -> None:
    """A watcher whose worker said this and is gone, or stays and says nothing more."""
    reading, writing = os.pipe()
    pidfd = os.pidfd_open(server.pid)
    os.write(writing, said)
    if not stays:
        os.close(writing)
    try:
        watcher.watch(reading, pidfd, "127.0.0.1", port, under_way)
    finally:
        for number in (reading, pidfd, *([writing] if stays else [])):
            os.close(number)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(watcher, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(watcher, "STUCK", 0.1)


def test_a_server_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(watcher, "SECONDS_TO_LEAVE", 0.1)
    with waiting(ignored="SIGINT") as server:
        watch(server, b"+")
        assert server.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("said", [watcher.LEAVES, b"+" + watcher.LEAVES])
def test_a_server_is_left_alone_after_an_orderly_end(monkeypatch, said):
    monkeypatch.setattr(watcher, "ended", lambda *_: pytest.fail("it should not even wait"))
    with waiting() as server:
        watch(server, said)
        assert server.poll() is None


def test_a_server_that_is_busy_with_nothing_is_ended(quick, capfd):
    with waiting() as server, says("BUSY") as port:
        watch(server, b"+-", stays=True, port=port)
        assert server.wait(PATIENCE) == -signal.SIGINT
    assert "busy for 0.1 s with no request under way" in capfd.readouterr().err


class Enough(Exception):
    """So many looks at the health are enough."""


@pytest.mark.parametrize(
    ("status", "said", "under_way"), [("BUSY", b"+", 0), ("BUSY", b"", 1), ("READY", b"", 0), ("", b"", 0)]
)
def test_a_server_that_is_not_stuck_is_left_alone(quick, monkeypatch, status, said, under_way):
    """Also by a watcher that took the place of another while a request was under way."""
    looks = []

    def select(*arguments):
        looks.append(1)
        if len(looks) > 50:
            raise Enough
        return real(*arguments)

    real = watcher.select.select
    monkeypatch.setattr(watcher.select, "select", select)
    with waiting() as server, says(status) as port, pytest.raises(Enough):
        watch(server, said, stays=True, port=port if status else 9, under_way=under_way)
    assert server.returncode == -signal.SIGKILL  # by this test


def test_only_a_worker_of_cog_is_watched():
    before = children(os.getpid())
    dog = watcher.Watcher()
    with dog.request():
        pass
    assert children(os.getpid()) == before
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


# What predictions leave in Cog's folder.


def test_remains_go_by_age_files_too(tmp_path):
    """Of a body that did not fit on a full disk, a part of a file stays."""
    for name in ("old", "young", "old, with something young"):
        (tmp_path / name / "inputs").mkdir(parents=True)
        (tmp_path / name / "inputs" / "spill.json").write_bytes(b"x")
    (tmp_path / "file").touch()
    long_ago = time.time() - 2 * watcher.OLD
    for _ in range(3):  # a folder counts from when it has become empty
        for path in tmp_path.rglob("*"):
            if "young" not in str(path):
                os.utime(path, (long_ago, long_ago))
        watcher.delete_old(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old, with something young", "young"]
    assert len(list(tmp_path.rglob("spill.json"))) == 2
    watcher.delete_old(str(tmp_path / "nothing"))


def test_what_belongs_to_another_user_stays(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    watcher.delete_old(str(tmp_path), age=-1)
    assert (tmp_path / "old").exists()


# The supervisor, over small commands.


@contextlib.contextmanager
def supervised(command: str, folder: Path) -> Iterator[subprocess.Popen]:
    """A process that supervises a shell command in ``folder``."""
    code = "import os, pathlib, sys; from serving.supervisor import supervise; "
    code += "sys.exit(supervise(['sh', '-c', sys.argv[1]], pathlib.Path(sys.argv[2]), os.environ))"
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, command, str(folder)], cwd=ROOT, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "status"), [("TERM", 7), ("INT", 8)])
def test_a_signal_is_passed_on_and_the_exit_status_given_back(tmp_path, number, status):
    command = "trap 'exit 7' TERM; trap 'exit 8' INT; touch ready; while :; do sleep 0.01; done"
    with supervised(command, tmp_path) as process:
        wait_until((tmp_path / "ready").exists)
        process.send_signal(getattr(signal, f"SIG{number}"))
        assert process.wait(PATIENCE) == status
        assert process.stderr.read() == ""


@pytest.mark.parametrize(("end", "words"), [("exit 3", "status 3"), ("exit 0", "status 0"), ("kill -9 $$", "SIGKILL")])
def test_what_ends_by_itself_is_started_again_and_not_during_the_pause_after_a_signal(tmp_path, end, words):
    with supervised(f"echo >>starts; {end}", tmp_path) as process:
        first, second = (process.stderr.readline() for _ in range(2))
        process.terminate()  # in the pause of a second
        assert process.wait(PATIENCE) == 0
    assert words in first
    assert first.endswith("it is started again in 0 s\n")
    assert second.endswith("it is started again in 1 s\n")
    assert (tmp_path / "starts").read_text() == "\n\n"
