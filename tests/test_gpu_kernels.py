"""The operators on channel-major maps and their Triton kernels: against float64, and compiled for several GPUs."""

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_code import compile_kernel
from convmixer.gpu import halves, ops
from tests.interpreted import (
    ON_GPU,
    PLACES,
    ROUNDING,
    SHAPES,
    by_channel,
    convolved,
    devices,
    differentiated,
    draw,
    needs_disassembler,
    relative_error,
)

EPS = 1e-5


@pytest.fixture(params=PLACES)
def device(request, monkeypatch):
    yield from devices(request.param, monkeypatch)


def halved(x, taps, bias, scale, shift, activation):
    """A block's first half, by PyTorch."""
    z = convolved(x, taps, bias)
    return getattr(nn.functional, activation)(z) * by_channel(scale) + by_channel(shift) + x


# float16, which is rounded least, shows the most; bfloat16 takes the same way through the kernels.
IN_BOTH = [("CIFAR's, patch 2", torch.bfloat16), *((case, torch.float16) for case in SHAPES)]


@torch.no_grad()
@pytest.mark.parametrize(("case", "dtype"), IN_BOTH)
@pytest.mark.parametrize("strips", [False, True])
def test_the_first_half_of_a_block(device, strips, case, dtype, monkeypatch):
    monkeypatch.setattr(ops, "STRIPS", strips)
    arguments, activation = draw(case, dtype, device), "relu" if case.startswith("sides") else "gelu"
    found = ops.mix_positions(*arguments, activation)
    assert found.dtype == dtype and found.is_contiguous()
    wanted = halved(*(each.cpu().double() for each in arguments), activation)
    assert relative_error(found, wanted) < ROUNDING[dtype]


@pytest.mark.parametrize(("case", "dtype"), IN_BOTH)
def test_the_convolution_and_its_gradients(device, case, dtype):
    x, taps, bias, *_ = draw(case, dtype, device)
    found, wanted = differentiated((ops.depthwise, convolved), (x, taps, bias))
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, torch.float32]
    # Products of 16-bit numbers are exact in float32; only sums round.
    for one, other, limit in zip(found, wanted, [ROUNDING[dtype]] * 2 + [2e-6] * 2, strict=True):
        assert relative_error(one, other) < limit


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activation_and_norm(device, activation):
    x, _, bias, scale, shift = draw("sides that are no multiple of a tile", torch.float16, device)
    x[0, 0, 0, 0] = torch.nan
    found = ops.activate(x, bias, scale, shift, activation)
    value = getattr(nn.functional, activation)(x.double() + by_channel(bias))
    wanted = (value * by_channel(scale) + by_channel(shift)).cpu()
    assert torch.equal(found.isnan(), x.isnan())
    assert relative_error(found[1:], wanted[1:]) < ROUNDING[torch.float16]


@pytest.mark.parametrize("device", PLACES[1:2], indirect=True)
@pytest.mark.parametrize("strips", [False, True])
def test_gelu_is_right_in_its_tail_too(device, strips, monkeypatch):
    monkeypatch.setattr(ops, "STRIPS", strips)
    x, one = torch.linspace(-9, 9, 2048, device=device).view(1, 2, 32, 32), torch.ones(1, device=device)
    large = one * 2.0**90  # beside what is so large the residual is nothing
    found = ops.mix_positions(x, one[:, None, None], one * 0, large, one * 0, "gelu").double() / large
    wanted = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    assert ((found - wanted).abs() <= 1e-4 * wanted.abs()).all()


