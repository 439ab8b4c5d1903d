"""serving/watcher.py and supervisor.py, over small processes, and in the real server when one of its own is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, ROOT, Server, expect, wait_until, write_weights
from processes import child, children, fields_of, speaks_of

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


@pytest.mark.parametrize(("said", "under_way", "is_ended"), [(b"+-", 0, True), (b"+", 0, False), (b"", 1, False)])
def test_a_server_that_is_busy_with_nothing_is_ended(monkeypatch, said, under_way, is_ended):
    monkeypatch.setattr(watcher, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(watcher, "STUCK", 0.1)
    monkeypatch.setattr(watcher, "status_of", lambda host, port: "BUSY")
    reading, writing = os.pipe()
    os.write(writing, said)
    timer = threading.Timer(0.5, os.write, (writing, watcher.LEAVES))  # an orderly end
    with started("sleep", 600) as server:
        if not is_ended:
            timer.start()
        watcher.watch(reading, os.pidfd_open(server.pid), "127.0.0.1", 9, under_way)
        assert (server.wait(PATIENCE) == -signal.SIGINT) if is_ended else (server.poll() is None)


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


def processes(server: Server) -> list[int]:
    """Cog's server, its worker, and the worker's watcher and decoder, as they are now."""
    pid = child(server.process.pid, "cog.server")
    worker = child(pid, "coglet")
    return [pid, worker, child(worker, "watcher.py"), child(worker, "serving.decoding")]


def gone(pids: list[int], but_zombies: bool = False) -> bool:
    return all(fields_of(pid) == [] or (but_zombies and fields_of(pid)[:1] == ["Z"]) for pid in pids)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        write_weights(server.folder / "model.safetensors")  # setup reads them again
        yield server


@pytest.fixture
def server(running) -> Iterator[Server]:
    running.is_well()
    yield running
    running.is_well()


def test_a_watcher_that_is_killed_is_replaced(server):
    *before, dog, _ = processes(server)
    os.kill(dog, signal.SIGKILL)
    wait_until(lambda: gone([dog], but_zombies=True))
    expect(server.output(image=GOOD), server.classifier, PICTURE)
    assert processes(server)[:2] == before and gone([dog])
    assert "another one takes its place" in server.log.read_text()


def test_a_worker_that_is_killed_is_replaced_also_during_setup(server, web):
    """As by the system, when it runs out of memory: in a request, and while the model is loaded."""
    before = processes(server)
    with server.under_way(web) as (answer,):
        os.kill(before[1], signal.SIGKILL)
    assert answer.result()["status"] == "failed" and "\n" not in answer.result()["error"]
    wait_until(lambda: gone(before))
    was_in_setup = False
    while not was_in_setup:
        starting = child(server.process.pid, "cog.server")
        worker = child(starting, "coglet")
        child(worker, "watcher.py")
        os.kill(worker, signal.SIGSTOP)
        was_in_setup = watcher.status_of(server.host, server.port) == "STARTING"
        os.kill(worker, signal.SIGKILL)
        wait_until(partial(gone, [starting, worker]))


def test_a_server_that_is_killed_is_replaced_and_takes_its_worker_along(server):
    before = processes(server)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: gone(before))


def test_a_server_that_lost_its_slots_is_started_again_and_a_setup_that_fails_is_not(tmp_path, monkeypatch, python):
    """By a watcher with less patience than its own. It is asked at its own address, which is not 127.0.0.1."""
    monkeypatch.setattr(watcher, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(watcher, "STUCK", 0.1)

    def probe() -> tuple[int, str]:
        run = python("-m", "serving", "--probe", "--host", server.host, env=os.environ | {"PORT": str(server.port)})
        return run.returncode, run.stdout

    with Server(tmp_path, "--slots", 2, host="127.0.0.2") as server:  # whose weights are gone by now
        before = processes(server)
        assert probe() == (0, "READY\n")
        assert speaks_of(before[2], f"127.0.0.2\0{server.port}")
        for index in range(2):  # Cog cannot make a folder of this name
            assert server.request("PUT", f"/predictions/{index}{'x' * 300}", {"input": {"image": GOOD}})[0] == 200
        assert probe() == (0, "BUSY\n")
        assert watcher.status_of("127.0.0.1", server.port) == ""
        watcher.watch(os.pipe()[0], os.pidfd_open(before[0]), "127.0.0.2", server.port)
        wait_until(lambda: gone(before))
        wait_until(lambda: watcher.status_of(server.host, server.port) == "SETUP_FAILED")
        new = child(server.process.pid, "cog.server")
        assert probe() == (1, "SETUP_FAILED\n")
        assert server.request("POST", "/predictions", {"input": {"image": GOOD}})[0] == 503
        assert not [pid for each in children(new) for pid in children(each) if speaks_of(pid, "serving.decoding")]
        wait_until(lambda: children(server.process.pid) == [new])  # it takes in what the worker leaves behind
        assert server.log.read_text().count("ended by itself") == 1
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(("kill", "number", "status"), [(os.kill, 15, 0), (os.killpg, 2, -2)], ids=["TERM", "Ctrl-C"])
def test_a_signal_lets_the_running_predictions_finish(tmp_path, web, kill, number, status):
    with Server(tmp_path, "--slots", 3) as server:
        family = processes(server)
        with server.under_way(web, 3, heatmap=True) as answers:
            kill(server.process.pid, number)
            wait_until(lambda: not watcher.status_of(server.host, server.port))
            assert server.process.poll() is None
        for answer in answers:
            expect(answer.result()["output"], server.classifier, PICTURE, heatmap=True)
        assert server.process.wait(PATIENCE) == status
        wait_until(lambda: gone(family, but_zombies=True))
        assert list(server.temporary.iterdir()) == []


def test_a_killed_supervisor_of_cog_leaves_nothing_behind(running):
    """The last one: the server of this file has no end but this."""
    running.is_well()
    family = processes(running)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: gone(family, but_zombies=True))
    assert list(running.temporary.iterdir()) == []
