"""What happens when a process of the server dies: serving/watchdog.py and serving/supervisor.py."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, ROOT, Server, data_uri, encoded, wait_until, write_weights
from file_server import FileServer, Resource
from PIL import Image
from processes import fields_of, speaks_of

from serving import supervisor, watchdog

CRASHED = "the picture could not be decoded: the decoder crashed; save it again in another format"


def children(pid: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if fields_of(number)[1:2] == [str(pid)]]


def child(pid: int, word: str) -> int:
    """The one child of a process whose command line has ``word``."""
    found = []

    def look() -> list[int]:
        found[:] = [number for number in children(pid) if speaks_of(number, word)]
        return found

    wait_until(look)
    (number,) = found
    return number


class Processes:
    """The processes of a server as they are now, by what they do."""

    def __init__(self, server: Server):
        self.server = child(server.process.pid, "cog.server")
        self.worker = child(self.server, "coglet")
        self.watchdog = child(self.worker, "watchdog.py")
        self.decoder = child(self.worker, "serving.decoding")

    def all(self) -> list[int]:
        return [self.server, self.worker, self.watchdog, self.decoder]


def seconds_of_work(pid: int) -> float:
    """Processor time of a process so far."""
    return sum(map(int, fields_of(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def gone(pids: list[int]) -> bool:
    """Whether nothing is left of these processes, not even zombies."""
    return all(fields_of(pid) == [] for pid in pids)


# The watchdog, over a process that stands for the server.


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


def watch(server: subprocess.Popen, said: bytes, folder: Path) -> None:
    """A watchdog whose worker said this and is gone."""
    reading, writing = os.pipe()
    pidfd = os.pidfd_open(server.pid)
    os.write(writing, said)
    os.close(writing)
    watchdog.watch(reading, pidfd, str(folder))
    for number in (reading, pidfd):
        os.close(number)


def test_a_server_without_its_worker_is_ended(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "picture").touch()
    with waiting() as server:
        watch(server, watchdog.ARMED, folder)
        assert server.wait(PATIENCE) == -signal.SIGINT
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "SECONDS_TO_LEAVE", 0.1)
    with waiting(ignored="SIGINT") as server:
        watch(server, watchdog.ARMED, tmp_path)
        assert server.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("said", [b"", watchdog.DISMISSED, watchdog.ARMED + watchdog.DISMISSED])
def test_a_server_is_left_alone_before_setup_and_after_an_orderly_end(tmp_path, monkeypatch, said):
    monkeypatch.setattr(watchdog, "ended", lambda *_: pytest.fail("it should not even wait"))
    with waiting() as server:
        watch(server, said, tmp_path)
        assert server.poll() is None
    assert tmp_path.exists()


def test_only_a_worker_of_cog_is_watched(tmp_path):
    before = children(os.getpid())
    dog = watchdog.Watchdog(tmp_path)
    dog.arm()
    dog.dismiss()
    watchdog.leave_signals_to_the_server()
    assert children(os.getpid()) == before
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


# The supervisor, over small commands.


def test_the_pauses_grow_to_half_a_minute():
    assert [supervisor.pause_before(deaths) for deaths in range(1, 9)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert supervisor.pause_before(10_000) == 30


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


def test_a_server_that_a_signal_ended_ends_the_supervisor_by_the_same(tmp_path):
    with supervised("touch ready; exec sleep 600", tmp_path) as process:
        wait_until((tmp_path / "ready").exists)
        process.terminate()
        assert process.wait(PATIENCE) == -signal.SIGTERM


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


def test_a_killed_supervisor_leaves_no_server(tmp_path):
    with supervised("echo $$ >pid.part; mv pid.part pid; exec sleep 600", tmp_path) as process:
        wait_until((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        assert fields_of(pid)
        process.kill()
        process.wait()
        wait_until(lambda: fields_of(pid)[:1] in ([], ["Z"]))


# The real server.


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
    assert len(list(server.temporary.iterdir())) == 1  # the new worker's folder
    assert "Cog's server ended by itself (signal SIGINT); it is started again in" in server.log.read_text()


def test_a_server_that_is_killed_is_replaced_and_takes_its_worker_along(server):
    before = Processes(server)
    os.kill(before.server, signal.SIGKILL)
    wait_until(lambda: gone(before.all()))
    server.wait_for("READY")
    server.expect(server.output(image=GOOD), PICTURE)
    assert len(list(server.temporary.iterdir())) == 1


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
    assert (after.server, after.worker, after.watchdog) == (before.server, before.worker, before.watchdog)
    assert after.decoder != before.decoder
    assert gone([before.decoder])
    assert f"ended by SIGSEGV while it decoded a picture of {len(large):,} bytes" in server.log.read_text()


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


def test_a_killed_serve_py_leaves_nothing_behind(tmp_path):
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
        assert [pid for pid in children(worker) if fields_of(pid)[0] != "Z"] == []
        assert children(server.process.pid) == [new]
        assert server.log.read_text().count("ended by itself") == 1
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
    finally:
        server.kill()
