"""Compiling the Triton kernels before there is a GPU, and launching them: with all of Triton but the GPU's driver."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="PyTorch comes without Triton here")


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")
def test_what_was_compiled_ahead_needs_no_compiler(python, tmp_path):
    from triton.backends.nvidia.driver import include_dirs

    source, library = Path(__file__).with_name("stand_in_driver.c"), tmp_path / "libcuda.so.1"
    words = ["gcc", "-shared", "-fPIC", f"-I{include_dirs[0]}", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(words, check=True)
    cache = tmp_path / "cache"
    own = {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    environment = os.environ | own
    without = environment | {"CC": "/bin/false"}
    done = python("tests/launch_without_gpu.py", 90, env=without)
    assert done.returncode == 1 and "/bin/false" in done.stderr
    done = python("-m", "convmixer.gpu.ahead", "--capabilities", "9.0", "--kernel-sizes", "5", "9", env=environment)
    assert done.stdout == f"compiled for 9.0 into {cache}\n", done.stderr
    before = sorted(cache.rglob("*"))
    done = python("tests/launch_without_gpu.py", 90, env=without)
    assert done.returncode == 0, done.stderr
    launches = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in launches] == ["_activate", "_convolve", "_activate"] * 4 * 2  # networks, batches
    assert [words[:3] for words in launches[:2]] == [["_activate", "1", "8"], ["_convolve", "8", "1"]]  # and the grid
    assert all(int(shared) <= 227 * 1024 for *_, shared in launches)  # what a program may have on an H200
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("words", [["--capabilities", "7.5"], ["--capabilities", "90"], ["--kernel-sizes", "11"]])
def test_what_cannot_be_compiled_ahead_gets_one_line(call_main, words):
    from convmixer.gpu import ahead

    code, _, stderr = call_main(ahead.main, *words)
    assert code == 2 and words[1] in stderr.splitlines()[-1]
