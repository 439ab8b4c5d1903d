"""Every door on a CPU in environments of their own in which PyTorch is not installed at all."""

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from pathlib import Path

import pytest
from cog_server import wait_until
from conftest import ROOT

HEAVY = ("torch", "functorch", "triton", "nvidia", "timm")
CORE = ("numpy", "PIL", "pillow", "_pillow_heif", "safetensors")  # how their folders and libraries begin


def environment_of(folder: Path, wanted) -> Path:
    """The Python of a new environment that has the packages of this one whose names are ``wanted``."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if wanted(entry.name) and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.fixture
def core(tmp_path) -> Path:
    """Python with what answers pictures: of requirements/core.txt all but what downloads models."""
    return environment_of(tmp_path / "env", lambda name: name.startswith(CORE))


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_line_answers_the_same(core, picture, tmp_path):
    picture().save(tmp_path / "any.png")
    answer = run(core, "-m", "convmixer", "classify", tmp_path / "any.png", "--json")
    expected = run(sys.executable, "-m", "convmixer", "classify", tmp_path / "any.png", "--json", "--device", "cpu")
    assert (answer.returncode, answer.stdout) == (0, expected.stdout), answer
    # The Makefile's own line, in this environment in the place of the one that it would install.
    made = run("make", "-o", ".venv/.core", f"BIN={core.parent}", "predict")
    assert made.returncode == 0 and "convmixer_256_8_cifar10" in made.stdout, made


def test_what_needs_pytorch_says_so_in_one_line(core, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    for arguments, line in (
        (f"classify --sample --model {tmp_path}/a.pth", "is a pickle, which PyTorch reads"),
        ("classify --sample --engine torch", "engine 'torch' needs PyTorch"),
        (f"export convmixer_256_8_cifar10 --to {tmp_path}/a.onnx", "torch is not installed"),
    ):
        refused = run(core, "-m", "convmixer", *arguments.split())
        assert refused.returncode == 2 and line in refused.stderr and refused.stderr.count("\n") == 1, refused


@pytest.mark.parametrize(
    ("script", "path", "ready"), [("-mserving", "/health-check", '"status":"READY"'), ("demo/app.py", "/", "<html")]
)
def test_the_server_and_the_demo_answer(tmp_path, script, path, ready):
    python = environment_of(tmp_path / "env", lambda name: not name.startswith(HEAVY))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"TMPDIR": str(tmp_path), "COG_WEIGHTS": "", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen([python, script, f"--port={port}"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def is_ready() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return ready in answer.read().decode()
        return False

    try:
        wait_until(is_ready)
    finally:
        process.terminate()
        process.wait(60)
