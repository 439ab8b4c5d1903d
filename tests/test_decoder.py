"""Pictures decoded in processes of their own: the same pixels, and what is left when such a process goes wrong."""

import contextlib
import ctypes
import io
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cog_server import encoded, noise, png_header, wait_until
from PIL import ExifTags, Image
from processes import fields_of, wait_until_gone

from convmixer import Classifier, ImageError, Preprocessing, load_image
from convmixer.preprocessing import CIFAR10, IMAGENET, preprocess
from serving import decoder as module
from serving.decoder import Decoder

SMALL = encoded(noise(60, 50))
OTHER = encoded(noise(60, 50, seed=1))
CRASHED = "the picture could not be decoded: the decoder crashed; save it again in another format"


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoder]:
    decoder = Decoder()
    decoder.start()
    yield decoder
    decoder.close()


@pytest.fixture
def decoder(shared) -> Iterator[Decoder]:
    """A decoder that must work after each test, whatever happened in it."""
    yield shared
    assert np.array_equal(shared.prepare(SMALL, CIFAR10), here(SMALL, CIFAR10))


def here(picture: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """What this process makes of a picture."""
    return preprocess(load_image(picture, target_size=preprocessing.resize), preprocessing)


def pid_of(decoder: Decoder) -> int:
    return decoder._children[0].process.pid


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
    "a line": encoded(noise(3000, 1)),
    "too large, but a JPEG": encoded(Image.new("RGB", (9000, 8000), "tan"), "JPEG"),
}


@pytest.mark.parametrize("preprocessing", [CIFAR10, IMAGENET], ids=["32 px", "224 px"])
@pytest.mark.parametrize("name", PICTURES)
def test_the_networks_input_is_the_same_bit_for_bit(decoder, name, preprocessing):
    assert np.array_equal(decoder.prepare(PICTURES[name], preprocessing), here(PICTURES[name], preprocessing))


@pytest.mark.parametrize("name", PICTURES)
def test_the_whole_picture_is_the_same(decoder, name):
    assert decoder.load(PICTURES[name], 224) == load_image(PICTURES[name], target_size=224)


def test_the_answer_is_the_same_as_without_it(decoder, random_checkpoint):
    classifier = Classifier(str(random_checkpoint()))
    for picture in PICTURES.values():
        assert classifier.classify(decoder.prepare(picture, classifier.preprocessing)) == classifier.classify(picture)
        found, heatmap = classifier.classify_with_heatmap(decoder.load(picture, classifier.heatmap_side))
        wanted, expected = classifier.classify_with_heatmap(picture)
        assert (found, heatmap.box, heatmap.picture) == (wanted, expected.box, expected.picture)
        assert np.array_equal(heatmap.values, expected.values)


@pytest.mark.parametrize(
    "picture", [b"", b"hello", SMALL[:-2000], png_header(100_000, 100_000)], ids=["none", "text", "cut", "large"]
)
def test_what_is_no_picture_gets_the_same_line(decoder, picture):
    pid = pid_of(decoder)
    with pytest.raises(ImageError) as expected:
        load_image(picture)
    for decode in (decoder.load, lambda content: decoder.prepare(content, CIFAR10)):
        with pytest.raises(ImageError) as raised:
            decode(picture)
        assert str(raised.value) == str(expected.value)
    assert pid_of(decoder) == pid


def test_the_process_is_small_and_leaves_no_core(decoder):
    decoder.load(SMALL)
    process = Path(f"/proc/{pid_of(decoder)}")
    assert "torch" not in (process / "maps").read_text()
    limits = {line[:26].strip(): line[26:].split()[0] for line in (process / "limits").read_text().splitlines()}
    assert limits["Max data size"] == str(module.MEMORY)
    assert limits["Max core file size"] == "0"
    assert (process / "oom_score_adj").read_text().strip() == "1000"


# What a picture may do to the process.


@contextlib.contextmanager
def in_the_middle(decoder: Decoder, act: Callable) -> Iterator[None]:
    """A process that does not get on with its picture, and is dealt with by ``act`` as soon as it has got one."""
    decoder.load(OTHER)  # it is there, and ready
    pid = pid_of(decoder)
    os.kill(pid, signal.SIGSTOP)

    def intervene() -> None:
        wait_until(lambda: decoder._children[0].busy)
        act(pid)

    with ThreadPoolExecutor() as pool:
        done = pool.submit(intervene)
        yield
        done.result()
    assert fields_of(pid) == []  # not even as a zombie


def crash(pid: int, number: int = signal.SIGSEGV) -> None:
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_costs_one_picture(decoder, number, capfd):
    with in_the_middle(decoder, lambda pid: crash(pid, number)), pytest.raises(ImageError) as raised:
        decoder.prepare(SMALL, CIFAR10)
    assert str(raised.value) == CRASHED
    assert np.array_equal(decoder.prepare(OTHER, CIFAR10), here(OTHER, CIFAR10))
    line = f"decoder process: ended by {number.name} while it decoded a picture of {len(SMALL):,} bytes\n"
    assert capfd.readouterr().err == line


