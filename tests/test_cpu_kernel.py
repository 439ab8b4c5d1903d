"""The network through the compiled kernel, against the network through PyTorch's operators."""

import itertools
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from convmixer import ConvMixer, ConvMixerConfig, zoo
from convmixer.cpu import compiler, kernel
from convmixer.cpu import engine as engine_module
from convmixer.cpu.engine import KernelEngine
from convmixer.cpu.kernel import KernelError
from convmixer.cpu.threads import usable_cpus
from convmixer.model import build, to_arrays
from convmixer.preprocessing import preprocess
from convmixer.sample import draw_sample
from tests.networks import CASES, network, relative_error

try:
    kernel.load(5, "float32")
except KernelError as reason:
    pytest.skip(str(reason), allow_module_level=True)

SOURCE = compiler.SOURCE


def engine_of(net: ConvMixer, precision: str = "float32", threads: int | None = None) -> KernelEngine:
    engine = KernelEngine(net.config, to_arrays(net), precision)
    engine.threads = threads or engine.threads
    return engine


def run(engine: KernelEngine, pictures: torch.Tensor, stages: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(map(torch.from_numpy, engine.run(pictures.numpy(), stages)))


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_and_features_are_the_networks(case):
    config, sides = CASES[case]
    net = network(**config)
    engine = engine_of(net)
    for count, engine.threads in [(1, 1), (1, 3), (2, 2), (11, 2)]:
        pictures = torch.randn(count, net.config.in_chans, *sides)
        wanted, maps = net.double()(pictures.double()), net.forward_intermediates(pictures.double())
        net.float()
        logits, features = run(engine, pictures, len(maps))
        assert features.shape == (len(maps), *maps[0].shape) and logits.dtype == features.dtype == torch.float32
        assert relative_error(logits, wanted) < 1e-5
        assert all(relative_error(found, map) < 1e-5 for found, map in zip(features, maps, strict=True))
        assert torch.equal(run(engine, pictures)[0], logits)
        assert torch.equal(run(engine, pictures, 1)[1][0], features[-1])


@pytest.mark.parametrize(("target", "lanes"), [("x86-64-v3", 8), ("x86-64", 4)])
@pytest.mark.parametrize("case", ["the shipped one's", "a width that fills no vector", "a kernel larger than the map"])
@torch.inference_mode()
def test_with_narrower_vectors(case, target, lanes, monkeypatch):
    if platform.machine() != "x86_64" or "avx2" not in kernel.processor():
        pytest.skip("this is no x86-64 processor with AVX2")
    monkeypatch.setattr(compiler, "NATIVE", f"-march={target}")
    monkeypatch.setattr(engine_module, "load", kernel.load.__wrapped__)
    config, sides = CASES[case]
    net = network(**config)
    engine = engine_of(net)
    assert engine._library.convmixer_lanes() == lanes
    pictures = torch.randn(3, 3, *sides)
    assert relative_error(run(engine, pictures)[0], net(pictures)) < 1e-5


@torch.inference_mode()
def test_gelu_is_as_exact_as_pytorchs():
    # One channel, and a block that only takes GELU of what it gets.
    net = ConvMixer(ConvMixerConfig(1, 1, kernel_size=1, patch_size=1, num_classes=1, in_chans=1)).eval()
    for name, parameter in net.named_parameters():
        parameter.fill_(name in {"stem.0.weight", "stem.2.weight", "blocks.0.1.weight"} or "norm" in name)
    net.blocks[0][1].weight.fill_(1), net.blocks[0][3].weight.fill_(1)
    for norm in (net.stem[2], net.blocks[0][3]):
        norm.running_var.fill_(1 - norm.eps)
    values = torch.cat([torch.linspace(-8, 8, 100_001), torch.tensor([-1e30, -3e9, -1048.0, -30.0, 30.0, 1048.0, 3e9])])
    found = run(engine_of(net), values.view(1, 1, 1, -1), 1)[1]
    gelu = torch.nn.functional.gelu
    error = (found.flatten().double() - gelu(gelu(values.double()))).abs()
    assert error[:-7].max() < 2e-6  # PyTorch's own twice in float32: 2.3e-6
    assert not error[-7:].any()


@torch.inference_mode()
def test_a_picture_gives_the_same_bits_in_any_company():
    engine = engine_of(network(dim=48, depth=3, kernel_size=5, patch_size=2))
    pictures = torch.randn(20, 3, 26, 26)
    together = run(engine, pictures, 1)[1][0]
    for engine.threads, index in itertools.product((1, 2, 3), (0, 7, 19)):
        assert torch.equal(run(engine, pictures[index : index + 1], 1)[1][0, 0], together[index])


@pytest.mark.parametrize("count", [1, 3])
def test_threads_share_an_engine(count):
    engine = engine_of(network(dim=64, depth=3, kernel_size=5, patch_size=2), threads=count)
    inputs = [torch.randn(1 + index % 3, 3, 20 + 2 * index, 30) for index in range(8)]
    wanted = [run(engine, pictures, 1)[1] for pictures in inputs]
    wrong = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(run(engine, inputs[index], 1)[1], wanted[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_forked_process_has_threads_of_its_own():
    engine = engine_of(network(dim=64, depth=3, kernel_size=5, patch_size=2), threads=3)
    pictures = torch.randn(2, 3, 40, 40)
    wanted = run(engine, pictures)[0]
    stop = threading.Event()
    worker = threading.Thread(target=lambda: [run(engine, pictures) for _ in iter(stop.is_set, True)])
    worker.start()  # so that the threads are at work when the process is forked
    try:
        for _ in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                signal.alarm(30)
                os._exit(0 if all(torch.equal(run(engine, pictures)[0], wanted) for _ in range(20)) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        worker.join()


def test_threads_that_wait_need_no_time():
    engine = engine_of(network(dim=64, depth=3, kernel_size=5, patch_size=2), threads=4)
    run(engine, torch.randn(4, 3, 40, 40))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_threads_are_as_many_as_the_environment_says_or_the_process_may_use(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert usable_cpus() == 3
    for nonsense in ("many", "", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert 1 <= usable_cpus() <= os.cpu_count()


def test_pictures_of_a_wrong_shape_are_named():
    engine = engine_of(network(dim=8, depth=1, kernel_size=3, patch_size=4))
    for shape in [(3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 3)]:
        with pytest.raises(ValueError, match=r"the pictures have the shape .*; it must be \(N, 3, H, W\)"):
            engine.run(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="stages is -1; it must be 0 to 2"):
        engine.run(np.zeros((1, 3, 8, 8), np.float32), stages=-1)
    logits, features = engine.run(np.zeros((0, 3, 8, 8), np.float32), stages=2)
    assert logits.shape == (0, 1000) and features.shape == (2, 0, 8, 2, 2)


@torch.inference_mode()
def test_weights_that_are_not_finite_stay_visible():
    net = network(dim=16, depth=1, kernel_size=3, patch_size=2)
    pictures = torch.randn(1, 3, 8, 8)
    pictures[0, 0, 0, 0] = torch.nan
    assert run(engine_of(net), pictures)[0].isnan().all()


def test_bfloat16_is_pytorchs():
    values = torch.cat(
        [torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,)), torch.tensor([torch.inf, 0.0])]
    )
    found = engine_module.to_bfloat16(values.numpy())
    assert np.array_equal(found, values.bfloat16().view(torch.uint16).numpy())
    nan = engine_module.to_bfloat16(np.array([0x7FFFFFFF], np.uint32).view(np.float32))
    assert torch.from_numpy(nan).view(torch.bfloat16).isnan().all()


def test_weights_that_cannot_be_written_are_taken():
    net = network(dim=16, depth=1, kernel_size=3, patch_size=2)
    weights = {name: array.copy() for name, array in to_arrays(net).items()}
    for array in weights.values():
        array.setflags(write=False)
    pictures = torch.randn(1, 3, 8, 8)
    found = KernelEngine(net.config, weights).run(pictures.numpy())[0]
    assert np.array_equal(found, run(engine_of(net), pictures)[0].numpy())


@pytest.fixture
def shipped():
    """The shipped network, and pictures for it: a batch norm of its magnifies what is wrong 300 times."""
    checkpoint = zoo.load("convmixer_256_8_cifar10")
    picture = preprocess(draw_sample(), checkpoint.preprocessing)
    return build(checkpoint.config, checkpoint.state_dict).eval(), torch.stack(
        [torch.as_tensor(picture), *torch.randn(31, 3, 32, 32)]
    )


@torch.inference_mode()
def test_the_shipped_models_logits(shipped):
    net, pictures = shipped
    assert relative_error(run(engine_of(net), pictures)[0], net(pictures)) < 1e-5


@pytest.mark.parametrize(
    ("precision", "target", "error"),
    [("bfloat16", None, 0.03), ("int8", None, 0.06), ("int8", "-march=x86-64-v3", 0.03)],
)
@torch.inference_mode()
def test_the_shipped_model_in_fewer_bits(precision, target, error, shipped, monkeypatch):
    net, pictures = shipped
    monkeypatch.setattr(engine_module, "load", kernel.load.__wrapped__)
    if target:
        monkeypatch.setattr(compiler, "NATIVE", target)
    try:
        rough = engine_of(net, precision)
    except KernelError as reason:
        pytest.skip(str(reason))
    wanted, found = net(pictures), run(rough, pictures)[0]
    assert 1e-4 < relative_error(found, wanted) < error
    assert found.argmax(1)[0] == wanted.argmax(1)[0]


def test_what_the_processor_lacks_is_named(monkeypatch):
    monkeypatch.setattr(kernel, "processor", lambda: ("avx2", "fma"))
    with pytest.raises(KernelError, match="bfloat16 needs a processor with avx512_bf16, which"):
        kernel.load.__wrapped__(5, "bfloat16")
    with pytest.raises(KernelError, match="kernel_size is 17"):
        kernel.load.__wrapped__(17, "float32")


def test_a_system_that_it_is_not_made_for_is_named(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(KernelError, match="made for Linux and macOS; this is win32"):
        kernel.processor.__wrapped__()


def copy_source(folder: Path, monkeypatch) -> Path:
    """kernel.cpp in a folder of its own, from which it is compiled in this test."""
    folder.mkdir(exist_ok=True)
    for file in (SOURCE, *SOURCE.parent.glob("*.h")):
        shutil.copy(file, folder)
    monkeypatch.setattr(compiler, "SOURCE", folder / SOURCE.name)
    return folder / SOURCE.name


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no room for the output' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-DNOT_COMPILED_BEFORE"))
    monkeypatch.setattr(compiler, "COMPILERS", (str(broken),))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match="failed: no room for the output"):
        kernel.load.__wrapped__(5, "float32")


def test_a_compiled_kernel_is_used_again_unless_others_could_have_written_it(monkeypatch, tmp_path):
    def load(place: str) -> Path:
        """Of the same kernel in a folder of its own."""
        source = copy_source(tmp_path / place, monkeypatch)
        kernel.load.__wrapped__(3, "float32")
        (compiled,) = Path(source.parent, "__pycache__").glob("kernel-float32-3-*.so")
        return compiled

    monkeypatch.setattr("sys.dont_write_bytecode", False)
    monkeypatch.setenv("CONVMIXER_CACHE", os.fspath(tmp_path / "cache"))
    compiled = load("first")
    assert not compiled.stat().st_mode & 0o022
    before = compiled.stat().st_mtime_ns
    assert load("first").stat().st_mtime_ns == before
    for place, mode, content in [("second", 0o666, compiled.read_bytes() + b"x"), ("third", 0o644, b"damaged")]:
        planted = tmp_path / place / "__pycache__" / compiled.name
        planted.parent.mkdir(parents=True)
        planted.write_bytes(content)
        planted.chmod(mode)
        assert load(place).read_bytes() == compiled.read_bytes()


def test_who_wants_no_files_beside_the_source_gets_none(monkeypatch, tmp_path):
    copy_source(tmp_path, monkeypatch)
    monkeypatch.setenv("CONVMIXER_CACHE", os.fspath(tmp_path / "cache"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    kernel.load.__wrapped__(3, "float32")
    assert not Path(tmp_path, "__pycache__").exists()
    assert len(list(Path(tmp_path, "cache", "kernels").glob("kernel-float32-3-*.so"))) == 1


def test_where_nothing_can_be_kept_the_kernel_is_loaded_all_the_same(monkeypatch, tmp_path):
    source = copy_source(tmp_path, monkeypatch)
    source.write_bytes(source.read_bytes() + b"\n// for another test\n")
    for folder in ("__pycache__", "cache"):
        Path(tmp_path, folder).write_text("a file in the place of a folder")
    monkeypatch.setenv("CONVMIXER_CACHE", os.fspath(tmp_path / "cache"))
    assert zoo.cache_dir() == tmp_path / "cache"
    assert kernel.load.__wrapped__(3, "float32").convmixer_lanes() in (4, 8, 16)
