"""The real server, when one of its processes is killed, hangs or is told to go."""

import contextlib
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, Server, data_uri, encoded, wait_until, write_weights
from file_server import FileServer, Resource
from PIL import Image
from processes import child, children, fields_of, speaks_of
from test_watcher import says

from serving import watcher

CRASHED = "the picture could not be decoded: the decoder crashed; save it again in another format"


class Processes:
    """The processes of a server as they are now, by what they do."""

    def __init__(self, server: Server):
        self.server = child(server.process.pid, "cog.server")
        self.worker = child(self.server, "coglet")
        self.watcher = child(self.worker, "watcher.py")
        self.decoder = child(self.worker, "serving.decoding")

    def all(self) -> list[int]:
        return [self.server, self.worker, self.watcher, self.decoder]


def seconds_of_work(pid: int) -> float:
    """Processor time of a process so far."""
    return sum(map(int, fields_of(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def gone(pids: list[int]) -> bool:
    """Whether nothing is left of these processes, not even zombies."""
    return all(fields_of(pid) == [] for pid in pids)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    write_weights(server.folder / "model.safetensors")  # setup reads them again
    yield server
    server.kill()


@pytest.fixture
def server(running) -> Server:
    running.expect(running.output(image=GOOD), PICTURE)
    return running


@pytest.fixture
def web() -> Iterator[FileServer]:
    with FileServer() as web:
        yield web


def under_way(server: Server, web: FileServer, act: Callable[[], None]) -> dict:
    """The answer to a request in the middle of which something happens."""
    release = threading.Event()
    web.resources["/held.png"] = Resource(PICTURE, pause=release)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.predict, image=web.url("/held.png"))
        wait_until(lambda: web.requests)
        act()
        release.set()
    return answer.result()


def test_a_worker_that_is_killed_in_a_request_is_replaced(server, web):
    before = Processes(server)
    answer = under_way(server, web, lambda: os.kill(before.worker, signal.SIGKILL))
    assert answer["status"] == "failed"
    assert "\n" not in answer["error"]
    wait_until(lambda: gone(before.all()))
    server.wait_for("READY")
    server.expect(server.output(image=GOOD), PICTURE)
    assert list(server.temporary.iterdir()) == []
    assert "Cog's server ended by itself (signal SIGINT); it is started again in" in server.log.read_text()


def test_a_server_that_is_killed_is_replaced_and_takes_its_worker_along(server):
    before = Processes(server)
    os.kill(before.server, signal.SIGKILL)
    wait_until(lambda: gone(before.all()))
    server.wait_for("READY")
    server.expect(server.output(image=GOOD), PICTURE)
    assert list(server.temporary.iterdir()) == []


def test_a_worker_that_is_killed_during_setup_is_replaced(server):
    """As by the system, when it runs out of memory while the model is loaded."""
    before = Processes(server)
    os.kill(before.worker, signal.SIGKILL)
    for _ in range(20):
        wait_until(lambda: gone(before.all()))
        starting = child(server.process.pid, "cog.server")
        worker = child(starting, "coglet")
        child(worker, "watcher.py")
        os.kill(worker, signal.SIGSTOP)
        was_in_setup = server.status() == "STARTING"
        os.kill(worker, signal.SIGKILL)
        wait_until(partial(gone, [starting, worker]))
        if was_in_setup:
            break
    assert was_in_setup
    server.wait_for("READY")
    server.expect(server.output(image=GOOD), PICTURE)


def test_a_watcher_that_is_killed_is_replaced_and_does_its_work(server):
    before = Processes(server)
    os.kill(before.watcher, signal.SIGKILL)
    wait_until(lambda: fields_of(before.watcher)[:1] in ([], ["Z"]))
    server.expect(server.output(image=GOOD), PICTURE)
    after = Processes(server)
    assert (after.server, after.worker) == (before.server, before.worker)
    assert gone([before.watcher])
    assert "another one takes its place" in server.log.read_text()
    os.kill(after.worker, signal.SIGKILL)
    wait_until(lambda: gone(after.all()))
    server.wait_for("READY")


def test_a_watcher_that_hangs_keeps_nobody_waiting(server):
    before = Processes(server)
    os.kill(before.watcher, signal.SIGSTOP)
    with contextlib.closing(open(f"/proc/{before.worker}/fd/{pipe_to(before)}", "wb", buffering=0)) as pipe:
        os.set_blocking(pipe.fileno(), False)
        for words in (b"+-" * 1000, b"+"):
            while pipe.write(words):
                pass
    server.expect(server.output(image=GOOD), PICTURE)
    assert Processes(server).watcher != before.watcher


def pipe_to(processes: Processes) -> int:
    """The worker's descriptor of the pipe that is its watcher's standard input."""
    pipe = os.readlink(f"/proc/{processes.watcher}/fd/0")
    folder = Path(f"/proc/{processes.worker}/fd")
    (number,) = (int(path.name) for path in folder.iterdir() if os.path.lexists(path) and os.readlink(path) == pipe)
    return number


def test_a_server_that_lost_its_slots_is_started_again(tmp_path, monkeypatch):
    """By a watcher with less patience than its own. It is asked at its own address, which is not 127.0.0.1."""
    monkeypatch.setattr(watcher, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(watcher, "STUCK", 0.1)
    server = Server(tmp_path, "--slots", 2, host="127.0.0.2")
    try:
        before = Processes(server)
        arguments = Path(f"/proc/{before.watcher}/cmdline").read_bytes().split(b"\0")
        assert arguments[-4:-2] == [b"127.0.0.2", str(server.port).encode()]
        for index in range(2):  # Cog cannot make a folder of this name
            assert server.request("PUT", f"/predictions/{index}{'x' * 300}", {"input": {"image": GOOD}})[0] == 200
        assert watcher.status_of("127.0.0.2", server.port) == "BUSY"
        assert watcher.status_of("127.0.0.1", server.port) == ""
        reading, writing = os.pipe()
        write_weights(server.folder / "model.safetensors")
        watcher.watch(reading, os.pidfd_open(before.server), "127.0.0.2", server.port)
        os.close(writing)
        wait_until(lambda: gone(before.all()))
        server.wait_for("READY")
        server.expect(server.output(image=GOOD), PICTURE)
    finally:
        server.kill()


def test_the_probe_says_whether_the_server_takes_requests(server, python, web):
    def probe() -> tuple[int, str]:
        run = python("-m", "serving", "--probe", env=os.environ | {"PORT": str(server.port)})
        return run.returncode, run.stdout

    assert probe() == (0, "READY\n")
    seen = []
    under_way(server, web, lambda: seen.append(probe()[0]))
    assert seen == [0]
    assert python("-m", "serving", "--probe", env=os.environ | {"PORT": "9"}).stdout == "DOWN\n"
    with says("SETUP_FAILED") as port:
        run = python("-m", "serving", "--probe", env=os.environ | {"PORT": str(port)})
        assert (run.returncode, run.stdout) == (1, "SETUP_FAILED\n")


def test_a_decoder_that_crashes_in_a_request_is_replaced_and_nothing_else(server):
    before = Processes(server)
    idle = seconds_of_work(before.decoder)
    large = encoded(Image.new("RGBA", (7900, 7900)))  # a second and more
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.predict, image=data_uri(large))
        wait_until(lambda: seconds_of_work(before.decoder) > idle + 0.05)
        os.kill(before.decoder, signal.SIGSEGV)
    assert answer.result()["error"].endswith(CRASHED)
    assert answer.result()["logs"] == ""
    server.expect(server.output(image=GOOD), PICTURE)
    after = Processes(server)
    assert (after.server, after.worker, after.watcher) == (before.server, before.worker, before.watcher)
    assert after.decoder != before.decoder
    assert gone([before.decoder])
    assert "ended by signal 11, Segmentation fault, while it decoded" in server.log.read_text()


def test_a_request_that_stops_the_server_does_not_stop_the_service(server):
    before = Processes(server)
    assert server.request("POST", "/shutdown")[0] == 200
    wait_until(lambda: gone(before.all()))
    server.wait_for("READY")
    server.expect(server.output(image=GOOD), PICTURE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_lets_the_running_prediction_finish(tmp_path, web, number):
    server = Server(tmp_path)
    try:
        processes = Processes(server)
        answer = under_way(server, web, lambda: os.killpg(server.process.pid, number))
        server.expect(answer["output"], PICTURE)
        assert server.process.wait(PATIENCE) == (0 if number == signal.SIGTERM else -signal.SIGINT)
        wait_until(lambda: all(fields_of(pid)[:1] in ([], ["Z"]) for pid in processes.all()))
        assert list(server.temporary.iterdir()) == []
    finally:
        server.kill()


def test_a_killed_supervisor_of_cog_leaves_nothing_behind(tmp_path):
    server = Server(tmp_path)
    processes = Processes(server)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: all(fields_of(pid)[:1] in ([], ["Z"]) for pid in processes.all()))
    assert list(server.temporary.iterdir()) == []


def health(server: Server) -> str:
    """As Server.status, of a server that may tell there why its setup failed."""
    address = f"http://127.0.0.1:{server.port}/health-check"
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=PATIENCE) as answer:
        return json.load(answer)["status"]
    return "DOWN"


def test_a_setup_that_fails_is_not_repeated(tmp_path):
    server = Server(tmp_path)  # whose weights are gone by now
    try:
        before = Processes(server)
        os.kill(before.worker, signal.SIGKILL)
        wait_until(lambda: gone(before.all()))
        wait_until(lambda: health(server) == "SETUP_FAILED")
        new = child(server.process.pid, "cog.server")
        assert server.request("POST", "/predictions", {"input": {"image": GOOD}})[0] == 503
        worker = child(new, "coglet")
        assert [pid for pid in children(worker) if not speaks_of(pid, "watcher.py")] == []
        assert children(server.process.pid) == [new]
        assert server.log.read_text().count("ended by itself") == 1
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
    finally:
        server.kill()
