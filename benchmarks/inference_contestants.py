"""The contestants of benchmarks/inference.py: each a process that loads one model and answers over a pipe.

    python -m benchmarks.inference_contestants NAME MODEL FOLDER BATCH          in the repository
    python -m benchmarks.inference_contestants files|onnx MODEL FOLDER COUNT    writes what all of them are given

A contestant is a generator. Up to its first yield it imports its libraries; then its memory is noted, and it loads the
model. Its second yield gives a call that takes the whole batch, and gives logits, (batch, classes), or None for what is
no network.
"""

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import memory, serve
from convmixer.config import ConvMixerConfig
from convmixer.zoo import MODELS as ZOO

MODELS = ("convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_256_8_cifar10")
TURN = 0.1  # seconds that a turn lasts at least
PRODUCT_PICTURES = 16  # at most so many pictures' positions are rows of one matrix product


class Skip(Exception):
    """One line that says why a contestant cannot take part."""


def need(*packages: str) -> None:
    if lacking := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise Skip(f"not installed: {', '.join(lacking)}")


def ours(checkpoint: Path, config: ConvMixerConfig, pictures: np.ndarray, precision: str) -> Iterator:
    from safetensors.numpy import load_file

    from convmixer.cpu.engine import KernelEngine
    from convmixer.cpu.kernel import KernelError

    yield
    try:
        engine = KernelEngine(config, load_file(checkpoint), precision)
    except KernelError as error:
        raise Skip(str(error)) from error
    yield lambda: engine.run(pictures)[0]


def timm(checkpoint: Path, config: ConvMixerConfig, pictures: np.ndarray, compiled: bool = False) -> Iterator:
    import torch
    from safetensors.torch import load_file

    from benchmarks.networks import timm_network

    yield
    network = timm_network(config, load_file(checkpoint))
    network = torch.compile(network) if compiled else network
    images = torch.from_numpy(pictures)
    yield torch.inference_mode()(lambda: network(images).numpy())


def onnx_runtime(checkpoint: Path, config: ConvMixerConfig, pictures: np.ndarray) -> Iterator:
    need("onnxruntime", "onnx", "onnxscript")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", len(pictures))
    yield
    file = str(checkpoint.with_suffix(".onnx"))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    yield lambda: session.run(["logits"], {"image": pictures})[0]


def openvino(checkpoint: Path, config: ConvMixerConfig, pictures: np.ndarray) -> Iterator:
    need("openvino", "onnx", "onnxscript")
    import openvino

    yield
    core = openvino.Core()
    network = core.read_model(checkpoint.with_suffix(".onnx"))
    network.reshape({"image": list(pictures.shape)})
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    yield lambda: compiled([pictures])[0]


def product(checkpoint: Path, config: ConvMixerConfig, pictures: np.ndarray, library: str) -> Iterator:
    """All 1x1 convolutions of the network as matrix products and nothing else: positions x dim by dim x dim."""
    from train.speed.memory import keep_memory

    keep_memory()  # a product into fresh memory would measure the operating system
    import torch

    yield
    together = min(len(pictures), PRODUCT_PICTURES)
    x = torch.randn(together * (pictures.shape[-1] // config.patch_size) ** 2, config.dim)
    weight, bias, out = torch.randn(config.dim, config.dim), torch.zeros(config.dim), torch.empty_like(x)
    multiply = partial(torch.mm, x, weight, out=out)
    if library == "oneDNN":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        multiply = partial(torch.ops.mkldnn._linear_pointwise, x, packed, bias, "none", [], "")

    times = config.depth * -(-len(pictures) // together)

    @torch.inference_mode()
    def call() -> None:
        for _ in range(times):
            multiply()

    yield call


CONTESTANTS: dict[str, Callable[..., Iterator]] = {
    "timm eager": timm,
    "torch.compile": partial(timm, compiled=True),
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "ours float32": partial(ours, precision="float32"),
    "ours bfloat16": partial(ours, precision="bfloat16"),
    "ours int8": partial(ours, precision="int8"),
    "torch.mm": partial(product, library="MKL"),
    "oneDNN product": partial(product, library="oneDNN"),
}
MEASURE = "timm eager"  # the others' speed and logits are compared with its
ROUGH = ("ours bfloat16", "ours int8")  # and not float32
PRODUCTS = ("torch.mm", "oneDNN product")  # the faster one is the ceiling


def seconds_of(call: Callable) -> float:
    """The median of as many calls as fit into a turn, but the first, before which others have had the caches."""
    times = []
    while sum(times) < TURN:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def take_part(name: str, model: str, folder: Path, batch: int) -> None:
    """Answers why it cannot, or null and logits in NAME.npy; at each turn a batch's seconds, and megabytes."""
    pictures = np.array(np.load(folder / "pictures.npy", mmap_mode="r")[:batch])
    loading = CONTESTANTS[name](folder / f"{model}.safetensors", ZOO[model].config, pictures)
    try:
        next(loading)
        before = memory("VmRSS")
        call = next(loading)
    except Skip as reason:
        why = " ".join(str(reason).split())
        return serve(lambda: why, None)

    def first() -> None:
        logits = call()
        if logits is not None:
            np.save(folder / f"{name}.npy", logits)

    def turn() -> tuple[float, float | None]:
        return seconds_of(call), before and memory("VmHWM") - before

    serve(first, turn)


def write_files(model: str, folder: Path, count: int, onnx: bool) -> None:
    """The shipped model as it is, others with random weights; the same as ONNX; and random pictures."""
    from dataclasses import replace

    from benchmarks.networks import random_network
    from convmixer import zoo
    from convmixer.export import export_onnx
    from convmixer.labels import imagenet_labels
    from convmixer.weights import save_checkpoint

    entry, file, checkpoint = ZOO[model], folder / f"{model}.safetensors", zoo.load("convmixer_256_8_cifar10")
    config, size = entry.config, entry.preprocessing.size
    if not entry.shipped:
        about = {"config": config, "labels": imagenet_labels(), "preprocessing": entry.preprocessing}
        checkpoint = replace(checkpoint, **about, state_dict=random_network(config, size).state_dict())
    save_checkpoint(file, checkpoint)
    shape = count, config.in_chans, size, size
    np.save(folder / "pictures.npy", np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    if onnx and importlib.util.find_spec("onnxscript"):
        export_onnx(file, file.with_suffix(".onnx"))


if __name__ == "__main__":
    name, model, folder, count = sys.argv[1:]
    if name in ("files", "onnx"):
        write_files(model, Path(folder), int(count), name == "onnx")
    else:
        take_part(name, model, Path(folder), int(count))
