"""The operators of `convmixer.gpu` in every place: PyTorch's own, Triton's interpreter on the CPU, a GPU."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

triton = pytest.importorskip("triton", reason="PyTorch comes without Triton here")

from convmixer.gpu import halves, kernels, ops  # noqa: E402

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
PLACES = ["plain", "interpreter", pytest.param("GPU", marks=ON_GPU)]
# What one rounding to the dtype may do to a number. The interpreter cuts bfloat16 off, where a GPU rounds.
ROUNDING = {torch.float32: 1e-4, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
SHAPES = {  # (C, N, H, W) and the side of the kernel
    "ImageNet's": ((2, 2, 32, 32), 9),
    "CIFAR's, patch 2": ((2, 3, 16, 16), 5),
    "sides that are no multiple of a tile": ((3, 2, 7, 13), 7),
    "programs that share a channel": ((1, 13, 31, 33), 3),
    "one position": ((2, 2, 1, 1), 9),
}
needs_disassembler = pytest.mark.skipif(
    not all(shutil.which(tool.path) for tool in (triton.knobs.nvidia.cuobjdump, triton.knobs.nvidia.nvdisasm)),
    reason="this Triton comes without NVIDIA's disassembler",
)


def devices(place: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of a place; until the end the operators run there, and what torch.empty gives is NaN."""
    if place == "interpreter":
        interpret(monkeypatch)
    if place == "GPU":
        monkeypatch.setattr(halves, "triton_runs", lambda *arguments: True)  # in float32, too
    torch.use_deterministic_algorithms(True)
    yield "cuda" if place == "GPU" else "cpu"
    torch.use_deterministic_algorithms(False)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the operators take second copies of the kernels, which are interpreted. Gaps of Triton 3.6 are filled."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor_for_this_numpy(tensor, scope):  # NumPy 2.4 makes no number of an array of one element
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def decoded(operand):  # bfloat16, which the interpreter holds as integers, and would multiply as such
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_for_this_numpy)
    create_dot = lambda self, a, b, *others: dot(self, decoded(a), decoded(b), *others)  # noqa: E731
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton was imported to compile, and so was the part of its language that is written in it.
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
    package = ModuleType("interpreted")
    package.__path__ = [str(Path(kernels.__file__).parent)]
    monkeypatch.setitem(sys.modules, "interpreted", package)
    for module, name in ((ops, "kernels"), (ops, "strips"), (halves, "fused")):
        monkeypatch.delitem(sys.modules, f"interpreted.{name}", raising=False)
        monkeypatch.setattr(module, name, importlib.import_module(f"interpreted.{name}"))
        monkeypatch.setattr(module, "triton_runs", lambda *arguments: True)
    assert ops.kernels.INTERPRETED and not kernels.INTERPRETED


def draw(case: str, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, taps that the dtype holds, so that only the result is rounded, and three vectors; all want gradients."""
    torch.manual_seed(0)
    shape, size = SHAPES[case]
    taps = torch.randn(shape[0], size, size) / size
    tensors = torch.randn(shape).to(dtype), taps.to(dtype).float(), *torch.randn(3, shape[0]).unbind()
    return tuple(tensor.to(device).requires_grad_() for tensor in tensors)


def by_channel(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1, 1)


def convolved(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """By PyTorch."""
    pictures, pad = x.transpose(0, 1), taps.shape[-1] // 2
    return nn.functional.conv2d(pictures, taps[:, None], bias, padding=pad, groups=len(x)).transpose(0, 1)


def differentiated(function, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The function's result and its inputs' gradients, on the CPU; and both of it in float64."""
    result, exact = function[0](*inputs), [each.detach().cpu().double().requires_grad_() for each in inputs]
    wanted, grad = function[1](*exact), torch.randn(result.shape).to(result.dtype)
    found = torch.autograd.grad(result, inputs, grad.to(result.device))
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    return [each.detach().cpu() for each in (result, *found)], [wanted.detach(), *gradients]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and found.isfinite().all()
    return float((found.cpu().double() - wanted).norm() / wanted.norm())
