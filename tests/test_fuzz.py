"""The promises of tests/fuzz/, tried by Hypothesis; the soak, in short; and the worst that was ever found."""

import base64
import contextlib
import io
import json
import socket
import struct
import zipfile

import pytest
from cog_server import GOOD, PATIENCE, PICTURE, Server, wait_until
from fuzz import checkpoints, pictures
from fuzz.damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convmixer import CheckpointError
from convmixer.pickles import MOST_DEPTH
from convmixer.weights import load_checkpoint

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
ODD = (
    st.none() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([[], {}, [[1]], 2**63, "x" * 5000])
)


@FEW
@given(damaged(pictures.seeds()).map(pictures.repaired))
def test_any_bytes_give_a_safe_picture_or_one_line(content):
    pictures.check(content)


@FEW
@given(damaged(checkpoints.seeds()))
def test_any_bytes_give_a_checkpoint_or_one_line_and_run_no_code(content):
    checkpoints.check(content)


@FEW
@given(st.sampled_from([*checkpoints.description()]), st.sampled_from(["dim", "size", "mean", "x"]), ODD)
def test_any_description_gives_a_checkpoint_or_one_line(part, name, value):
    about = checkpoints.description()
    about[part] = about[part] | {name: value} if isinstance(about[part], dict) else value
    checkpoints.check(checkpoints.ours(about))


def test_whole_files_are_taken():
    assert {pictures.check(content) for content in pictures.seeds()} == {"picture"}
    assert [checkpoints.check(content) for content in checkpoints.seeds()] == ["usable"] * 9 + ["refused"] * 3


def film() -> bytes:
    """A WebP whose canvas is a row of millions of pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 2)).save(stream, "WEBP", save_all=True, append_images=[Image.new("RGB", (4, 2), "red")])
    return stream.getvalue()[:24] + (2**24 - 1).to_bytes(3, "little") + stream.getvalue()[27:]


def jpeg_in_tiff(width: int, height: int) -> bytes:
    """A TIFF of 32 x 32 pixels around a JPEG that says it is smaller: Pillow leaves memory unset."""
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 50).convert("CMYK").save(stream, "TIFF", compression="jpeg")
    at = stream.getvalue().index(b"\xff\xc0") + 5
    return stream.getvalue()[:at] + struct.pack(">HH", height, width) + stream.getvalue()[at + 4 :]


FAX = base64.b64decode(  # a TIFF whose fax ends too early: libtiff leaves the rows after that unset, and says nothing
    "SUkqAFgAAAAjojoj5HJewmR2EE0kEEwsECYStIIJpIECS0kKSSSQQTsj6TSSCWkkgQJJpLYVpgmtJBBMEkEDAAEAAAAEAAAABgEDAAEAAAAB"
    "AAAAEQEEAgkAAAEDAAEAAAARAAAAAQEDAAEAAAANAAAAAgEDAAEAAAABAAAAAwEDAAEAAAAEAAAABgEDAAEAAAABAAAAEQEEAAEAAAAIAAAA"
    "FgEDAAEAAAANAAAAFwEEAAEAAABQAAAAHAEDAAEAAAABAAAAAAAAAA=="
)


@pytest.mark.parametrize("content", [FAX, film(), jpeg_in_tiff(16, 32), jpeg_in_tiff(32, 16)])
def test_the_worst_pictures(content):
    pictures.check(content)


def zip_of(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    return checkpoints.repacked({f"archive/{name}": content for name, content in members.items()}, compression)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02)" + b"\x85" * (MOST_DEPTH + 2) + b".", "nested too deep"),
        (b"\x80\x02K\x01" + b"q\x00h\x00h\x00\x87" * 40 + b".", "refers to itself too often"),
        (b"\x80\x02]q\x00h\x00a.", "filled after it was used"),
        (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytearray"),
        (b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", "FloatTensor"),
        (zip_of(zipfile.ZIP_DEFLATED, **{"data.pkl": bytes(10**7)}), "compressed archive"),
        (zip_of(**{"data.pkl": b"\x80\x02}.", "version": b"3", "byteorder": b"\x1b[31m\0"}), "type: ?[31m?"),
    ],
)
def test_the_worst_checkpoints(content, message, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_a_pickle_that_would_overrun_the_stack_is_refused(python, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")  # {((((...),),),): 1}
    run = python("-c", "import sys, convmixer; convmixer.load_checkpoint(sys.argv[1])", path)
    assert run.returncode == 1 and "nested too deep" in run.stderr.splitlines()[-1], run


def test_a_short_soak_finds_everything_as_it_was(python):
    run = python("tests/fuzz/soak.py", "--requests", 200)
    assert run.returncode == 0 and "0 failures" in run.stdout, run


def test_labels_do_not_command_the_terminal(python, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoints.ours(checkpoints.description() | {"labels": ["\x1b[31mant", "bee\r\n", "ц\x07"]}))
    run = python("-m", "convmixer", "classify", "--sample", "--model", path)
    assert "?[31mant" in run.stdout and run.stdout.replace("\n", "").isprintable(), run


def test_clients_that_leave_at_once_do_not_block_the_server(tmp_path):
    server, body = Server(tmp_path), json.dumps({"input": {"image": GOOD}})
    head = f"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
                connection.sendall(f"{head}\r\n\r\n{body}".encode())
                connection.shutdown(socket.SHUT_WR)
            wait_until(lambda: server.status() == "READY")
        server.expect(server.output(image=GOOD), PICTURE)
