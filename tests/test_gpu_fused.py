"""Half a block in one kernel: interpreted and on a GPU against float64's autograd, and compiled for GPUs."""

import copy
import re
import sys

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="PyTorch comes without Triton here")

from benchmarks.gpu_code import compile_kernel
from convmixer.gpu import fused as compiled_kernels
from convmixer.gpu import halves, ops
from convmixer.gpu import strips as compiled_strips
from convmixer.model import ConvMixer, ConvMixerConfig
from tests.interpreted import load_interpreted_kernels
from tests.test_gpu_kernels import (
    ON_GPU,
    ROUNDING,
    SHAPES,
    SHARED,
    by_channel,
    convolved,
    draw,
    needs_disassembler,
    relative_error,
)
from train.distributed import SyncBatchNorm2d, use_sync_norm
from train.speed.channel_major import use_channel_major

EPS = 1e-5


@pytest.fixture(params=["interpreter", pytest.param("GPU", marks=ON_GPU)])
def kernels(request, monkeypatch):
    """Calls a function of the kernels' module with tensors on the CPU, where its results are, too."""
    on_gpu = request.param == "GPU"
    fused = compiled_kernels if on_gpu else load_interpreted_kernels(monkeypatch, "fused")
    strips = compiled_strips if on_gpu else sys.modules["interpreted.strips"]

    def call(name: str, *arguments) -> Tensor | tuple[Tensor, ...]:
        arguments = [a.to("cuda") if on_gpu and isinstance(a, Tensor) else a for a in arguments]
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
        try:
            found = strips.convolve(*arguments) if name == "convolve" else getattr(fused, name)(*arguments)
            return found.cpu() if isinstance(found, Tensor) else tuple(each.cpu() for each in found)
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def normed(z: Tensor, gain: Tensor, offset: Tensor, activation: str) -> Tensor:
    """By PyTorch, of a map whose second axis is the channel's."""
    return nn.functional.batch_norm(getattr(nn.functional, activation)(z), None, None, gain, offset, True, 0.1, EPS)