@pytest.mark.parametrize("device", PLACES[::2], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_is_told_the_truth(device, dtype):
    """Schema, shapes, strides and dtypes without computing, gradients under torch.compile: PyTorch's own checks."""
    x, taps, *vectors = draw("one position", dtype, device)
    transposed = x.transpose(0, 1)  # not contiguous
    torch.library.opcheck(ops.depthwise, (transposed, taps, vectors[0]))
    with torch.no_grad():
        torch.library.opcheck(ops.depthwise_taps, (x, x, 5))
        torch.library.opcheck(ops.mix_positions, (x, taps, *vectors, "gelu"))
        torch.library.opcheck(ops.activate, (x, *vectors, "relu"))


@torch.no_grad()
def test_no_pictures(device):
    x, taps, *vectors = draw("CIFAR's, patch 2", torch.float16, device)
    none = x[:, :0]
    assert ops.mix_positions(none, taps, *vectors, "gelu").shape == none.shape
    assert ops.activate(none, *vectors, "gelu").shape == none.shape
    assert ops.depthwise_taps(none, none, 5).count_nonzero() == 0


def normed(z: Tensor, gain: Tensor, offset: Tensor, activation: str) -> Tensor:
    """By PyTorch, of a map (C, ...)."""
    z = getattr(nn.functional, activation)(z).transpose(0, 1)
    return nn.functional.batch_norm(z, None, None, gain, offset, True, 0.1, EPS).transpose(0, 1)


# ReLU in float32 shows what is computed; GELU is off by 8e-5 of itself, and more of a sum that nearly vanishes, as
# the bias's gradient; float16 shows that maps are rounded.
HALVES = [(case, "relu", torch.float32, 1e-4) for case in SHAPES if case != "one position"]
HALVES += [("CIFAR's, patch 2", "gelu", torch.float32, 3e-3), ("CIFAR's, patch 2", "gelu", torch.float16, 5e-3)]


@pytest.mark.parametrize(("case", "activation", "dtype", "limit"), HALVES)
def test_the_first_half_and_its_gradients(device, case, activation, dtype, limit):
    def exact(x, taps, bias, gain, offset):
        return normed(convolved(x, taps, bias), gain, offset, activation) + x

    def mix(*arguments):
        return halves.mix(*arguments, EPS, activation)[0]

    found, wanted = differentiated((mix, exact), draw(case, dtype, device))
    assert [each.dtype for each in found] == [dtype] * 2 + [torch.float32] * 4
    assert all(relative_error(one, other) < limit for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("activation", "positions"), [("gelu", 700), ("relu", 9000)])  # less than a block, and several
def test_the_second_half_and_its_gradients(device, activation, positions):
    def exact(z, bias, gain, offset):
        return normed(z + bias[:, None], gain, offset, activation)

    def norm(*arguments):
        return halves.norm(*arguments, EPS, activation)[0]

    torch.manual_seed(0)
    inputs = torch.randn(3, positions, device=device), *torch.randn(3, 3, device=device).unbind()
    found, wanted = differentiated((norm, exact), tuple(each.requires_grad_() for each in inputs))
    assert all(relative_error(one, other) < 1e-3 for one, other in zip(found, wanted, strict=True))


def test_a_large_mean_costs_no_digits(device):
    """The variance is 1e-7 of the mean's square: sums of squares in float32 would leave nothing of it."""
    torch.manual_seed(0)
    x, one = torch.randn(2, 2, 16, 16, device=device) + 3000, torch.ones(2, device=device)
    vectors, taps = (one * 0, one, one * 0, EPS, "relu"), torch.zeros(2, 3, 3, device=device)
    taps[:, 1, 1] = 1
    for found in (halves.norm(x.flatten(1), *vectors), halves.mix(x, taps, *vectors)):
        assert relative_error(found[-2], x.double().mean((1, 2, 3)).cpu()) < 1e-4
        assert relative_error(found[-1], x.double().var((1, 2, 3), correction=0).cpu()) < 1e-4
    x[:, 0, 3, 3] = torch.nan  # and what is no number is not hidden
    assert halves.norm(x.flatten(1), *vectors)[0].isnan().all() and halves.mix(x, taps, *vectors)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pytorch_is_told_the_truth_of_the_halves(dtype):
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 2, 5, 4).to(dtype).requires_grad_()
    taps, vectors = torch.randn(2, 3, 3, dtype=wide).requires_grad_(), torch.rand(3, 2, dtype=wide) + 0.5
    vectors = [each.requires_grad_() for each in vectors.unbind()]
    torch.library.opcheck(halves.mix, (x, taps, *vectors, EPS, "gelu"))
    torch.library.opcheck(halves.norm, (x.flatten(1).detach().requires_grad_(), *vectors, EPS, "relu"))


