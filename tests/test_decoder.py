"""Pictures decoded in processes of their own: the same pixels, and what is left when such a process goes wrong."""

import asyncio
import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cog_server import encoded, noise, png_header, wait_until
from PIL import ExifTags, Image
from processes import fields_of, wait_until_gone

from convmixer import ImageError, Preprocessing, load_image
from convmixer.preprocessing import CIFAR10, IMAGENET, resize_and_crop
from serving import RequestError
from serving import decoder as module
from serving.decoder import Decoder

SMALL = encoded(noise(60, 50))
OTHER = encoded(noise(60, 50, seed=1))
CRASHED = "the picture could not be decoded: the decoder crashed; save it again in another format"


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def run(loop) -> Callable[[Coroutine], object]:
    return loop.run


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoder]:
    with contextlib.closing(Decoder()) as decoder:
        yield decoder


@pytest.fixture
def decoder(shared, run) -> Iterator[Decoder]:
    """A decoder that must work after each test, whatever happened in it."""
    yield shared
    assert np.array_equal(run(shared.decode(SMALL, CIFAR10))[0], here(SMALL, CIFAR10))


def here(picture: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """What this process makes of a picture."""
    return np.asarray(resize_and_crop(load_image(picture, target_size=preprocessing.resize), preprocessing))


def pid_of(decoder: Decoder) -> int:
    return decoder.children[0].process.pid


def upright_jpeg() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stream = io.BytesIO()
    noise(90, 70).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


PICTURES = {
    "PNG": SMALL,
    "rotated JPEG": upright_jpeg(),
    "WebP": encoded(noise(40, 90), "WEBP"),
    "transparent": encoded(noise(70, 60).convert("RGBA").rotate(30)),
    "16 bits": encoded(Image.fromarray(np.arange(6000, dtype=np.uint16).reshape(60, 100))),
    "one pixel": encoded(noise(1, 1)),
    "large JPEG": encoded(Image.linear_gradient("L").convert("RGB").resize((2000, 1500)), "JPEG"),
    "a line": encoded(noise(2000, 1)),
    "too large, but a JPEG": encoded(Image.new("RGB", (9000, 8000), "tan"), "JPEG"),
}


ODD = replace(CIFAR10, size=45, crop_pct=0.7, interpolation="lanczos", mean=(0.1, 0.2, 0.3))


@pytest.mark.parametrize("preprocessing", [CIFAR10, IMAGENET, ODD], ids=["32 px", "224 px", "45 px"])
@pytest.mark.parametrize("name", PICTURES)
def test_the_networks_input_is_the_same_bit_for_bit(decoder, run, name, preprocessing):
    pixels, shown = run(decoder.decode(PICTURES[name], preprocessing))
    assert np.array_equal(pixels, here(PICTURES[name], preprocessing))
    assert shown is None


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_to_show_is_the_same_and_changes_nothing_about_the_input(decoder, run, name):
    pixels, shown = run(decoder.decode(PICTURES[name], IMAGENET, 224))
    wanted = load_image(PICTURES[name], target_size=224)
    wanted.thumbnail((2048, 2048))
    assert shown == wanted
    assert np.array_equal(pixels, here(PICTURES[name], IMAGENET))


@pytest.mark.parametrize(
    "picture", [b"", b"hello", SMALL[:-2000], png_header(100_000, 100_000)], ids=["none", "text", "cut", "large"]
)
def test_what_is_no_picture_gets_the_same_line(decoder, run, picture):
    pid = pid_of(decoder)
    with pytest.raises(ImageError) as expected:
        load_image(picture)
    for shown_at in (None, 100):
        with pytest.raises(ImageError) as raised:
            run(decoder.decode(picture, CIFAR10, shown_at))
        assert str(raised.value) == str(expected.value)
    assert pid_of(decoder) == pid


def test_the_process_is_small_and_leaves_no_core(decoder, run):
    run(decoder.decode(SMALL, CIFAR10))
    process = Path(f"/proc/{pid_of(decoder)}")
    assert "torch" not in (process / "maps").read_text()
    limits = {line[:26].strip(): line[26:].split()[0] for line in (process / "limits").read_text().splitlines()}
    assert limits["Max data size"] == str(module.MEMORY)
    assert limits["Max core file size"] == "0"
    assert (process / "oom_score_adj").read_text().strip() == "1000"


# What a picture may do to the process.


async def in_the_middle(decoder: Decoder, act: Callable[[int], object]) -> None:
    """A process that does not get on with its picture, and is dealt with by ``act`` as soon as it has got one."""
    await decoder.decode(OTHER, CIFAR10)  # it is there, and ready
    pid = pid_of(decoder)
    os.kill(pid, signal.SIGSTOP)
    task = asyncio.create_task(decoder.decode(SMALL, CIFAR10))
    for _ in range(10):
        await asyncio.sleep(0)  # it has been sent, and the answer is waited for
    act(pid)
    try:
        await task
    finally:
        assert fields_of(pid) == []  # not even as a zombie


def crash(pid: int, number: int = signal.SIGSEGV) -> None:
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_costs_one_picture(decoder, run, number, capfd):
    with pytest.raises(ImageError) as raised:
        run(in_the_middle(decoder, lambda pid: crash(pid, number)))
    assert str(raised.value) == CRASHED
    assert np.array_equal(run(decoder.decode(OTHER, CIFAR10))[0], here(OTHER, CIFAR10))
    ending = f"ended by signal {number:d}, {signal.strsignal(number)},"
    line = f"decoder process: {ending} while it decoded {len(SMALL):,} bytes\n"
    assert capfd.readouterr().err == line


def test_the_systems_lack_of_memory_costs_one_picture(decoder, run):
    with pytest.raises(ImageError) as raised:
        run(in_the_middle(decoder, lambda pid: crash(pid, signal.SIGKILL)))
    message = "the picture could not be decoded: memory ran out; make it smaller or save it again in another format"
    assert str(raised.value) == message


def test_a_process_that_ended_between_two_pictures_costs_none(decoder, run):
    run(decoder.decode(SMALL, CIFAR10))
    pid = pid_of(decoder)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: fields_of(pid)[:1] == ["Z"])
    assert np.array_equal(run(decoder.decode(OTHER, CIFAR10))[0], here(OTHER, CIFAR10))


