"""The Triton kernels: in the interpreter against float64, compiled for several GPUs, and on a GPU if there is one."""

import shutil

import pytest
import torch
from torch import Tensor, nn

triton = pytest.importorskip("triton", reason="PyTorch comes without Triton here")

from benchmarks.gpu_code import compile_kernel  # noqa: E402
from convmixer.gpu import kernels as compiled_kernels  # noqa: E402
from tests.interpreted import load_interpreted_kernels  # noqa: E402

# What one rounding to the dtype may do to a number. The interpreter cuts bfloat16 off, where a GPU rounds.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["interpreter", pytest.param("GPU", marks=ON_GPU)])
def kernels(request, monkeypatch):
    """Calls a function of the kernels' module with tensors on the CPU, where its result is, too."""
    on_gpu = request.param == "GPU"
    module = compiled_kernels if on_gpu else load_interpreted_kernels(monkeypatch)

    def call(name: str, *arguments) -> Tensor:
        arguments = [a.to("cuda") if on_gpu and isinstance(a, Tensor) else a for a in arguments]
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
        try:
            return getattr(module, name)(*arguments).cpu()
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def draw(shape: tuple[int, int, int, int], kernel_size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, taps, bias, scale and shift; taps that the dtype holds exactly, so that all rounding is of the result."""
    torch.manual_seed(0)
    taps = torch.randn(shape[0], kernel_size, kernel_size) / kernel_size
    return torch.randn(shape).to(dtype), taps.to(dtype).float(), *torch.randn(3, shape[0]).unbind()


def by_channel(vector: Tensor) -> Tensor:
    return vector.double().view(-1, 1, 1, 1)


def convolved(x: Tensor, taps: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float64, by PyTorch."""
    x, pad = x.double().transpose(0, 1), taps.shape[-1] // 2
    bias = None if bias is None else bias.double()
    return nn.functional.conv2d(x, taps.double().unsqueeze(1), bias, padding=pad, groups=x.shape[1]).transpose(0, 1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.isfinite().all()
    return float((found.double() - wanted).norm() / wanted.norm())


# (C, N, H, W) and the side of the kernel
SHAPES = {
    "ImageNet's 1536/20": ((2, 2, 32, 32), 9),
    "ImageNet's 768/32, one picture": ((3, 1, 32, 32), 7),
    "ImageNet's 1024/20": ((2, 3, 16, 16), 9),
    "CIFAR's, patch 2": ((2, 3, 16, 16), 5),
    "sides that are no multiple of a tile": ((3, 2, 7, 13), 7),
    "programs that share a channel": ((1, 13, 31, 33), 3),
    "one position": ((2, 2, 1, 1), 9),
    "no mixing in space": ((2, 1, 9, 10), 1),
}


# float16, which is rounded least, shows the most; bfloat16 takes the same way through the kernels.
IN_BOTH = [("CIFAR's, patch 2", torch.bfloat16), *((case, torch.float16) for case in SHAPES)]


@pytest.mark.parametrize(("case", "dtype"), IN_BOTH)
def test_the_first_half_of_a_block(kernels, case, dtype):
    x, taps, bias, scale, shift = draw(*SHAPES[case], dtype)
    wanted = nn.functional.gelu(convolved(x, taps, bias)) * by_channel(scale) + by_channel(shift) + x.double()
    found = kernels("convolve", x, taps, bias, "gelu", scale, shift)
    assert found.dtype == dtype
    assert relative_error(found, wanted) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_convolution_alone_and_with_relu(kernels, dtype):
    x, taps, bias, scale, shift = draw((3, 2, 7, 13), 7, dtype)
    wanted = convolved(x, taps, bias)
    assert relative_error(kernels("convolve", x, taps, bias), wanted) < ROUNDING[dtype]
    wanted = nn.functional.relu(wanted) * by_channel(scale) + by_channel(shift) + x.double()
    assert relative_error(kernels("convolve", x, taps, bias, "relu", scale, shift), wanted) < ROUNDING[dtype]


@pytest.mark.parametrize(("case", "dtype"), IN_BOTH)
def test_the_gradient_of_the_taps(kernels, case, dtype):
    shape, kernel_size = SHAPES[case]
    x, taps, *_ = draw(shape, kernel_size, dtype)
    grad = torch.randn(shape).to(dtype)
    taps = taps.double().requires_grad_()
    (wanted,) = torch.autograd.grad(convolved(x, taps), taps, grad.double())
    found = kernels("tap_gradient", x, grad, kernel_size)
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) < 1e-6  # products of 16-bit numbers are exact in float32; only sums round
    assert torch.equal(found, kernels("tap_gradient", x, grad, kernel_size))  # no order but one


def test_no_pictures(kernels):
    x, taps, vector = torch.empty(3, 0, 8, 8, dtype=torch.float16), torch.ones(3, 5, 5), torch.ones(3)
    assert kernels("convolve", x, taps, vector, "gelu", vector, vector).shape == x.shape
    assert kernels("activate", x, vector, vector, vector, "gelu").shape == x.shape
    assert kernels("tap_gradient", x, x, 5).count_nonzero() == 0


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activation_and_norm(kernels, activation):
    x, _, bias, scale, shift = draw((5, 3, 21, 19), 1, torch.float16)
    function = getattr(nn.functional, activation)
    wanted = function(x.double() + by_channel(bias)) * by_channel(scale) + by_channel(shift)
    assert relative_error(kernels("activate", x, bias, scale, shift, activation), wanted) < ROUNDING[torch.float16]


def test_gelu_is_right_in_its_tail_too(kernels):
    x, one, zero = torch.linspace(-9, 9, 20_001)[None], torch.ones(1), torch.zeros(1)
    found = kernels("activate", x, zero, one, zero, "gelu").double()
    wanted = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    assert ((found - wanted).abs() <= 1e-4 * wanted.abs()).all()


def test_what_is_no_number_stays_none(kernels):
    x, one, zero = torch.tensor([[1.0, float("nan"), -1.0]]), torch.ones(1), torch.zeros(1)
    for activation in ("gelu", "relu"):
        found = kernels("activate", x, zero, one, zero, activation)
        assert found.isnan().tolist() == [[False, True, False]]


@ON_GPU
def test_maps_of_more_than_2_31_elements():
    device = torch.device("cuda")
    if torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("this GPU has less than 16 GB free")
    x = torch.randn(40, 60, 960, 960, device=device, dtype=torch.float16)
    taps, bias = torch.randn(40, 3, 3, device=device), torch.randn(40, device=device)
    found = compiled_kernels.convolve(x, taps, bias)
    last = convolved(x[-1:, -1:], taps[-1:].half(), bias[-1:])
    assert relative_error(found[-1:, -1:], last) < ROUNDING[torch.float16]


# What a program may have: shared memory of an A100, an RTX 3090 or 4090, an H100 or H200, and a B200.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
needs_disassembler = pytest.mark.skipif(
    not all(shutil.which(tool.path) for tool in (triton.knobs.nvidia.cuobjdump, triton.knobs.nvidia.nvdisasm)),
    reason="this Triton comes without NVIDIA's disassembler",
)


@needs_disassembler
@pytest.mark.parametrize("activation", ["gelu", ""])
@pytest.mark.parametrize("name", ["convolve", "differentiate"])
def test_on_an_h200_the_kernels_are_as_they_were_measured(name, activation):
    code = compile_kernel(name, 9, 90, activation)
    assert code.spilled == 0 and code.shared <= SHARED[90]
    assert code.matrix >= 8 and "wgmma.mma_async" in code.ptx
    # Windows are read 8 bytes at a time, but not where the compiler cannot see that they are aligned.
    assert "cp.async.ca.shared.global [" in code.ptx and "ld.global.b16" not in code.ptx


@needs_disassembler
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel_size", [5, 9])
def test_they_fit_every_gpu(kernel_size, capability):
    for name, activation in (("convolve", "gelu"), ("convolve", ""), ("differentiate", "")):
        code = compile_kernel(name, kernel_size, capability, activation)
        assert code.spilled <= 32 and code.shared <= SHARED[capability] and code.matrix


@needs_disassembler
def test_the_others_compile_too():
    assert compile_kernel("activate", 9, 90).spilled == 0
    odd_sides = compile_kernel("convolve", 9, 90, aligned=False)
    assert odd_sides.spilled <= 128 and odd_sides.matrix
