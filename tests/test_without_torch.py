"""Every door on a CPU in an environment of its own in which PyTorch is not installed at all."""

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


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """The Python of an environment that has the packages of this one, but PyTorch and what needs it."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(HEAVY) and not (packages / entry.name).exists():
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_line_answers_the_same(light):
    words = ("-m", "convmixer", "classify", "--sample", "--json")
    answer, expected = run(light, *words), run(sys.executable, *words, "--device", "cpu")
    assert (answer.returncode, answer.stdout) == (0, expected.stdout), answer
    made = run("make", "-o", ".venv/.core", f"BIN={light.parent}", "predict")  # as if it had installed this one
    assert made.returncode == 0 and "convmixer_256_8_cifar10" in made.stdout, made


def test_what_needs_pytorch_says_so_in_one_line(light, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    for arguments, line in (
        (f"classify --sample --model {tmp_path}/a.pth", "is a pickle, which PyTorch reads"),
        ("classify --sample --engine torch", "engine 'torch' needs PyTorch"),
        (f"export convmixer_256_8_cifar10 --to {tmp_path}/a.onnx", "torch is not installed"),
    ):
        refused = run(light, "-m", "convmixer", *arguments.split())
        assert refused.returncode == 2 and line in refused.stderr and refused.stderr.count("\n") == 1, refused


@pytest.mark.parametrize(
    ("script", "path", "ready"), [("-mserving", "/health-check", '"status":"READY"'), ("demo/app.py", "/", "<html")]
)
def test_the_server_and_the_demo_answer(light, tmp_path, script, path, ready):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"TMPDIR": str(tmp_path), "COG_WEIGHTS": "", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen([light, script, f"--port={port}"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def is_ready() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
            return ready in answer.read().decode()

    try:
        wait_until(is_ready)
    finally:
        process.terminate()
        process.wait(60)