def test_the_systems_lack_of_memory_costs_one_picture(decoder):
    with in_the_middle(decoder, lambda pid: crash(pid, signal.SIGKILL)), pytest.raises(ImageError) as raised:
        decoder.load(SMALL)
    message = "the picture could not be decoded: memory ran out; make it smaller or save it again in another format"
    assert str(raised.value) == message


def test_a_process_that_ended_between_two_pictures_costs_none(decoder):
    decoder.load(SMALL)
    os.kill(pid_of(decoder), signal.SIGKILL)
    wait_until(lambda: fields_of(pid_of(decoder))[:1] == ["Z"])
    assert decoder.load(OTHER) == load_image(OTHER)


def test_more_memory_than_there_is_costs_one_picture():
    with contextlib.closing(Decoder(memory=150 * 2**20)) as decoder:
        decoder.load(SMALL)
        pid = pid_of(decoder)
        with pytest.raises(ImageError, match="needs too much memory to decode; make it smaller and try again"):
            decoder.load(encoded(Image.new("RGB", (7000, 7000))))
        assert decoder.load(OTHER) == load_image(OTHER)
        assert pid_of(decoder) == pid


def test_the_largest_picture_stays_within_the_memory(decoder):
    picture = encoded(Image.new("RGBA", (8000, 8000)))
    pid = pid_of(decoder)
    assert len(np.unique(decoder.prepare(picture, CIFAR10))) == 3  # white, in three channels
    assert pid_of(decoder) == pid


def test_more_time_than_there_is_costs_one_picture():
    with contextlib.closing(Decoder(seconds=0.05)) as decoder:
        decoder.start()
        pid = pid_of(decoder)
        with pytest.raises(ImageError) as raised:
            decoder.load(encoded(Image.new("RGB", (7900, 7900))))  # half a second and more
        assert str(raised.value).startswith("the picture took more than 0.05 seconds to decode; make it smaller or ")
        assert fields_of(pid) == []
        assert pid_of(decoder) != pid


def test_a_process_that_does_not_even_end_in_time_is_ended(decoder, monkeypatch):
    decoder.load(SMALL)
    child = decoder._children[0]
    monkeypatch.setattr(child, "seconds", -4.9)  # the patience is five seconds more
    os.kill(pid_of(decoder), signal.SIGSTOP)
    with pytest.raises(ImageError, match="the picture took more than"):
        decoder.load(SMALL)
    monkeypatch.undo()
    child.stop()  # it was started with that time


# Cancelled requests.


