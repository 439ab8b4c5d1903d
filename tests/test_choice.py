"""Which engine, precision and layout: the choice as a table, and what the doors say of it."""

import pytest

from convmixer import Classifier
from convmixer import engine as engine_module
from convmixer.engine import Choice, Machine, choose, find_device

CPU, NO_KERNEL = Machine(), Machine(kernel_problem="install g++")
H200 = Machine("cuda", capability=(9, 0), has_triton=True)
NO_TRITON = Machine("cuda", capability=(9, 0))
T4 = Machine("cuda", capability=(7, 5), has_triton=True)
MPS = Machine("mps")
SLOWER = "NumPy runs the network, which is slower: install g++"

CASES = [
    # machine, kernel size, asked engine and precision: the choice
    (CPU, 7, "auto", "auto", Choice("kernel", "float32")),
    (CPU, 7, "auto", "int8", Choice("kernel", "int8")),
    (CPU, 7, "numpy", "auto", Choice("numpy", "float32")),
    (CPU, 7, "torch", "auto", Choice("torch", "float32")),
    (NO_KERNEL, 7, "auto", "auto", Choice("numpy", "float32", note=SLOWER)),
    (H200, 9, "auto", "auto", Choice("kernel", "bfloat16", "channel_major")),
    (H200, 9, "auto", "float32", Choice("torch", "float32")),
    (H200, 7, "torch", "auto", Choice("torch", "bfloat16", "channels_last")),
    (H200, 11, "auto", "auto", Choice("torch", "bfloat16")),
    (NO_TRITON, 9, "auto", "bfloat16", Choice("torch", "bfloat16")),
    (T4, 9, "auto", "auto", Choice("torch", "float16")),
    (T4, 5, "auto", "auto", Choice("torch", "float16", "channels_last")),
    (MPS, 9, "auto", "auto", Choice("torch", "float32")),
]


@pytest.mark.parametrize(("machine", "kernel_size", "engine", "precision", "expected"), CASES)
def test_the_choice(machine, kernel_size, engine, precision, expected):
    assert choose(machine, kernel_size, engine, precision) == expected


@pytest.mark.parametrize(
    ("machine", "engine", "precision", "message"),
    [
        (CPU, "triton", "auto", "engine is 'triton'; it must be one of auto, kernel, numpy, torch"),
        (CPU, "auto", "fp32", "precision is 'fp32'; it must be one of auto, float32, bfloat16, float16, int8"),
        (CPU, "numpy", "int8", "engine 'numpy' does not run .* in precision 'int8' on this cpu"),
        (CPU, "auto", "float16", "precision 'float16' on this cpu"),
        (NO_KERNEL, "kernel", "auto", "engine 'kernel' cannot be used: install g\\+\\+"),
        (NO_KERNEL, "auto", "int8", "precision 'int8' cannot be used: install g\\+\\+"),
        (H200, "auto", "int8", "precision 'int8' on this cuda"),
        (H200, "kernel", "float32", "engine 'kernel' does not run kernels of 9 in precision 'float32'"),
        (T4, "kernel", "auto", "engine 'kernel' does not run"),
        (MPS, "auto", "bfloat16", "on this mps"),
    ],
)
def test_what_cannot_be_had_is_one_line(machine, engine, precision, message):
    with pytest.raises(ValueError, match=message) as error:
        choose(machine, 9, engine, precision)
    assert "\n" not in str(error.value)


def test_a_device_is_named_or_found(monkeypatch):
    assert find_device("cpu") == find_device(None, "numpy") == "cpu"
    assert find_device("auto") == find_device(None)
    for wrong, named in (("cudda", "cudda"), ("99", "cuda:99"), ("mps:7", "mps:7")):
        with pytest.raises(ValueError, match=f"device '{named}' cannot be used"):
            find_device(wrong)
    monkeypatch.setattr(engine_module, "_may_have_gpu", lambda: True)
    assert find_device(None) in ("cpu", "cuda")  # PyTorch has the last word


def test_a_fallback_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(engine_module, "look", lambda *_: NO_KERNEL)
    engine_module.say_once.cache_clear()
    for _ in range(2):
        assert Classifier(device="cpu").engine.name == "numpy"
    assert caplog.messages == [SLOWER]
