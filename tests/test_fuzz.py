"""The promises of tests/fuzz/, tried by Hypothesis; the soak, in short; and the worst that was ever found."""

import struct

import pytest
from fuzz import checkpoints, pictures
from hypothesis import HealthCheck, given, settings

from convmixer import CheckpointError
from convmixer.weights import load_checkpoint

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])


@FEW
@given(pictures.damaged(pictures.seeds()).map(pictures.repaired))
def test_any_bytes_give_a_safe_picture_or_one_line(content):
    pictures.check(content)


@FEW
@given(pictures.damaged(checkpoints.seeds()))
def test_any_bytes_give_a_checkpoint_or_one_line_and_run_no_code(content):
    checkpoints.check(content)


def test_whole_files_are_taken():
    assert {pictures.check(content) for content in pictures.seeds()} == {"picture"}
    assert [checkpoints.check(content) for content in checkpoints.seeds()] == ["usable"] * 9 + ["refused"] * 9


FILM = pictures.encoded("WEBP", "RGB", {"save_all": True})
JPEG = pictures.encoded("TIFF", "CMYK", {"compression": "jpeg"})
SIZE = JPEG.index(b"\xff\xc0") + 5


def test_the_worst_pictures():
    pictures.check(FILM[:24] + (2**24 - 1).to_bytes(3, "little") + FILM[27:])  # a row of millions of pixels
    for width, height in ((8, 17), (17, 8)):  # smaller than the TIFF around it: Pillow leaves memory unset
        pictures.check(JPEG[:SIZE] + struct.pack(">HH", height, width) + JPEG[SIZE + 4 :])
    assert pictures.check(pictures.encoded("TIFF", "1", {"compression": "group4"})) == "refused"  # likewise


@pytest.mark.parametrize(("content", "message"), checkpoints.WORST, ids=[message for _, message in checkpoints.WORST])
def test_the_worst_checkpoints(content, message, tmp_path):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pth")
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_labels_do_not_command_the_terminal(python, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(checkpoints.ours(("\x1b[31mant", "bee\r\n", "ц\x07")))
    run = python("-m", "convmixer", "classify", "--sample", "--model", tmp_path / "model.safetensors")
    assert "?[31mant" in run.stdout and run.stdout.replace("\n", "").isprintable(), run


def test_a_short_soak_finds_everything_as_it_was(python):
    run = python("tests/fuzz/soak.py", "--requests", 200)
    assert run.returncode == 0 and "0 failures" in run.stdout, run