def differentiated(function, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The function's result in float64, and its inputs' gradients."""
    exact = [each.double().requires_grad_() for each in inputs]
    result = function(*exact)
    return result.detach(), list(torch.autograd.grad(result, exact, grad.double()))


def mixed(activation: str):
    def function(x: Tensor, taps: Tensor, bias: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
        pad, pictures = taps.shape[-1] // 2, x.transpose(0, 1)
        z = nn.functional.conv2d(pictures, taps[:, None], bias, padding=pad, groups=len(x))
        return normed(z, gain, offset, activation).transpose(0, 1) + x

    return function


def close(found: tuple[Tensor, ...], wanted: list[Tensor], limit: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.isfinite().all()
        assert (one.double() - other).norm() <= limit * other.norm()


# ReLU in float32 shows what is computed; GELU is off by 8e-5 of itself, and more of a sum that nearly vanishes, as
# the bias's gradient; float16 shows that maps are rounded.
CASES = [(case, "relu", torch.float32, 1e-4) for case in SHAPES if case != "one position"]
CASES += [(case, "gelu", torch.float32, 3e-3) for case in ("ImageNet's 1536/20", "CIFAR's, patch 2")]
CASES += [("CIFAR's, patch 2", "gelu", torch.float16, 5e-3)]


@pytest.mark.parametrize(("case", "activation", "dtype", "limit"), CASES)
def test_the_first_half_and_its_gradients(kernels, case, activation, dtype, limit):
    x, *vectors = draw(*SHAPES[case], dtype)
    grad = torch.randn(x.shape).to(dtype)
    wanted, gradients = differentiated(mixed(activation), (x, *vectors), grad)
    y, z, mean, variance = kernels("mix", x, *vectors, EPS, activation)
    close((y,), [wanted], limit)
    taps, _, gain, _ = vectors
    found = kernels("unmix", grad, x, z, taps, gain, mean, variance, EPS, activation)
    assert [each.dtype for each in (y, z, *found)] == [dtype] * 3 + [torch.float32] * 4
    close(found, gradients, limit)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("positions", [2, 700, 9000])  # less than a block, and several
def test_the_second_half_and_its_gradients(kernels, activation, positions):
    torch.manual_seed(0)
    z, grad = torch.randn(2, 3, positions)
    bias, gain, offset = torch.randn(3, 3).unbind()

    def function(z, bias, gain, offset):
        return normed((z + bias[:, None])[None], gain, offset, activation)[0]

    wanted, gradients = differentiated(function, (z, bias, gain, offset), grad)
    y, *moments = kernels("norm", z, bias, gain, offset, EPS, activation)
    found = kernels("unnorm", grad, z, bias, gain, *moments, EPS, activation)
    if positions == 2:  # two values are always normalised to the same: their gradients are what rounding leaves
        found, gradients = found[2:], gradients[2:]
    close((y, *found), [wanted, *gradients], 1e-3)


def test_a_large_mean_costs_no_digits(kernels):
    """The variance is 1e-7 of the mean's square: sums of squares in float32 would leave nothing of it."""
    torch.manual_seed(0)
    z, one, zero = torch.randn(2, 5000) + 3000, torch.ones(2), torch.zeros(2)
    _, mean, variance = kernels("norm", z, zero, one, zero, EPS, "relu")
    close((mean, variance), [z.double().mean(1), z.double().var(1, correction=0)], 1e-4)
    x = (torch.randn(2, 2, 16, 16) + 3000).float()
    taps = torch.zeros(2, 3, 3)
    taps[:, 1, 1] = 1
    _, _, mean, variance = kernels("mix", x, taps, zero, one, zero, EPS, "relu")
    close((mean, variance), [x.double().mean((1, 2, 3)), x.double().var((1, 2, 3), correction=0)], 1e-4)


def test_what_is_no_number_is_not_hidden(kernels):
    x, taps, vector = torch.ones(1, 1, 8, 8), torch.ones(1, 3, 3), torch.ones(1)
    x[0, 0, 3, 3] = float("nan")
    assert kernels("mix", x, taps, vector, vector, vector, EPS, "gelu")[0].isnan().all()
    assert kernels("norm", x.flatten(1), vector, vector, vector, EPS, "relu")[0].isnan().all()


@pytest.mark.parametrize("case", SHAPES)
def test_inference_with_fewer_products(kernels, case):
    x, taps, bias, scale, shift = draw(*SHAPES[case], torch.float16)
    wanted = nn.functional.gelu(convolved(x, taps, bias)) * by_channel(scale) + by_channel(shift) + x.double()
    found = kernels("convolve", x, taps, bias, "gelu", scale, shift)
    assert found.dtype == torch.float16 and relative_error(found, wanted) < ROUNDING[torch.float16]


def test_gelu_with_one_exponential(kernels):
    x, one, large = torch.linspace(-9, 9, 2048).view(1, 2, 32, 32), torch.ones(1), torch.full((1,), 2.0**90)
    found = kernels("convolve", x, one[:, None, None], one * 0, "gelu", large, one * 0).double() / 2.0**90
    wanted = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2  # beside which the residual is nothing now
    assert ((found - wanted).abs() <= 1e-4 * wanted.abs()).all()


def test_fewer_products_are_taken_where_they_are_asked_for(monkeypatch):
    x, taps, bias, scale, shift = draw((2, 1, 8, 8), 3, torch.float16)
    load_interpreted_kernels(monkeypatch, "strips")
    monkeypatch.setattr(ops, "strips", sys.modules["interpreted.strips"])
    monkeypatch.setattr(ops, "kernels", sys.modules["interpreted.kernels"])
    monkeypatch.setattr(ops, "triton_runs", lambda *arguments: True)
    found = []
    for asked in (False, True):
        monkeypatch.setattr(ops, "STRIPS", asked)
        found.append(ops.mix_positions(x, taps, bias, scale, shift, "gelu"))
    monkeypatch.delattr(ops, "strips")  # and by default they are not
    monkeypatch.setattr(ops, "STRIPS", False)
    assert torch.equal(ops.mix_positions(x, taps, bias, scale, shift, "gelu"), found[0])
    assert torch.allclose(*found, atol=5e-3)


def test_the_network_trains_through_the_kernels(monkeypatch):
    """The kernels' gradients are wired to the parameters, and running statistics follow."""
    torch.manual_seed(0)
    network = ConvMixer(ConvMixerConfig(dim=4, depth=2, kernel_size=5, patch_size=2, num_classes=3))
    other, x = copy.deepcopy(network), torch.randn(3, 3, 16, 16)
    use_channel_major(other, fused=True)
    called = []
    interpreted = load_interpreted_kernels(monkeypatch, "fused")
    monkeypatch.setattr(halves, "fused", interpreted)
    monkeypatch.setattr(halves, "triton_runs", lambda *arguments: called.append(arguments) or True)
    for each in (other, network):
        for _ in range(2):  # two parts of a step: gradients add up
            each(x).square().sum().backward()
    assert len(called) == 2 * 2 * 5  # forward and back: the stem and two halves of two blocks
    for (name, wanted), found in zip(network.named_parameters(), other.parameters(), strict=True):
        assert (found.grad - wanted.grad).norm() <= 5e-3 * wanted.grad.norm() + 1e-5, name
    for (name, wanted), found in zip(network.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5), name
    called.clear()
    assert torch.allclose(other.eval()(x), network.eval()(x), atol=1e-3)
    use_sync_norm(other.train())
    assert isinstance(other.stem[2], SyncBatchNorm2d)
    monkeypatch.setattr(SyncBatchNorm2d, "forward", nn.BatchNorm2d.forward)  # which needs no other process
    other(x)
    assert not called  # evaluation and synchronised batch norm go today's way


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pytorch_is_told_the_truth(dtype):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 2, 5, 4).to(dtype).requires_grad_()
    taps, vectors = torch.randn(2, 3, 3, dtype=wide).requires_grad_(), torch.rand(3, 2, dtype=wide) + 0.5
    vectors = [each.requires_grad_() for each in vectors.unbind()]
    torch.library.opcheck(halves.mix, (x, taps, *vectors, EPS, "gelu"))
    torch.library.opcheck(halves.norm, (x.flatten(1).detach().requires_grad_(), *vectors, EPS, "relu"))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda *a: halves.mix(*a, EPS, "gelu")[0], (x, taps, *vectors))
        assert torch.autograd.gradcheck(lambda *a: halves.mix(*a, EPS, "relu")[0], (x, taps, *vectors))