def raise_in(thread: threading.Thread) -> None:
    """As Cog cancels a request."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def cancelled(work: Callable, wait: Callable) -> bool:
    """Whether ``work`` was interrupted, after ``wait``, before its end."""
    events = []

    def run() -> None:
        try:
            try:
                work()
                events.append("finished")
            except SystemExit:
                events.append("cancelled")
        except SystemExit:  # after the end
            pass

    thread = threading.Thread(target=run)
    thread.start()
    wait()
    raise_in(thread)
    thread.join()
    return "cancelled" in events


def test_a_cancelled_request_ends_the_process_and_leaves_no_answer(decoder):
    decoder.load(SMALL)
    pid = pid_of(decoder)
    os.kill(pid, signal.SIGSTOP)
    assert cancelled(lambda: decoder.load(SMALL), lambda: wait_until(lambda: decoder._children[0].busy))
    assert fields_of(pid) == []
    assert decoder.load(OTHER) == load_image(OTHER)


def test_an_answer_that_nobody_waited_for_is_not_given_to_the_next_request(decoder):
    decoder.load(SMALL)
    child = decoder._children[0]
    task = module.task_of(None, None)
    request = module.REQUEST.pack(len(task), len(SMALL)) + task + SMALL
    child.busy = True  # as a request leaves it that is cancelled before it could even end the process
    child._send(request, time.monotonic() + 60)
    assert decoder.load(OTHER) == load_image(OTHER)


def test_a_request_may_be_cancelled_at_any_moment(decoder):
    pictures = [encoded(noise(40, 40, seed)) for seed in range(4)]
    wanted = [load_image(picture) for picture in pictures]
    moments = random.Random(0)
    for number in range(60):
        other, own = pictures[number % 4], (number + 1) % 4
        cancelled(partial(decoder.load, other), partial(time.sleep, moments.uniform(0, 0.0015)))
        assert decoder.load(pictures[own]) == wanted[own]


# Many requests.


def test_each_thread_gets_its_own_picture():
    pictures = [encoded(noise(20 + number, 30, number)) for number in range(40)]
    with contextlib.closing(Decoder(3)) as decoder, ThreadPoolExecutor(8) as pool:
        decoder.start()
        for _ in range(5):
            found = list(pool.map(lambda picture: decoder.prepare(picture, CIFAR10), pictures))
            for tensor, picture in zip(found, pictures, strict=True):
                assert np.array_equal(tensor, here(picture, CIFAR10))


def test_a_bad_picture_fails_alone_among_others():
    with contextlib.closing(Decoder(2)) as decoder, ThreadPoolExecutor(6) as pool:
        requests = [pool.submit(decoder.load, b"bad" if number % 5 == 0 else SMALL) for number in range(40)]
        for number, request in enumerate(requests):
            if number % 5 == 0:
                assert "cannot be read as a picture" in str(request.exception())
            else:
                assert request.result() == load_image(SMALL)


def test_nothing_is_left_open():
    with contextlib.closing(Decoder()) as decoder:
        decoder.load(SMALL)
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with in_the_middle(decoder, crash), pytest.raises(ImageError):
                decoder.load(SMALL)
        decoder.load(SMALL)
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


def test_where_no_file_can_be_opened_pictures_are_decoded_here(capfd):
    expected = load_image(SMALL)
    with contextlib.closing(Decoder()) as decoder:
        with no_more_files():
            assert decoder.load(SMALL) == expected
        assert capfd.readouterr().err.startswith("decoder process: it cannot be created; pictures are decoded in")


@pytest.mark.parametrize("obstacle", ["it ends at once", "there is no such program"])
def test_where_no_process_can_be_started_pictures_are_decoded_here(monkeypatch, capfd, obstacle):
    with contextlib.closing(Decoder()) as decoder, monkeypatch.context() as changed:
        if obstacle == "it ends at once":
            changed.setattr(module, "CODE", "raise SystemExit(3)")
            reason = "ended with status 3"
        else:
            changed.setattr(sys, "executable", "/no/such/python")
            reason = "it cannot be created"
        for _ in range(3):
            assert np.array_equal(decoder.prepare(SMALL, CIFAR10), here(SMALL, CIFAR10))
        with pytest.raises(ImageError, match="cannot be read as a picture"):
            decoder.load(b"bad")
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"decoder process: {reason}; pictures are decoded in the server's own process until")
        changed.undo()
        decoder._children[0].retry_at = 0  # as if a while had passed
        assert decoder.load(SMALL) == load_image(SMALL)
        assert decoder._children[0].is_ready


@pytest.mark.parametrize(
    ("method", "reply"),
    [
        ("load", "REPLY.pack(PIXELS, 2**31, 2**31)"),
        ("load", "REPLY.pack(PIXELS, 0, 0)"),
        ("load", "REPLY.pack(MESSAGE, 2**31, 0)"),
        ("load", "b'?' * 9"),
        ("prepare", "REPLY.pack(PIXELS, 31, 32) + bytes(31 * 32 * 3)"),
    ],
)
def test_a_process_that_was_taken_over_is_not_believed(monkeypatch, method, reply):
    code = "from serving.decoding import *; connection = socket.socket(fileno=int(sys.argv[2]));"
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {code} connection.sendall(HELLO + {reply});"
    monkeypatch.setattr(module, "CODE", f"{code} connection.recv(10**6)")
    with contextlib.closing(Decoder()) as decoder, pytest.raises(ImageError, match="could not be decoded"):
        decoder.load(SMALL) if method == "load" else decoder.prepare(SMALL, CIFAR10)


def test_what_the_process_says_is_one_line():
    assert module._one_line(b"a\nb\x1b[31m \xff") == "a b?[31m \N{REPLACEMENT CHARACTER}"


def test_the_processes_end_with_the_decoder():
    decoder = Decoder(2)
    decoder.start()
    pids = [child.process.pid for child in decoder._children]
    del decoder
    assert [fields_of(pid) for pid in pids] == [[], []]


def test_it_ends_with_its_parent_in_the_middle_of_a_picture(monkeypatch):
    ours, theirs = socket.socketpair()
    code = "from serving.decoding import confine; import sys, time; confine(2**30); sys.stdout.write('!'); "
    code += "sys.stdout.flush(); time.sleep(600)"  # no picture takes that long, or looks less for the end of its parent
    with ours, theirs:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=module.ROOT, **pipes)
        assert process.stdout.read(1) == b"!"
        process.stdin.close()  # as when this process ends
        assert process.wait(60) == -signal.SIGIO
        process.stdout.close()


def test_it_ends_when_its_parent_is_killed():
    code = "from serving.decoder import Decoder; decoder = Decoder(); decoder.load(bytes.fromhex(input())); "
    code += "print(decoder._children[0].process.pid, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=module.ROOT, **pipes) as parent:
        parent.stdin.write(SMALL.hex() + "\n")
        parent.stdin.flush()
        pid = int(parent.stdout.readline())
        assert fields_of(pid)
        parent.kill()
    assert wait_until_gone(lambda each: each == pid) == []


def test_a_preprocessing_of_any_kind_is_followed(decoder):
    odd = replace(CIFAR10, size=45, crop_pct=0.7, interpolation="lanczos", mean=(0.1, 0.2, 0.3))
    assert np.array_equal(decoder.prepare(OTHER, odd), here(OTHER, odd))
