"""The kernel where it was not compiled at its first use: an emulated processor, the wheel."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convmixer
from convmixer.cpu import compiler
from convmixer.cpu.engine import pack
from convmixer.cpu.numpy_engine import NumpyEngine
from convmixer.model import to_arrays
from tests.networks import network

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"dim": 40, "depth": 2, "kernel_size": 5, "patch_size": 2, "num_classes": 3}
PICTURES = np.random.default_rng(0).standard_normal((3, 3, 30, 44), dtype=np.float32)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A program made of kernel_driver.cpp for 64-bit ARM, as a command."""
    compile_with, run_with = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if not (shutil.which(compile_with) and shutil.which(run_with)):
        pytest.skip("not installed: Debian's g++-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user")
    program = tmp_path_factory.mktemp("arm") / "driver"
    options = [option for option in compiler.options_for(5, "float32") if option not in ("-shared", "-fPIC")]
    source = ROOT / "tests" / "kernel_driver.cpp"
    subprocess.run([compile_with, *options, "-static", "-o", program, source], check=True)
    return [run_with, program]


@pytest.mark.parametrize(("activation", "threads"), [("gelu", 1), ("relu", 2)])
def test_on_arm(activation, threads, emulated):
    net = network(**CONFIG, activation=activation)
    config, lanes, stages = net.config, 4, 2
    packed = pack(config, to_arrays(net), "float32", lanes, share=1)
    blocks = len(packed[0]["bias"]) // lanes
    numbers = [config.in_chans, config.patch_size, config.dim, blocks, config.depth, activation == "relu"]
    numbers += [*PICTURES.shape[::2], PICTURES.shape[3], stages, threads]
    arrays = [PICTURES, *(fields[name] for fields in packed for name in ("weight", "bias", "scale", "shift"))]
    data = np.array(numbers, np.int64).tobytes()
    data += b"".join(np.int64(array.nbytes).tobytes() + array.tobytes() for array in arrays)
    output = subprocess.run(emulated, input=data, capture_output=True, check=True, timeout=240).stdout
    assert np.frombuffer(output[:8], np.int64) == lanes
    pooled, features = np.split(np.frombuffer(output[8:], np.float32), [len(PICTURES) * config.dim])
    wanted = NumpyEngine(config, to_arrays(net)).run(PICTURES, stages)[1]
    assert abs(features - wanted.ravel()).max() < 1e-5 * abs(wanted).max()
    assert abs(pooled - wanted[-1].mean((2, 3)).ravel()).max() < 1e-5 * abs(wanted).max()


ANSWER = f"""
import numpy as np
from convmixer.config import ConvMixerConfig
from convmixer.cpu.engine import KernelEngine
from convmixer.cpu import kernel

engine = KernelEngine(ConvMixerConfig(**{CONFIG}), dict(np.load("weights.npz")))
print(*engine.run(np.load("pictures.npy"))[0].ravel())
try:
    kernel.load(11, "float32")
except kernel.KernelError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="the wheel is for x86-64 Linux")
def test_a_wheel_needs_no_compiler(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    source, site, cache = (tmp_path / name for name in ("source", "site", "cache"))
    ignored = shutil.ignore_patterns("__pycache__", compiler.AHEAD)
    shutil.copytree(ROOT / "convmixer", source / "convmixer", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    text = (source / "convmixer/cpu/compiler.py").read_text()
    quick = text.replace("(3, 5, 7, 9)", "(5,)").replace('"-O3"', '"-O0"')  # all of them take a minute
    (source / "convmixer/cpu/compiler.py").write_text(quick)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("pip cannot fetch setuptools")
    assert not done.returncode, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"convmixer-{convmixer.__version__}-py3-none-linux_x86_64.whl"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", site, wheel], check=True)
    ahead = site / "convmixer" / "cpu" / compiler.AHEAD
    assert len(list(ahead.glob("*.so"))) == 5

    net = network(**CONFIG)
    np.savez(tmp_path / "weights.npz", **to_arrays(net))
    np.save(tmp_path / "pictures.npy", PICTURES)
    cache.mkdir()
    environment = {"PYTHONPATH": site, "PATH": tmp_path, "CONVMIXER_CACHE": cache, "PYTHONDONTWRITEBYTECODE": "1"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    wanted = NumpyEngine(net.config, to_arrays(net)).run(PICTURES)[0]
    for place in (ahead, cache / "kernels"):  # the latter in a container
        ahead = ahead.rename(place)
        done = subprocess.run([sys.executable, "-c", ANSWER], **run)
        assert not done.returncode, done.stderr
        found, problem = done.stdout.splitlines()
        assert abs(np.array(found.split(), float) - wanted.ravel()).max() < 1e-4 * abs(wanted).max()
        assert problem == "the CPU kernel cannot be compiled; install g++"
