"""The fuzzing and the soak, in short, and the worst that long runs of them found."""

import contextlib
import io
import json
import pickle
import socket
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from cog_server import GOOD, PATIENCE, PICTURE, Server, data_uri, encoded, wait_until
from PIL import Image

from convmixer import CheckpointError, ImageError, load_image
from convmixer.pickles import MOST_DEPTH, check_pickles
from convmixer.weights import load_checkpoint
from fuzz import checkpoints, files, pictures, requests
from fuzz.child import Child
from fuzz.run import main


@pytest.fixture
def fuzzing(python):
    """A function that runs fuzz/run.py in a process of its own."""
    return lambda *arguments: python("fuzz/run.py", *arguments)


# Short runs.


@pytest.mark.parametrize(("target", "cases"), [("pictures", 700), ("checkpoints", 400), ("http", 130)])
def test_a_short_run_breaks_no_promise(fuzzing, target, cases, tmp_path):
    run = fuzzing("--target", target, "--cases", cases, "--seed", 3, "--save", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{target}: {cases} cases in" in run.stdout
    assert "; 0 failures; " in run.stdout


@pytest.mark.parametrize("target", [pictures, checkpoints, requests])
def test_a_case_is_made_of_the_seed_and_its_number_alone(target):
    numbers = range(60)
    first = [target.make(5, number) for number in numbers]
    assert [target.make(5, number) for number in reversed(numbers)] == first[::-1]
    assert [target.make(6, number) for number in numbers] != first
    assert len(set(first)) > len(first) / 2


TARGET = """
import os, time
EXTRA_MEMORY = 100 * 2**20
def make(seed, number): return str(number).encode()
def is_valid(number): return False
def warm_up(): pass
def check(content, folder, valid=False):
    match content:
        case b"1": os.kill(os.getpid(), 11)
        case b"2": time.sleep(1000)
        case b"3": raise KeyError("two\\nlines")
        case b"4": bytearray(200 * 2**20)
        case b"5": bytearray(2**36)
        case b"6": print("hello")
        case b"7": assert False, "a broken promise"
    return "fine"
"""


@pytest.fixture
def child(tmp_path, monkeypatch) -> Iterator[Child]:
    """A process that runs the cases of TARGET, each of which does something that must not stop the others."""
    (tmp_path / "target.py").write_text(TARGET)
    monkeypatch.setattr("fuzz.child.PATIENCE", 2.0)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = Child("target", 0)
    yield child
    child.close()


def test_whatever_a_case_does_is_a_failure_of_that_case(child):
    results = [child.run(number) for number in range(9)]
    failures = [result.failure for result in results]
    assert results[0].outcome == results[8].outcome == "fine" and not failures[0] and not failures[8]
    assert "SIGSEGV" in failures[1] and results[1].outcome == "crash"
    assert "no answer" in failures[2] and results[2].outcome == "hang"
    assert failures[3].startswith("KeyError out of target.py")
    assert "MiB of memory" in failures[4]
    assert failures[5].startswith("MemoryError")
    assert "hello" in failures[6]
    assert failures[7] == "a broken promise"
    assert child.content() == b"8"
    assert child.starts == 3  # and not once more than needed


def test_a_failure_is_reported_with_what_repeats_it(child, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fuzz.run._runner", lambda name, seed: child)
    assert main(["--target", "pictures", "--seed", "2", "--first", "7", "--cases", "2", "--save", str(tmp_path)]) == 1
    failure, file, command, summary = capsys.readouterr().out.splitlines()
    assert failure == "pictures: case 7 of seed 2: a broken promise"
    assert Path(file.strip()).read_bytes() == b"7"
    assert command.strip() == "python fuzz/run.py --target pictures --seed 2 --case 7"
    assert "2 cases" in summary and "1 failures" in summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "nothing"], "invalid choice"),
        (["--case", "1"], "need one --target"),
        (["--seconds", "x"], "'x' is not a positive number"),
        (["--seed", "-1"], "'-1' is not a whole number"),
        (["--target", "http", "--file", "missing"], "there is no file 'missing'"),
    ],
)
def test_wrong_usage_gets_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and message in text and text.count("\n") == 1


