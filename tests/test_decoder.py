"""Pictures decoded in processes of their own, and what is left when such a process goes wrong."""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cog_server import PATIENCE, encoded, noise, wait_until
from PIL import Image
from processes import fields_of

from convmixer import ImageError, load_image
from convmixer.preprocessing import CIFAR10, resize_and_crop
from serving import RequestError
from serving import decoder as module
from serving.decoder import Decoder

SMALL, OTHER = (encoded(noise(60, 50, seed)) for seed in range(2))
PIXELS = np.asarray(resize_and_crop(load_image(OTHER, target_size=CIFAR10.resize), CIFAR10))  # of OTHER


@pytest.fixture(scope="module")
def run() -> Iterator[Callable]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def decoder(run) -> Iterator[Decoder]:
    """A decoder that must work after each test, whatever happened in it, and leave no file open."""
    with contextlib.closing(Decoder()) as decoder:
        run(decoder.decode(SMALL, CIFAR10))
        before = len(os.listdir("/proc/self/fd"))
        yield decoder
        assert np.array_equal(run(decoder.decode(OTHER, CIFAR10))[0], PIXELS)
        assert len(os.listdir("/proc/self/fd")) == before


def pid_of(decoder: Decoder) -> int:
    return decoder.children[0].process.pid


def test_the_largest_picture_stays_within_the_memory_of_a_small_process_that_leaves_no_core(decoder, run):
    process = Path(f"/proc/{pid_of(decoder)}")
    pixels, shown = run(decoder.decode(encoded(Image.new("RGBA", (8000, 8000))), CIFAR10, 1024))
    assert np.unique(pixels) == [255] and shown.size == (2048, 2048)
    assert "torch" not in (process / "maps").read_text()
    limits = {line[:26].strip(): line[26:].split()[1] for line in (process / "limits").read_text().splitlines()}
    assert (limits["Max data size"], limits["Max core file size"]) == (str(module.MEMORY), "0")
    assert (process / "oom_score_adj").read_text().strip() == "1000"


async def stopped(decoder: Decoder, *pictures: bytes) -> list[asyncio.Task]:
    """Requests to a process that does not get on with the first of them."""
    os.kill(pid_of(decoder), signal.SIGSTOP)
    tasks = [asyncio.create_task(decoder.decode(picture, CIFAR10)) for picture in pictures]
    for _ in range(10):
        await asyncio.sleep(0)  # it has been sent, and the answer is waited for
    return tasks


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGSEGV, "the decoder crashed"), (signal.SIGKILL, "memory ran")]
)
def test_a_crash_costs_one_picture(decoder, run, number, reason, capfd):
    async def check() -> None:
        (task,) = await stopped(decoder, SMALL)
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(ImageError, match=rf"^the picture could not be decoded: {reason}.* in another format$"):
            await task

    pid = pid_of(decoder)
    run(check())
    assert fields_of(pid) == []  # not even as a zombie
    ending = f"ended by signal {number:d}, {signal.strsignal(number)},"
    assert capfd.readouterr().err == f"decoder process: {ending} while it decoded {len(SMALL):,} bytes\n"
    os.kill(pid_of(decoder), signal.SIGKILL)  # between two pictures: it costs none
    wait_until(lambda: fields_of(pid_of(decoder))[:1] == ["Z"])


@pytest.mark.parametrize(
    ("limits", "line"),
    [({"memory": 150 * 2**20}, "needs too much memory to decode"), ({"seconds": 0.05}, "took more than 0.05 seconds")],
)
def test_more_than_the_limits_costs_one_picture(run, limits, line):
    with contextlib.closing(Decoder(**limits)) as decoder, pytest.raises(ImageError, match=f"{line}.*; make it smal"):
        run(decoder.decode(encoded(Image.new("RGB", (7900, 7900))), CIFAR10))  # half a second and more


def test_where_no_process_can_be_started_a_picture_is_sent_again(decoder, run, capfd):
    decoder.close()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(RequestError, match="no room for a picture at the moment; send it again"):
            run(decoder.decode(SMALL, CIFAR10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert capfd.readouterr().err.startswith("decoder process: it cannot be started: ")


def test_a_cancelled_request_takes_no_process_along_and_leaves_no_answer(decoder, run):
    pid = pid_of(decoder)

    async def check() -> None:
        under_way, waiting, last = await stopped(decoder, SMALL, b"bad", OTHER)
        under_way.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGCONT)
        assert np.array_equal((await last)[0], PIXELS)
        outcomes = await asyncio.gather(under_way, waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2

    run(check())
    assert pid_of(decoder) == pid


@pytest.mark.parametrize("reply", ["PIXELS, 2**31, 1", "PIXELS, 1, 2**31", "MESSAGE, 2**31, 0"])
def test_a_process_that_was_taken_over_is_not_believed(run, monkeypatch, reply):
    code = module.CODE.replace("main(*sys.argv[2:])", "connection = socket.socket(fileno=int(sys.argv[2])); ")
    code = code.replace("import main", "import *") + f"connection.sendall(REPLY.pack({reply})); "
    monkeypatch.setattr(module, "CODE", f"{code} connection.recv(10**6) and connection.recv(1)")
    with contextlib.closing(Decoder()) as decoder, pytest.raises(ImageError, match="could not be decoded"):
        run(decoder.decode(SMALL, CIFAR10))


def test_it_ends_with_its_parent_in_the_middle_of_a_picture():
    code = "from serving.decoding import confine; import time; confine(2**30); print(flush=True); time.sleep(600)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=module.ROOT, **pipes) as process:
        process.stdout.readline()
        process.stdin.close()  # as when this process ends
        assert process.wait(PATIENCE) == -signal.SIGIO