@ON_GPU
def test_the_same_bits_a_hundred_times():
    """A loop that read before the one ahead of it had written would give others now and then."""
    torch.manual_seed(0)
    x, taps = torch.randn(300, 64, 32, 32, device="cuda").bfloat16(), torch.randn(300, 9, 9, device="cuda") / 9
    inputs = [each.requires_grad_() for each in (x, taps, *torch.randn(3, 300, device="cuda").unbind())]
    wanted = None
    for _ in range(100):
        y, *_ = halves.mix(*inputs, EPS, "gelu")
        found = y, *torch.autograd.grad(y, inputs, x)
        wanted = wanted or found
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_the_kernels_are_for_gpus_16_bits_and_up_to_9_x_9():
    assert not ops.triton_runs(torch.zeros(1, dtype=torch.bfloat16))
    if torch.cuda.is_available():
        x = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
        assert ops.triton_runs(x, 9) == (torch.cuda.get_device_capability()[0] >= 8)
        assert not ops.triton_runs(x, 11) and not ops.triton_runs(x.float(), 9)


def test_where_triton_fails_pytorch_is_used(monkeypatch, python):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.warns(UserWarning, match="Triton cannot be used .*; PyTorch's operators are"):
        assert not ops._triton_works.__wrapped__(99)  # which is not there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not ops._triton_works.__wrapped__(0)
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch\n"
        "from convmixer.gpu import halves, ops\n"
        "assert ops.kernels is None and halves.fused is None\n"
        "x = torch.ones(2, 1, 4, 4, dtype=torch.bfloat16)\n"
        "print(ops.depthwise(x, torch.ones(2, 3, 3), torch.zeros(2)).sum().item())\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "200.0"), done.stderr


@ON_GPU
def test_maps_of_more_than_2_31_elements():
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("this GPU has less than 16 GB free")
    x = torch.randn(40, 60, 960, 960, device="cuda", dtype=torch.float16)
    taps, bias = torch.randn(40, 3, 3, device="cuda"), torch.randn(40, device="cuda")
    last = convolved(x[-1:, -1:].double(), taps[-1:].half().double(), bias[-1:].double()).cpu()
    assert relative_error(ops.depthwise(x, taps, bias)[-1:, -1:], last) < ROUNDING[torch.float16]


# What a program may have: shared memory of an A100, an RTX 3090 or 4090, an H100 or H200, and a B200.
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB
COMPILED = [("convolve", 9, capability, "gelu") for capability in SHARED]
COMPILED += [("convolve", 5, 80, ""), ("differentiate", 9, 89, ""), ("differentiate", 9, 90, "")]
COMPILED += [("activate", 9, 90, "gelu"), ("differentiate", 9, 100, "")]


@needs_disassembler
@pytest.mark.parametrize(("name", "kernel_size", "capability", "activation"), COMPILED)
def test_they_fit_every_gpu(name, kernel_size, capability, activation):
    code = compile_kernel(name, kernel_size, capability, activation)
    assert code.spilled <= 32 and code.shared <= SHARED[capability] * 1024 and bool(code.matrix) == (name != "activate")
    if capability == 90 and code.matrix:  # as they were measured
        assert code.spilled == 0 and "wgmma.mma_async" in code.ptx
        # Windows are read 8 bytes at a time, but not where the compiler cannot see that they are aligned.
        assert "cp.async.ca.shared.global [" in code.ptx and "ld.global.b16" not in code.ptx


# Registers and KiB with which an H200 has three programs of eight warps, or four programs, side by side.
FUSED = [("mix", 90, 255, 32), ("unmix", 90, 255, 32), ("unmix", 89, 255, 32)]
FUSED += [("norm", 90, 80, 32), ("unnorm", 90, 80, 32), ("strips", 90, 128, 56)]


@needs_disassembler
@pytest.mark.parametrize(("name", "capability", "registers", "kilobytes"), FUSED)
def test_they_fit(name, capability, registers, kilobytes):
    code = compile_kernel(name, 9, capability)
    assert code.spilled <= (32 if "mix" in name else 0)
    assert code.registers <= registers and code.shared <= kilobytes * 1024
    assert bool(code.matrix) == ("norm" not in name)
    vectors = {"mix": 2, "unmix": 3}.get(name)  # that are written between the loops, before a barrier: the
    if vectors:  # interpreter, with its one thread, would not miss it
        order = re.findall(r"st\.global\.b32|bar\.sync|ld\.global|st\.global\.v", code.ptx)
        last = len(order) - order[::-1].index("st.global.b32")
        assert order[last - vectors : last + 1] == ["st.global.b32"] * vectors + ["bar.sync"]
