"""What happens when a process of the server dies: serving/watcher.py and serving/supervisor.py."""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, ROOT, Server, data_uri, encoded, wait_until, write_weights
from file_server import FileServer, Resource
from PIL import Image
from processes import fields_of, speaks_of

from serving import watcher

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


@pytest.mark.parametrize("said", [b"", b"+", b"+-"])
def test_a_server_without_its_worker_is_ended_during_setup_too(said):
    with waiting() as server:
        watch(server, said)
        assert server.wait(PATIENCE) == -signal.SIGINT


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


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        ("", "127.0.0.1"),
        ("--host 127.0.0.2", "127.0.0.2"),
        ("--host=127.0.0.3 --threads 1", "127.0.0.3"),
        ("--host 0.0.0.0", "127.0.0.1"),
        ("--host [::]", "::1"),
    ],
)
def test_the_server_is_asked_at_its_own_address(monkeypatch, arguments, host):
    monkeypatch.setenv("PORT", "5001")
    command = f"python -m cog.server.http {arguments}".replace(" ", "\0").encode()
    assert watcher.address_of(command) == (host, 5001)


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


def test_a_folder_that_cannot_be_made_gets_one_line(tmp_path):
    (tmp_path / "coglet").touch()
    with pytest.raises(OSError, match=r"cannot write there \(Not a directory\); .*--read-only that is --tmpfs /tmp$"):
        watcher.check_folder(str(tmp_path / "coglet" / "predictions"))
    watcher.check_folder(str(tmp_path / "new" / "predictions"))


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


def test_a_server_that_lost_its_slots_is_started_again(tmp_path, quick):
    """By a watcher with less patience than its own. It is asked at its own address, which is not 127.0.0.1."""
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