def test_more_memory_than_there_is_costs_one_picture(run):
    with contextlib.closing(Decoder(memory=150 * 2**20)) as decoder:
        run(decoder.decode(SMALL, CIFAR10))
        pid = pid_of(decoder)
        with pytest.raises(ImageError, match="needs too much memory to decode; make it smaller and try again"):
            run(decoder.decode(encoded(Image.new("RGB", (7000, 7000))), CIFAR10))
        assert np.array_equal(run(decoder.decode(OTHER, CIFAR10))[0], here(OTHER, CIFAR10))
        assert pid_of(decoder) == pid


def test_the_largest_picture_stays_within_the_memory(decoder, run):
    picture = encoded(Image.new("RGBA", (8000, 8000)))
    pid = pid_of(decoder)
    pixels, shown = run(decoder.decode(picture, CIFAR10, 1024))
    assert np.unique(pixels) == [255]
    assert shown.size == (2048, 2048)
    assert pid_of(decoder) == pid


def test_more_time_than_there_is_costs_one_picture(run):
    with contextlib.closing(Decoder(seconds=0.05)) as decoder:
        pid = pid_of(decoder)
        with pytest.raises(ImageError) as raised:
            run(decoder.decode(encoded(Image.new("RGB", (7900, 7900))), CIFAR10))  # half a second and more
        assert str(raised.value).startswith("the picture took more than 0.05 seconds to decode; make it smaller or ")
        assert fields_of(pid) == []
        assert pid_of(decoder) != pid


def test_a_process_that_does_not_even_end_in_time_is_ended(decoder, run, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1 - module.SECONDS)
    with pytest.raises(ImageError, match="the picture took more than"):
        run(in_the_middle(decoder, lambda pid: None))


# Many requests.


