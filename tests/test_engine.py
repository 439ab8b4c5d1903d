"""The network through the compiled kernel, against the network through PyTorch's operators."""

import itertools
import os
import threading
from pathlib import Path

import pytest
import torch

from convmixer import Classifier, ConvMixer, ConvMixerConfig, zoo
from convmixer.cpu import engine as engine_module
from convmixer.cpu import kernel
from convmixer.cpu.engine import Engine, KernelError
from convmixer.sample import draw_sample
from tests.networks import CASES, network, relative_error

try:
    kernel.load(5, "float32")
except KernelError as reason:
    pytest.skip(str(reason), allow_module_level=True)


@pytest.fixture
def threads():
    """Sets the number of threads, for this test only."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def avx2(monkeypatch):
    """The kernel as a processor without AVX-512 compiles it."""
    monkeypatch.setattr(kernel, "OPTIONS", (*kernel.OPTIONS, "-mno-avx512f"))
    monkeypatch.setattr(engine_module, "load", kernel.load.__wrapped__)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_and_features_are_the_networks(case, threads):
    config, sides = CASES[case]
    net = network(**config)
    engine = Engine(net)
    for count, workers in [(1, 1), (1, 3), (2, 2), (11, 2)]:
        threads(workers)
        pictures = torch.randn(count, net.config.in_chans, *sides)
        wanted = net.double()(pictures.double())
        wanted_features = net.forward_features(pictures.double())
        net.float()
        logits, features = engine.with_features(pictures)
        assert features.shape == wanted_features.shape and logits.dtype == features.dtype == torch.float32
        assert relative_error(logits, wanted) < 1e-5 and relative_error(features, wanted_features) < 1e-5
        assert torch.equal(engine(pictures), logits)


@pytest.mark.parametrize("case", ["the shipped one's", "a width that fills no vector", "a kernel larger than the map"])
@torch.inference_mode()
def test_without_avx_512(case, avx2):
    config, sides = CASES[case]
    net = network(**config)
    engine = Engine(net)
    assert engine._library.convmixer_lanes() == 8
    pictures = torch.randn(3, 3, *sides)
    assert relative_error(engine(pictures), net(pictures)) < 1e-5


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
    _, found = Engine(net).with_features(values.view(1, 1, 1, -1))
    gelu = torch.nn.functional.gelu
    error = (found.flatten().double() - gelu(gelu(values.double()))).abs()
    assert error[:-7].max() < 3e-6  # PyTorch's own twice in float32: 2.3e-6
    assert not error[-7:].any()


@torch.inference_mode()
def test_a_picture_gives_the_same_bits_in_any_company(threads):
    net = network(dim=48, depth=3, kernel_size=5, patch_size=2)
    engine = Engine(net)
    pictures = torch.randn(20, 3, 26, 26)
    together = engine.with_features(pictures)[1]
    for workers, index in itertools.product((1, 2, 3), (0, 7, 19)):
        threads(workers)
        assert torch.equal(engine.with_features(pictures[index : index + 1])[1][0], together[index])


@torch.inference_mode()
def test_threads_share_an_engine():
    net = network(dim=64, depth=3, kernel_size=5, patch_size=2)
    engine = Engine(net)
    inputs = [torch.randn(1 + index % 3, 3, 20 + 2 * index, 30) for index in range(8)]
    wanted = [engine.with_features(pictures)[1] for pictures in inputs]
    wrong = []

    @torch.inference_mode()
    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(engine.with_features(inputs[index])[1], wanted[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_pictures_of_a_wrong_shape_are_named():
    engine = Engine(network(dim=8, depth=1, kernel_size=3, patch_size=4))
    for shape in [(3, 8, 8), (1, 1, 8, 8), (1, 3, 8, 3)]:
        with pytest.raises(ValueError, match=r"the pictures have the shape .*; it must be \(N, 3, H, W\)"):
            engine(torch.zeros(shape))
    with torch.inference_mode():
        assert engine(torch.zeros(0, 3, 8, 8)).shape == (0, 1000)


@torch.inference_mode()
def test_weights_that_are_not_finite_stay_visible():
    net = network(dim=16, depth=1, kernel_size=3, patch_size=2)
    pictures = torch.randn(1, 3, 8, 8)
    pictures[0, 0, 0, 0] = torch.nan
    assert Engine(net)(pictures).isnan().all()


@torch.inference_mode()
def test_the_shipped_models_logits():
    # Its batch norms magnify what is wrong up to 800 times, and GELU's inputs go down to -1,048.
    classifier = Classifier("convmixer_256_8_cifar10", device="cpu")
    pictures = torch.stack([classifier.prepare(draw_sample()), *torch.randn(31, 3, 32, 32)])
    assert relative_error(classifier.logits(pictures), classifier.network(pictures)) < 1e-5


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.03), ("int8", 0.06)])
@torch.inference_mode()
def test_the_shipped_model_in_fewer_bits(precision, error):
    name = "convmixer_256_8_cifar10"
    try:
        rough = Classifier(name, device="cpu", precision=precision)
    except ValueError as reason:
        pytest.skip(str(reason))
    exact = Classifier(name, device="cpu")
    pictures = [exact.prepare(draw_sample()), *torch.randn(15, 3, 32, 32)]
    wanted, found = exact.logits(pictures), rough.logits(pictures)
    assert 1e-4 < relative_error(found, wanted) < error
    assert found.argmax(1)[0] == wanted.argmax(1)[0]


def test_without_a_compiler_pytorch_answers(random_checkpoint, picture, monkeypatch):
    file = str(random_checkpoint())
    with_engine = Classifier(file, device="cpu")
    assert with_engine.engine
    monkeypatch.setattr(kernel, "OPTIONS", (*kernel.OPTIONS, "-DNOT_COMPILED_BEFORE"))
    monkeypatch.setattr(engine_module, "load", kernel.load.__wrapped__)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    without = Classifier(file, device="cpu")
    assert without.engine is None
    pictures = [picture(seed=seed) for seed in range(3)]
    assert torch.allclose(without.logits(pictures), with_engine.logits(pictures), atol=1e-5)
    heatmap, wanted = without.heatmap(pictures[0]), with_engine.heatmap(pictures[0])
    assert heatmap.index == wanted.index and abs(heatmap.values - wanted.values).max() < 1e-5
    monkeypatch.setattr(kernel, "_cpu_flags", lambda: ("avx2", "fma", "avx512_vnni"))
    with pytest.raises(
        ValueError, match=r"precision 'int8' cannot be used \(the CPU kernel cannot be compiled; install"
    ):
        Classifier(file, device="cpu", precision="int8")


def test_what_the_processor_lacks_is_named(monkeypatch):
    monkeypatch.setattr(kernel, "_cpu_flags", lambda: ("avx2", "fma"))
    with pytest.raises(KernelError, match="bfloat16 needs a processor with avx512_bf16, which"):
        kernel.load.__wrapped__(5, "bfloat16")
    with pytest.raises(KernelError, match="kernel_size is 17"):
        kernel.load.__wrapped__(17, "float32")


def test_an_unknown_precision_is_named(monkeypatch):
    with pytest.raises(ValueError, match="precision is 'int4'; it must be one of float32, bfloat16, int8"):
        Classifier(precision="int4")
    monkeypatch.setenv("CONVMIXER_PRECISION", "int2")
    with pytest.raises(ValueError, match="precision is 'int2'"):
        Classifier()
    assert Classifier(precision="float32").engine


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'no room for the output' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(kernel, "OPTIONS", (*kernel.OPTIONS, "-DNOT_COMPILED_BEFORE"))
    monkeypatch.setattr(kernel, "COMPILERS", (str(compiler),))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match="failed: no room for the output"):
        kernel.load.__wrapped__(5, "float32")


def test_a_compiled_kernel_is_used_again_unless_others_could_have_written_it(monkeypatch, tmp_path):
    def load(place: str) -> Path:
        """Of the same kernel in a folder of its own."""
        source = tmp_path / place / "kernel.cpp"
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(kernel.SOURCE.read_bytes())
        monkeypatch.setattr(kernel, "SOURCE", source)
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
    source = tmp_path / "kernel.cpp"
    source.write_bytes(kernel.SOURCE.read_bytes())
    monkeypatch.setattr(kernel, "SOURCE", source)
    monkeypatch.setenv("CONVMIXER_CACHE", os.fspath(tmp_path / "cache"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    kernel.load.__wrapped__(3, "float32")
    assert not Path(tmp_path, "__pycache__").exists()
    assert len(list(Path(tmp_path, "cache", "kernels").glob("kernel-float32-3-*.so"))) == 1


def test_where_nothing_can_be_kept_the_kernel_is_loaded_all_the_same(monkeypatch, tmp_path):
    source = tmp_path / "kernel.cpp"
    source.write_bytes(kernel.SOURCE.read_bytes() + b"\n// for another test\n")
    for folder in ("__pycache__", "cache"):
        Path(tmp_path, folder).write_text("a file in the place of a folder")
    monkeypatch.setattr(kernel, "SOURCE", source)
    monkeypatch.setenv("CONVMIXER_CACHE", os.fspath(tmp_path / "cache"))
    assert zoo.cache_dir() == tmp_path / "cache"
    assert kernel.load.__wrapped__(3, "float32").convmixer_lanes() in (8, 16)
