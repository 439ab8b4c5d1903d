"""Half a block in one kernel: in every place against float64's autograd, and compiled for GPUs."""

import re

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu_code import compile_kernel
from convmixer.gpu import halves
from tests.interpreted import (
    ON_GPU,
    PLACES,
    SHAPES,
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


def normed(z: Tensor, gain: Tensor, offset: Tensor, activation: str) -> Tensor:
    """By PyTorch, of a map (C, ...)."""
    z = getattr(nn.functional, activation)(z).transpose(0, 1)
    return nn.functional.batch_norm(z, None, None, gain, offset, True, 0.1, EPS).transpose(0, 1)


# ReLU in float32 shows what is computed; GELU is off by 8e-5 of itself, and more of a sum that nearly vanishes, as
# the bias's gradient; float16 shows that maps are rounded.
CASES = [(case, "relu", torch.float32, 1e-4) for case in SHAPES if case != "one position"]
CASES += [("CIFAR's, patch 2", "gelu", torch.float32, 3e-3), ("CIFAR's, patch 2", "gelu", torch.float16, 5e-3)]


@pytest.mark.parametrize(("case", "activation", "dtype", "limit"), CASES)
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
def test_pytorch_is_told_the_truth(dtype):
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


# Registers and KiB with which an H200 has three programs of eight warps, or four programs, side by side.
COMPILED = [("mix", 90, 255, 32), ("unmix", 90, 255, 32), ("unmix", 89, 255, 32)]
COMPILED += [("norm", 90, 80, 32), ("unnorm", 90, 80, 32), ("strips", 90, 128, 56)]


@needs_disassembler
@pytest.mark.parametrize(("name", "capability", "registers", "kilobytes"), COMPILED)
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