@ON_GPU
@pytest.mark.parametrize("name", ["mix", "unmix"])
def test_the_same_bits_a_hundred_times(name):
    """A loop that read before the one ahead of it had written would give others now and then."""
    x, taps, bias, gain, offset = (each.cuda() for each in draw((300, 64, 32, 32), 9, torch.bfloat16))
    forward = compiled_kernels.mix(x, taps, bias, gain, offset, EPS, "gelu")
    backward = compiled_kernels.unmix(x, x, *forward[1:2], taps, gain, *forward[2:], EPS, "gelu")
    for _ in range(100):
        if name == "mix":
            found, wanted = compiled_kernels.mix(x, taps, bias, gain, offset, EPS, "gelu"), forward
        else:
            found = compiled_kernels.unmix(x, x, forward[1], taps, gain, *forward[2:], EPS, "gelu")
            wanted = backward
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@needs_disassembler
@pytest.mark.parametrize(("kernel_size", "capability"), [*((9, each) for each in SHARED), (5, 90)])
def test_they_fit_every_gpu(kernel_size, capability):
    for name in ("mix", "unmix"):
        code = compile_kernel(name, kernel_size, capability)
        assert code.spilled <= 32 and code.shared <= 32 * 1024 and code.matrix


@needs_disassembler
@pytest.mark.parametrize("name", ["norm", "unnorm"])
def test_the_second_half_fits_too(name):
    code = compile_kernel(name, 9, 90)
    assert code.spilled == 0 and code.registers <= 80  # three programs of eight warps a multiprocessor


@needs_disassembler
def test_fewer_products_need_little_of_a_multiprocessor():
    code = compile_kernel("strips", 9, 90)
    assert code.spilled == 0 and code.registers <= 128 and code.shared <= 227 * 1024 // 4  # four programs side by side
    assert code.loop.total() < 0.9 * compile_kernel("convolve", 9, 90).loop.total() and "wgmma.mma_async" in code.ptx


@needs_disassembler
def test_between_the_loops_stands_a_barrier():
    """Which the interpreter, with its one thread, would not miss."""
    for name, vectors in (("mix", 2), ("unmix", 3)):  # what the program writes before it
        order = re.findall(r"st\.global\.b32|bar\.sync|ld\.global|st\.global\.v", compile_kernel(name, 9, 90).ptx)
        last = len(order) - order[::-1].index("st.global.b32")
        assert order[last - vectors : last + 1] == ["st.global.b32"] * vectors + ["bar.sync"]
