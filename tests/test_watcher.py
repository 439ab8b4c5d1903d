"""serving/watcher.py and serving/supervisor.py over small processes; test_killed_server.py has the real server."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from cog_server import PATIENCE, ROOT, wait_until

from serving import watcher

SUPERVISE = """import os, pathlib, sys; from serving.supervisor import supervise
sys.exit(supervise(["sh", "-c", sys.argv[1]], pathlib.Path(sys.argv[2]), os.environ))"""


@contextlib.contextmanager
def started(*command: object, **options) -> Iterator[subprocess.Popen]:
    with subprocess.Popen([*map(str, command)], cwd=ROOT, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("status", "said", "under_way", "is_ended"),
    [
        ("BUSY", b"+-", 0, True),
        ("BUSY", b"+", 0, False),
        ("BUSY", b"", 1, False),  # as a watcher knows that took the place of another
        ("READY", b"", 0, False),
    ],
)
def test_a_server_that_is_busy_with_nothing_is_ended(monkeypatch, capfd, status, said, under_way, is_ended):
    monkeypatch.setattr(watcher, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(watcher, "STUCK", 0.1)
    monkeypatch.setattr(watcher, "status_of", lambda host, port: status)
    reading, writing = os.pipe()
    os.write(writing, said)
    timer = threading.Timer(0.5, os.write, (writing, watcher.LEAVES))  # an orderly end
    with started("sleep", 600) as server:
        if not is_ended:
            timer.start()
        watcher.watch(reading, os.pidfd_open(server.pid), "127.0.0.1", 9, under_way)
        assert (server.wait(PATIENCE) == -signal.SIGINT) if is_ended else (server.poll() is None)
    assert ("busy for 0.1 s with no request under way" in capfd.readouterr().err) == is_ended


def test_a_server_that_does_not_end_after_its_worker_is_killed(monkeypatch):
    monkeypatch.setattr(watcher, "SECONDS_TO_LEAVE", 0.1)
    reading, writing = os.pipe()
    os.close(writing)
    with started("sleep", 600, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as server:
        watcher.watch(reading, os.pidfd_open(server.pid), "127.0.0.1", 9)
        assert server.wait(PATIENCE) == -signal.SIGKILL


def test_remains_in_cogs_folder_go_by_age_unless_they_are_anothers(tmp_path, monkeypatch):
    for name in ("old", "young"):
        (tmp_path / name / "inputs").mkdir(parents=True)
        (tmp_path / name / "inputs" / "spill.json").touch()
    long_ago = time.time() - 2 * watcher.OLD
    for _ in range(3):  # a folder counts from when it has become empty
        for path in (tmp_path / "old").rglob("*"):
            os.utime(path, (long_ago, long_ago))
        watcher.delete_old(str(tmp_path))
    assert not [*(tmp_path / "old").iterdir()] and [*tmp_path.rglob("spill.json")]
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    watcher.delete_old(str(tmp_path), age=-1)
    assert [*tmp_path.rglob("spill.json")]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 7), (signal.SIGINT, 8)])
def test_a_signal_is_passed_on_and_the_exit_status_given_back(tmp_path, number, status):
    command = "trap 'exit 7' TERM; trap 'exit 8' INT; touch ready; while :; do sleep 0.01; done"
    with started(sys.executable, "-c", SUPERVISE, command, tmp_path, stderr=subprocess.PIPE) as process:
        wait_until((tmp_path / "ready").exists)
        process.send_signal(number)
        assert process.wait(PATIENCE) == status
        assert process.stderr.read() == ""


@pytest.mark.parametrize(("end", "words"), [("exit 0", "status 0"), ("kill -9 $$", "SIGKILL")])
def test_what_ends_by_itself_is_started_again_and_not_during_the_pause_after_a_signal(tmp_path, end, words):
    command = f"echo >>starts; {end}"
    with started(sys.executable, "-c", SUPERVISE, command, tmp_path, stderr=subprocess.PIPE) as process:
        first, second = (process.stderr.readline() for _ in range(2))
        process.terminate()  # in the pause of a second
        assert process.wait(PATIENCE) == 0
    assert words in first and first.endswith("it is started again in 0 s\n")
    assert second.endswith("it is started again in 1 s\n")
    assert (tmp_path / "starts").read_text() == "\n\n"
