"""The compiled kernel: narrow vectors, few bits, threads, and where it is compiled and kept."""

import os
import platform
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from convmixer import ConvMixer
from convmixer.cpu import compiler, kernel
from convmixer.cpu import engine as engine_module
from convmixer.cpu.engine import KernelEngine
from convmixer.cpu.kernel import KernelError
from convmixer.cpu.threads import usable_cpus
from convmixer.model import to_arrays
from tests.networks import CASES, network, relative_error

try:
    kernel.load(5, "float32")
except KernelError as reason:
    pytest.skip(str(reason), allow_module_level=True)

SOURCE = compiler.SOURCE
SMALL = {"dim": 48, "depth": 3, "kernel_size": 5, "patch_size": 2}


def engine_of(net: ConvMixer, precision: str = "float32") -> KernelEngine:
    return KernelEngine(net.config, to_arrays(net), precision)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


NARROWER = [
    ("the shipped one's", "x86-64-v3", "float32", 8, 1e-5),
    ("the shipped one's", "x86-64-v3", "int8", 8, 0.01),
    ("a width that fills no vector", "x86-64", "float32", 4, 1e-5),
]


@pytest.mark.parametrize(("case", "target", "precision", "lanes", "near"), NARROWER)
@torch.inference_mode()
def test_narrower_vectors(case, target, precision, lanes, near, monkeypatch):
    if platform.machine() != "x86_64" or "avx2" not in kernel.processor():
        pytest.skip("this is no x86-64 processor with AVX2")
    monkeypatch.setattr(compiler, "NATIVE", f"-march={target}")
    monkeypatch.setattr(engine_module, "load", kernel.load.__wrapped__)
    config, sides = CASES[case]
    net = network(**config)
    engine, pictures = engine_of(net, precision), draw(3, 3, *sides)
    assert engine._library.convmixer_lanes() == lanes
    assert relative_error(torch.from_numpy(engine.run(pictures)[0]), net(torch.from_numpy(pictures))) < near


def test_a_picture_gives_the_same_bits_in_any_company():
    engine, pictures = engine_of(network(**SMALL)), draw(20, 3, 26, 26)
    together = engine.run(pictures, 1)[1][0]
    for engine.threads, index in ((1, 0), (2, 7), (3, 19)):
        assert np.array_equal(engine.run(pictures[index : index + 1], 1)[1][0, 0], together[index])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows a process's threads")
def test_a_process_forked_at_work_has_threads_of_its_own():
    engine, pictures, stop = engine_of(network(**SMALL)), draw(2, 3, 40, 40), threading.Event()
    engine.threads = 3
    wanted = engine.run(pictures)[0]
    worker = threading.Thread(target=lambda: [engine.run(pictures) for _ in iter(stop.is_set, True)])
    worker.start()
    try:
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                signal.alarm(60)
                right = all(np.array_equal(engine.run(pictures)[0], wanted) for _ in range(10))
                os._exit(0 if right and len(os.listdir("/proc/self/task")) == 3 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        worker.join()


def test_threads_that_wait_need_no_time():
    engine = engine_of(network(**SMALL))
    engine.threads = 4
    engine.run(draw(4, 3, 40, 40))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_threads_are_as_many_as_the_environment_says_or_the_process_may_use(monkeypatch):
    for text, most in (("3,2", 3), ("many", os.cpu_count()), ("0", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert 1 <= usable_cpus() <= most


def test_what_cannot_be_had_is_named(monkeypatch, tmp_path):
    with pytest.raises(KernelError, match="kernel_size is 17"):
        kernel.load(17, "float32")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no room for the output' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-DNOT_COMPILED_BEFORE"))
    monkeypatch.setattr(compiler, "COMPILERS", (str(broken),))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match="failed: no room for the output"):
        kernel.load.__wrapped__(5, "float32")
    monkeypatch.setattr(kernel, "processor", lambda: ("avx2", "fma"))
    with pytest.raises(KernelError, match="bfloat16 needs a processor with avx512_bf16, which"):
        kernel.load.__wrapped__(5, "bfloat16")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Loads the kernel from a folder, with a copy of the source and a cache of its own; gives the compiled files."""

    def load(place: str) -> list[Path]:
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        for file in (SOURCE, *SOURCE.parent.glob("*.h")):
            shutil.copy(file, folder)
        monkeypatch.setattr(compiler, "SOURCE", folder / SOURCE.name)
        monkeypatch.setenv("CONVMIXER_CACHE", os.fspath(folder / "cache"))
        assert kernel.load.__wrapped__(3, "float32").convmixer_lanes() in (4, 8, 16)
        return list(folder.rglob("kernel-float32-3-*.so"))

    monkeypatch.setattr(compiler, "OPTIONS", tuple("-O0" if each == "-O3" else each for each in compiler.OPTIONS))
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    return load


def test_a_compiled_kernel_is_used_again_unless_others_could_have_written_it(load, tmp_path):
    (compiled,) = load("first")
    assert compiled.parent.name == "__pycache__" and not compiled.stat().st_mode & 0o022
    before = compiled.stat().st_mtime_ns
    assert load("first") == [compiled] and compiled.stat().st_mtime_ns == before
    planted_by_others = compiled.read_bytes() + b"x"
    cases = [("group", 0o664, planted_by_others), ("all", 0o646, planted_by_others), ("damage", 0o644, b"damaged")]
    for place, mode, content in cases:
        planted = tmp_path / place / "__pycache__" / compiled.name
        planted.parent.mkdir(parents=True)
        planted.write_bytes(content)
        planted.chmod(mode)
        assert load(place) == [planted]
        assert planted.read_bytes() == compiled.read_bytes()


def test_elsewhere_or_nowhere(load, tmp_path, monkeypatch):
    for folder in ("__pycache__", "cache"):
        (tmp_path / "nowhere").mkdir(exist_ok=True)
        (tmp_path / "nowhere" / folder).write_text("a file in the place of a folder")
    assert load("nowhere") == []
    monkeypatch.setenv("CXX", "clang++")  # where it is installed
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # who wants no files beside the source gets none
    (compiled,) = load("elsewhere")
    assert compiled.parent == tmp_path / "elsewhere" / "cache" / "kernels"
