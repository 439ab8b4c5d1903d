"""The Triton kernels in Triton's interpreter, which runs them on the CPU, element by element as they are written."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from convmixer.gpu import kernels


def load_interpreted_kernels(monkeypatch: pytest.MonkeyPatch, name: str = "kernels") -> ModuleType:
    """A second copy of a module of `convmixer.gpu`, whose kernels are interpreted. Gaps of Triton 3.6 are filled."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_this_numpy(tensor, scope):  # NumPy 2.4 makes no number of an array of one element
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_bfloat16(self, a, b, *others):  # which the interpreter holds as integers, and would multiply as such
        return dot(self, *(_decoded(operand, tl, interpreter) for operand in (a, b)), *others)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_for_this_numpy)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bfloat16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton was imported to compile, and so was the part of its language that is written in it.
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
    package = ModuleType("interpreted")
    package.__path__ = [str(Path(kernels.__file__).parent)]
    monkeypatch.setitem(sys.modules, "interpreted", package)
    for each in ("kernels", "strips", "fused"):
        monkeypatch.delitem(sys.modules, f"interpreted.{each}", raising=False)
    module = importlib.import_module(f"interpreted.{name}")
    assert sys.modules["interpreted.kernels"].INTERPRETED and not kernels.INTERPRETED
    return module


def _decoded(operand, tl, interpreter):
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
