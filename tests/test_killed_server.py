"""The real server, when one of its processes is killed, hangs or is told to go."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, Server, expect, wait_until, write_weights
from processes import child, children, fields_of, speaks_of

from serving import watcher


class Processes:
    """The processes of a server as they are now, by what they do."""

    def __init__(self, server: Server):
        self.server = child(server.process.pid, "cog.server")
        self.worker = child(self.server, "coglet")
        self.watcher = child(self.worker, "watcher.py")
        self.decoder = child(self.worker, "serving.decoding")

    def all(self) -> list[int]:
        return [self.server, self.worker, self.watcher, self.decoder]


def gone(pids: list[int], but_zombies: bool = False) -> bool:
    return all(fields_of(pid) == [] or (but_zombies and fields_of(pid)[:1] == ["Z"]) for pid in pids)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    write_weights(server.folder / "model.safetensors")  # setup reads them again
    yield server
    server.kill()


@pytest.fixture
def server(running) -> Iterator[Server]:
    running.is_well()
    yield running
    running.is_well()


def test_a_watcher_that_is_killed_is_replaced(server):
    before = Processes(server)
    os.kill(before.watcher, signal.SIGKILL)
    wait_until(lambda: gone([before.watcher], but_zombies=True))
    expect(server.output(image=GOOD), server.classifier, PICTURE)
    after = Processes(server)
    assert (after.server, after.worker) == (before.server, before.worker) and gone([before.watcher])
    assert "another one takes its place" in server.log.read_text()


def test_a_worker_that_is_killed_is_replaced_also_during_setup(server, web):
    """As by the system, when it runs out of memory: in a request, and while the model is loaded."""
    before = Processes(server)
    with server.under_way(web) as (answer,):
        os.kill(before.worker, signal.SIGKILL)
    assert answer.result()["status"] == "failed" and "\n" not in answer.result()["error"]
    wait_until(lambda: gone(before.all()))
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
    before = Processes(server)
    os.kill(before.server, signal.SIGKILL)
    wait_until(lambda: gone(before.all()))


def test_a_server_that_lost_its_slots_is_started_again_and_a_setup_that_fails_is_not(tmp_path, monkeypatch, python):
    """By a watcher with less patience than its own. It is asked at its own address, which is not 127.0.0.1."""
    monkeypatch.setattr(watcher, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(watcher, "STUCK", 0.1)
    server = Server(tmp_path, "--slots", 2, host="127.0.0.2")  # whose weights are gone by now

    def probe() -> tuple[int, str]:
        run = python("-m", "serving", "--probe", "--host", server.host, env=os.environ | {"PORT": str(server.port)})
        return run.returncode, run.stdout

    try:
        before = Processes(server)
        assert probe() == (0, "READY\n")
        assert speaks_of(before.watcher, f"127.0.0.2\0{server.port}")
        for index in range(2):  # Cog cannot make a folder of this name
            assert server.request("PUT", f"/predictions/{index}{'x' * 300}", {"input": {"image": GOOD}})[0] == 200
        assert probe() == (0, "BUSY\n")
        assert watcher.status_of("127.0.0.1", server.port) == ""
        watcher.watch(os.pipe()[0], os.pidfd_open(before.server), "127.0.0.2", server.port)
        wait_until(lambda: gone(before.all()))
        wait_until(lambda: watcher.status_of(server.host, server.port) == "SETUP_FAILED")
        new = child(server.process.pid, "cog.server")
        assert probe() == (1, "SETUP_FAILED\n")
        assert server.request("POST", "/predictions", {"input": {"image": GOOD}})[0] == 503
        assert not any(speaks_of(pid, "serving.decoding") for pid in children(child(new, "coglet")))
        assert children(server.process.pid) == [new]
        assert server.log.read_text().count("ended by itself") == 1
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
    finally:
        server.kill()


@pytest.mark.parametrize(("kill", "number", "status"), [(os.kill, 15, 0), (os.killpg, 2, -2)], ids=["TERM", "Ctrl-C"])
def test_a_signal_lets_the_running_predictions_finish(tmp_path, web, kill, number, status):
    server = Server(tmp_path, "--slots", 3)
    try:
        processes = Processes(server)
        with server.under_way(web, 3, heatmap=True) as answers:
            kill(server.process.pid, number)
            wait_until(lambda: not watcher.status_of(server.host, server.port))
            assert server.process.poll() is None
        for answer in answers:
            expect(answer.result()["output"], server.classifier, PICTURE, heatmap=True)
        assert server.process.wait(PATIENCE) == status
        wait_until(lambda: gone(processes.all(), but_zombies=True))
        assert list(server.temporary.iterdir()) == []
    finally:
        server.kill()


def test_a_killed_supervisor_of_cog_leaves_nothing_behind(running):
    """The last one: the server of this file has no end but this."""
    running.is_well()
    processes = Processes(running)
    running.process.kill()
    running.process.wait()
    wait_until(lambda: gone(processes.all(), but_zombies=True))
    assert list(running.temporary.iterdir()) == []
