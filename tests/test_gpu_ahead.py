"""Launching the Triton kernels, and compiling them before there is a GPU: with all of Triton but the GPU's driver."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch comes without Triton here")
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")
MOST_SHARED = 227 * 1024  # what a program may have on an H200


@pytest.fixture
def stand_in(tmp_path) -> dict[str, str]:
    """The environment of a process that finds a driver without a GPU, and an empty cache."""
    from triton.backends.nvidia.driver import include_dirs

    source, library = Path(__file__).with_name("stand_in_driver.c"), tmp_path / "libcuda.so.1"
    words = ["gcc", "-shared", "-fPIC", f"-I{include_dirs[0]}", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(words, check=True)
    own = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    return {**os.environ, **own, "LD_LIBRARY_PATH": str(tmp_path)}


def test_every_launch(python, stand_in):
    """All of it but the GPU and its driver."""
    done = python("tests/launch_without_gpu.py", 90, "all", env=stand_in)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    launched = [words for words in lines if words[0] != "compiled"]
    assert len(launched) == 7 * 3 * 3 + 2 * 4
    assert [" ".join(words[:3]) for words in launched[-8:]] == [
        *["_convolve 8 8"] * 2,
        *["_differentiate 8 8", "_activate 64 8"],
        *["_convolve 2 1"] * 2,
        *["_differentiate 2 1", "_activate 1 2"],
    ]
    assert all(int(shared) <= MOST_SHARED for *_, shared in launched)
    # One of each is enough for all shapes of the networks; here come others for training, and for sides of one.
    compiled = sorted(name for first, name, *_ in lines if first == "compiled")
    assert compiled == ["_activate"] * 3 + ["_convolve"] * (6 + 2) + ["_differentiate"] * 2


@pytest.mark.parametrize("capability", ["8.6", "9.0"])
def test_what_was_compiled_ahead_needs_no_compiler(python, stand_in, tmp_path, capability):
    done = python("-m", "convmixer.gpu.ahead", "--capabilities", capability, env=stand_in)
    assert done.returncode == 0, done.stderr
    cache = tmp_path / "cache"
    assert done.stdout == f"compiled for {capability} into {cache}\n"
    before = sorted(cache.rglob("*"))
    without = stand_in | {"CC": "/bin/false"}
    done = python("tests/launch_without_gpu.py", capability.replace(".", ""), "networks", env=without)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n_convolve") == 7 * 3 and "compiled" not in done.stdout
    assert sorted(cache.rglob("*")) == before


def test_what_was_not_compiled_ahead_needs_one(python, stand_in):
    without = stand_in | {"CC": "/bin/false"}
    done = python("tests/launch_without_gpu.py", 90, "networks", env=without)
    assert done.returncode == 1 and "/bin/false" in done.stderr


@pytest.mark.parametrize("words", [["--capabilities", "7.5"], ["--capabilities", "90"], ["--kernel-sizes", "11"]])
def test_what_cannot_be_compiled_ahead_gets_one_line(python, words):
    done = python("-m", "convmixer.gpu.ahead", *words)
    assert done.returncode == 2 and words[1] in done.stderr.splitlines()[-1]