def test_a_short_soak_finds_everything_as_it_was(python):
    run = python("fuzz/soak.py", "--requests", 300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "300 requests, 30 of them bad" in run.stdout and run.stdout.rstrip().endswith("0 failures")


# The worst cases: pictures.


@pytest.mark.timeout(60)
def test_a_row_of_millions_of_pixels_is_read_at_once():
    stream = io.BytesIO()
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    content = bytearray(stream.getvalue())
    assert content[12:16] == b"VP8X"
    content[24:27] = (2**24 - 1).to_bytes(3, "little")  # the width of the canvas, less one
    assert load_image(bytes(content)).size == (2**24, 2)


def jpeg_tiff(width: int, height: int, mode: str = "CMYK", **options) -> bytes:
    stream = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(stream, "TIFF", compression="jpeg", **options)
    return stream.getvalue()


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_jpeg_in_a_tiff_that_leaves_memory_unset_is_refused(side):
    content = jpeg_tiff(32, 32)
    start = content.index(b"\xff\xc0")
    height, width = struct.unpack(">HH", content[start + 5 : start + 9])
    assert (width, height) == (32, 32)
    smaller = struct.pack(">HH", *((32, 16) if side == "width" else (16, 32)))
    with pytest.raises(ImageError, match="parts have the wrong size"):
        load_image(content[: start + 5] + smaller + content[start + 9 :])


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr", "CMYK"])
@pytest.mark.parametrize("size", [(300, 200), (17, 33), (1, 1)])
def test_jpegs_in_tiffs_of_the_right_size_are_read(mode, size):
    content = jpeg_tiff(*size, mode)
    assert load_image(content).size == size
    with Image.open(io.BytesIO(content)) as lazy:
        assert load_image(lazy).tobytes() == load_image(content).tobytes()


# Checkpoints.


def refused(content: bytes, folder: Path) -> str:
    path = folder / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_pickle_that_would_overrun_the_stack_is_refused(python, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")  # {((((...),),),): 1}
    run = python("-c", "import sys, convmixer; convmixer.load_checkpoint(sys.argv[1])", path)
    assert run.returncode == 1 and "nested too deep" in run.stderr.splitlines()[-1], run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02)" + b"\x85" * (MOST_DEPTH + 2) + b".", "nested too deep"),
        (b"\x80\x02K\x01" + b"q\x00h\x00h\x00\x87" * 40 + b".", "refers to itself too often"),
        (b"\x80\x02]q\x00h\x00a.", "filled after it was used"),
        (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", "FloatTensor"),
    ],
)
def test_a_pickle_that_swells_is_refused(content, message, tmp_path):
    assert message in refused(content, tmp_path)


def test_a_compressed_archive_is_refused(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert "compressed archive" in refused(stream.getvalue(), tmp_path)


def test_no_error_of_a_library_brings_control_characters(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "\x1b[31m\0")
    assert "Unknown endianness type: ?[31m?" in refused(stream.getvalue(), tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_honest_training_checkpoints_pass(zipped):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    shared = network.state_dict()
    content = {
        "state_dict": shared,
        "state_dict_ema": shared,
        "optimizer": optimizer.state_dict(),
        "best": np.float64(1),
    }
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    stream.seek(0)
    check_pickles(stream)
    with pytest.raises((ValueError, zipfile.BadZipFile)):  # cut off
        check_pickles(io.BytesIO(stream.getvalue()[:100]))


def test_labels_do_not_command_the_terminal(python, picture, tmp_path):
    changed = files.description() | {"name": "tiny\x1b[2J", "labels": ["\x1b[31mant", "bee\r\n", "ц\x07"]}
    tensors = files.tiny(np.random.default_rng(0))
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save(tensors, {"convmixer": json.dumps(changed)}))
    picture().save(tmp_path / "picture.png")
    run = python("-m", "convmixer", "classify", tmp_path / "picture.png", "--model", path)
    assert run.returncode == 0 and "?[31mant" in run.stdout and "(tiny?[2J)" in run.stdout
    assert run.stdout.replace("\n", "").isprintable()


# The server.


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


def send(server: Server, method: str, path: str, image: str = GOOD) -> socket.socket:
    """A connection over which a good request was sent."""
    body = json.dumps({"input": {"image": image}})
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    connection.sendall(f"{head}\r\n\r\n{body}".encode())
    return connection


def test_clients_that_leave_at_once_do_not_block_the_server(server):
    small = data_uri(encoded(Image.new("RGB", (1, 1)), "GIF"))  # soon read, so that the request is under way at once
    for _ in range(150):
        with contextlib.closing(send(server, "POST", "/predictions", small)) as connection:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(10_000):
                pass
        wait_until(lambda: server.status() == "READY")
    server.expect(server.output(image=GOOD), PICTURE)
