"""Every door on a CPU in environments of their own in which PyTorch is not installed at all."""

import contextlib
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from pathlib import Path

import pytest
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


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> Path:
    """Python with what answers pictures: of requirements/core.txt all but what downloads models."""
    return environment_of(tmp_path_factory.mktemp("core") / "env", lambda name: name.startswith(CORE))


@pytest.fixture(scope="module")
def light(tmp_path_factory) -> Path:
    """Python with everything but PyTorch and what needs it."""
    return environment_of(tmp_path_factory.mktemp("light") / "env", lambda name: not name.startswith(HEAVY))


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [python, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_pytorch_is_not_there(core, light):
    for python in (core, light):
        found = run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('triton'))")
        assert found.stdout == "None None\n", found


def test_the_command_line(core, picture, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        picture(seed=seed).save(folder / f"{seed}.png")
    answers = run(core, "-m", "convmixer", "classify", folder, "--json")
    expected = run(sys.executable, "-m", "convmixer", "classify", folder, "--json", "--device", "cpu")
    assert answers.returncode == 0 and len(answers.stdout.splitlines()) == 3, answers
    assert answers.stdout == expected.stdout
    drawn = run(core, "-m", "convmixer", "classify", folder / "0.png", "--heatmap", tmp_path / "seen.png")
    assert drawn.returncode == 0 and (tmp_path / "seen.png").stat().st_size > 500, drawn
    assert "convmixer_256_8_cifar10" in run(core, "-m", "convmixer", "models").stdout


def test_make_predict(core):
    """The Makefile's own line, in this environment in the place of the one that it would install."""
    made = run("make", "-o", ".venv/.core", f"BIN={core.parent}", "predict")
    assert made.returncode == 0 and "convmixer_256_8_cifar10" in made.stdout, made


def test_what_needs_pytorch_says_so_in_one_line(core, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\3\4")
    for arguments, line in (
        (("classify", "--sample", "--model", tmp_path / "a.pth"), "is a pickle, which PyTorch reads"),
        (("classify", "--sample", "--engine", "torch"), "engine 'torch' needs PyTorch"),
        (("classify", "--sample", "--device", "cuda"), "device 'cuda' needs PyTorch"),
        (("export", "convmixer_256_8_cifar10", "--to", tmp_path / "a.onnx"), "torch is not installed"),
    ):
        refused = run(core, "-m", "convmixer", *arguments)
        assert refused.returncode == 2 and line in refused.stderr and refused.stderr.count("\n") == 1, refused


@pytest.mark.parametrize(
    ("script", "page", "ready"),
    [(("-m", "serving"), "/health-check", '"status":"READY"'), (("demo/app.py",), "/", "<html")],
    ids=["server", "demo"],
)
def test_the_server_and_the_demo(light, tmp_path, script, page, ready):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"TMPDIR": str(tmp_path), "COG_WEIGHTS": "", "no_proxy": "127.0.0.1"}
    command = [light, *script, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        content, deadline = "", time.monotonic() + 120
        while ready not in content:
            assert process.poll() is None and time.monotonic() < deadline, content
            time.sleep(0.05)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{page}") as answer:
                content = answer.read().decode()
    finally:
        process.terminate()
        process.wait(60)