def test_a_cancelled_request_takes_no_process_along_and_leaves_no_answer(decoder, run):
    async def check() -> None:
        await decoder.decode(OTHER, CIFAR10)
        pid = pid_of(decoder)
        os.kill(pid, signal.SIGSTOP)
        tasks = [asyncio.create_task(decoder.decode(picture, CIFAR10)) for picture in (SMALL, b"bad", OTHER)]
        for _ in range(10):
            await asyncio.sleep(0)
        tasks[0].cancel()  # under way
        tasks[1].cancel()  # waiting
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGCONT)
        assert np.array_equal((await tasks[2])[0], here(OTHER, CIFAR10))
        outcomes = await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert pid_of(decoder) == pid

    run(check())


def test_each_request_gets_its_own_picture_and_a_bad_one_fails_alone(run):
    pictures = [encoded(noise(20 + number, 30, number)) if number % 5 else b"bad" for number in range(40)]

    async def check() -> None:
        with contextlib.closing(Decoder(3)) as decoder:
            for _ in range(3):
                requests = (decoder.decode(picture, CIFAR10) for picture in pictures)
                found = await asyncio.gather(*requests, return_exceptions=True)
                for answer, picture in zip(found, pictures, strict=True):
                    if picture == b"bad":
                        assert "cannot be read as a picture" in str(answer)
                    else:
                        assert np.array_equal(answer[0], here(picture, CIFAR10))

    run(check())


def test_nothing_is_left_open(run):
    with contextlib.closing(Decoder()) as decoder:
        run(decoder.decode(SMALL, CIFAR10))
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(ImageError):
                run(in_the_middle(decoder, crash))
        run(decoder.decode(SMALL, CIFAR10))
        assert len(os.listdir("/proc/self/fd")) == len(before)


# The process's beginning and end.


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_no_process_can_be_started_a_picture_gets_one_line(run, capfd):
    with no_more_files():
        decoder = Decoder()
    with contextlib.closing(decoder):
        with no_more_files(), pytest.raises(RequestError, match="no room for a picture at the moment; send it again"):
            run(decoder.decode(SMALL, CIFAR10))
        assert capfd.readouterr().err.startswith("decoder process: it cannot be started: ")
        assert np.array_equal(run(decoder.decode(SMALL, CIFAR10))[0], here(SMALL, CIFAR10))


@pytest.mark.parametrize(
    "reply",
    [
        "REPLY.pack(PIXELS, 2**31, 1)",
        "REPLY.pack(PIXELS, 1, 2**31)",
        "REPLY.pack(MESSAGE, 2**31, 0)",
        "b'?' * 9",
        "REPLY.pack(PIXELS, 0, 0) + bytes(31 * 32 * 3)",
    ],
)
def test_a_process_that_was_taken_over_is_not_believed(run, monkeypatch, reply):
    code = "from serving.decoding import *; connection = socket.socket(fileno=int(sys.argv[2]));"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {code} connection.sendall({reply});"
    monkeypatch.setattr(module, "CODE", f"{code} connection.recv(10**6)")
    with contextlib.closing(Decoder()) as decoder, pytest.raises(ImageError, match="could not be decoded"):
        run(decoder.decode(SMALL, CIFAR10))


def test_it_ends_with_its_parent_in_the_middle_of_a_picture():
    code = "from serving.decoding import confine; import sys, time; confine(2**30); sys.stdout.write('!'); "
    code += "sys.stdout.flush(); time.sleep(600)"  # no picture takes that long, or looks less for the end of its parent
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=module.ROOT, **pipes)
    assert process.stdout.read(1) == b"!"
    process.stdin.close()  # as when this process ends
    assert process.wait(60) == -signal.SIGIO
    process.stdout.close()


def test_it_ends_when_its_parent_is_killed():
    code = "import asyncio; from convmixer.preprocessing import CIFAR10; from serving.decoder import Decoder; "
    code += "decoder = Decoder(); asyncio.run(decoder.decode(bytes.fromhex(input()), CIFAR10)); "
    code += "print(decoder.children[0].process.pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=module.ROOT, **pipes) as parent:
        parent.stdin.write(SMALL.hex() + "\n")
        parent.stdin.flush()
        pid = int(parent.stdout.readline())
        assert fields_of(pid)
        parent.kill()
    assert wait_until_gone(lambda each: each == pid) == []
