"""Compiling the Triton kernels before there is a GPU: with all of Triton but the GPU's driver."""

import os
import shutil

import pytest

pytest.importorskip("triton", reason="PyTorch comes without Triton here")


@pytest.mark.skipif(not shutil.which("gcc"), reason="there is no gcc")
def test_what_was_compiled_ahead_needs_no_compiler(python, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = python("tests/launch_without_gpu.py", env=environment)
    assert done.returncode == 1 and "/bin/false" in done.stderr, done.stderr
    done = python("-m", "convmixer.gpu.ahead", "--capabilities", "9.0", "--kernel-sizes", "5", "9", env=environment)
    assert done.stdout == f"compiled for 9.0 into {tmp_path}\n", done.stderr
    before = sorted(tmp_path.rglob("*"))
    done = python("tests/launch_without_gpu.py", env=environment)
    assert done.returncode == 0 and sorted(tmp_path.rglob("*")) == before, done.stderr


@pytest.mark.parametrize("words", [["--capabilities", "90"], ["--kernel-sizes", "11"]])
def test_what_cannot_be_compiled_ahead_gets_one_line(call_main, words):
    from convmixer.gpu import ahead

    code, _, stderr = call_main(ahead.main, *words)
    assert code == 2 and words[1] in stderr.splitlines()[-1]
