"""The Triton kernels in Triton's interpreter, which runs them on the CPU, element by element as they are written."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from convmixer.gpu import kernels


def load_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of `convmixer.gpu.kernels`, whose kernels are interpreted. Two gaps of Triton 3.6 are filled."""
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
    spec = importlib.util.spec_from_file_location("interpreted_kernels", Path(kernels.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.INTERPRETED and not kernels.INTERPRETED
    return module


def _decoded(operand, tl, interpreter):
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
