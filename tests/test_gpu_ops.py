"""The operators on channel-major feature maps: what PyTorch must know of them, and the plain way, for any device."""

import pytest
import torch
from torch import Tensor, nn

from convmixer.gpu import ops

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def draw(dtype: torch.dtype, device: str = "cpu", kernel_size: int = 5, grad: bool = False) -> tuple[Tensor, ...]:
    """x (3, 2, 9, 7), taps, bias, scale and shift; the last four float32, or float64 if x is."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(3, 2, 9, 7, device=device).to(dtype).requires_grad_(grad)
    taps = torch.randn(3, kernel_size, kernel_size, device=device, dtype=wide).requires_grad_(grad)
    return x, taps, *(torch.randn(3, device=device, dtype=wide).requires_grad_(grad) for _ in range(3))


def test_the_plain_convolution_is_pytorchs():
    x, taps, bias, scale, shift = draw(torch.float64)
    wanted = nn.functional.conv2d(x.transpose(0, 1), taps[:, None], bias, padding=2, groups=3).transpose(0, 1)
    assert torch.allclose(ops.depthwise(x, taps, bias), wanted, rtol=1e-12)
    mixed = nn.functional.gelu(wanted) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1) + x
    assert torch.allclose(ops.mix_positions(x, taps, bias, scale, shift, "gelu"), mixed, rtol=1e-12)
    z = x.flatten(1)
    wanted = (z + bias[:, None]).relu() * scale[:, None] + shift[:, None]
    assert torch.allclose(ops.activate(z, bias, scale, shift, "relu"), wanted, rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_is_all(dtype, device, monkeypatch):
    """Taps are rounded to the dtype, and the result is; nothing between."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x, taps, bias, scale, shift = draw(dtype, device)
    exact = ops.mix_positions(*(t.double() for t in (x, taps.to(dtype), bias, scale, shift)), "gelu")
    found = ops.mix_positions(x, taps, bias, scale, shift, "gelu")
    assert found.dtype == dtype and found.is_contiguous()
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4  # what float32 does in between is below the second
    assert ((found.double() - exact).abs() <= limit).all()


def test_gradients():
    x, taps, bias, *_ = draw(torch.float64, grad=True)
    assert torch.autograd.gradcheck(ops.depthwise, (x, taps, bias))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_have_the_dtypes_of_what_they_belong_to(device):
    x, taps, bias, *_ = draw(torch.bfloat16, device, grad=True)
    ops.depthwise(x, taps, bias).float().square().sum().backward()
    assert [t.grad.dtype for t in (x, taps, bias)] == [t.dtype for t in (x, taps, bias)]
    exact = [t.detach().double().requires_grad_() for t in (x, taps.bfloat16(), bias)]
    ops.depthwise(*exact).square().sum().backward()
    for found, wanted in zip((x, taps, bias), exact, strict=True):
        assert (found.grad - wanted.grad).norm() < 0.01 * wanted.grad.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_is_told_the_truth(dtype, device):
    """Schema, shapes, strides and dtypes without computing, gradients under torch.compile: PyTorch's own checks."""
    x, taps, bias, scale, shift = draw(dtype, device)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)  # not contiguous
    for arguments in ((x, taps, bias), (transposed, taps, bias), (x.requires_grad_(), taps.requires_grad_(), bias)):
        torch.library.opcheck(ops.depthwise, arguments)
    x, taps = x.detach(), taps.detach()
    torch.library.opcheck(ops.depthwise_taps, (x, torch.randn_like(x), 5))
    torch.library.opcheck(ops.mix_positions, (x, taps, bias, scale, shift, "gelu"))
    torch.library.opcheck(ops.activate, (x, bias, scale, shift, "relu"))


def test_the_triton_kernels_are_for_gpus_and_16_bits():
    assert not ops.triton_runs(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_triton_kernels_are_chosen_where_they_can_run():
    x = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    assert ops.triton_runs(x, 9) == (torch.cuda.get_device_capability()[0] >= 8)
    assert not ops.triton_runs(x, 11) and not ops.triton_runs(x.float(), 9)


def test_where_triton_fails_pytorch_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.warns(UserWarning, match="Triton cannot be used .*; PyTorch's operators are"):
        assert not ops._triton_works.__wrapped__(99)  # which is not there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not ops._triton_works.__wrapped__(0)


def test_without_triton_everything_still_works(python):
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch\n"
        "from convmixer.gpu import ops\n"
        "assert ops.kernels is None\n"
        "x = torch.ones(2, 1, 4, 4, dtype=torch.bfloat16)\n"
        "print(ops.depthwise(x, torch.ones(2, 3, 3), torch.zeros(2)).sum().item())\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "200.0"), done.stderr
