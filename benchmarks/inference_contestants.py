"""The contestants of benchmarks/inference.py: each a process that loads one model and answers over a pipe.

    python -m benchmarks.inference_contestants NAME MODEL FOLDER BATCH [THREADS]     in the repository

A contestant is a generator. Up to its first yield it imports its libraries and reads the pictures; then its memory is
noted, and it loads the model. Its second yield gives (precision, alternatives): ways to do the whole batch, each a call
and how often it is needed. The call gives the logits, (batch, classes), or None for what is no network.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.harness import memory
from benchmarks.inference_models import ONNX_PACKAGES, Cell, missing

TURN = 0.1  # seconds that a turn lasts at least
PRODUCT_PICTURES = 16  # at most so many pictures' positions are rows of one matrix product


class Skip(Exception):
    """One line that says why a contestant cannot take part."""


def need(*packages: str) -> None:
    if lacking := missing(packages):
        raise Skip(f"not installed: {', '.join(lacking)}")


def read_pictures(cell: Cell):
    """float32 (batch, 3, size, size), in memory of this process."""
    import numpy as np

    return np.array(np.load(cell.pictures, mmap_mode="r")[: cell.batch])


def ours(cell: Cell, precision: str) -> Iterator:
    from safetensors.numpy import load_file

    from convmixer.cpu.engine import KernelEngine
    from convmixer.cpu.kernel import KernelError
    from convmixer.zoo import MODELS

    pictures = read_pictures(cell)
    yield
    try:
        engine = KernelEngine(MODELS[cell.model].config, load_file(cell.checkpoint), precision)
    except KernelError as error:
        raise Skip(str(error)) from error
    engine.threads = cell.threads or engine.threads
    yield precision, [(lambda: engine.run(pictures)[0], 1)]


def timm_network(cell: Cell, channels_last: bool = False, bfloat16: bool = False, compiled: bool = False) -> Iterator:
    need("timm")
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.models.convmixer import ConvMixer

    if cell.threads:
        torch.set_num_threads(cell.threads)
    pictures = torch.from_numpy(read_pictures(cell))
    yield
    if timm.is_model(cell.model):
        network = timm.create_model(cell.model)
    else:
        network = ConvMixer(256, 8, kernel_size=5, patch_size=2, num_classes=10)  # the shipped one, unknown to timm
    network.load_state_dict(load_file(cell.checkpoint))
    network.eval()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network)

    @torch.inference_mode()
    def call():
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            return network(pictures).float().numpy()

    yield "bfloat16" if bfloat16 else "float32", [(call, 1)]


def onnx_runtime(cell: Cell) -> Iterator:
    need("onnxruntime", *ONNX_PACKAGES)
    import onnxruntime

    pictures = read_pictures(cell)
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", cell.batch)
    if cell.threads:
        options.intra_op_num_threads = cell.threads
    yield
    session = onnxruntime.InferenceSession(str(cell.onnx), options, providers=["CPUExecutionProvider"])
    yield "float32", [(lambda: session.run(["logits"], {"image": pictures})[0], 1)]


def openvino(cell: Cell, float32: bool) -> Iterator:
    need("openvino", *ONNX_PACKAGES)
    import openvino

    pictures = read_pictures(cell)
    config = {"INFERENCE_PRECISION_HINT": "f32"} if float32 else {}
    if cell.threads:
        config["INFERENCE_NUM_THREADS"] = cell.threads
    yield
    core = openvino.Core()
    network = core.read_model(cell.onnx)
    network.reshape({"image": list(pictures.shape)})
    compiled = core.compile_model(network, "CPU", config)
    name = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    precision = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(name, name)
    yield precision, [(lambda: compiled([pictures])[0], 1)]


def product(cell: Cell, library: str, precision: str) -> Iterator:
    """All 1x1 convolutions of the network as matrix products and nothing else: positions x dim by dim x dim.

    The alternatives: the positions of one picture are the rows of a product, or those of several pictures together.
    """
    from train.speed.memory import keep_memory

    keep_memory()  # a product into fresh memory would measure the operating system
    import torch

    from convmixer.zoo import MODELS

    if cell.threads:
        torch.set_num_threads(cell.threads)
    if library == "oneDNN" and not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        raise Skip("this PyTorch has no packed product of oneDNN")
    config, size = MODELS[cell.model].config, MODELS[cell.model].preprocessing.size
    dtype, positions = getattr(torch, precision), (size // config.patch_size) ** 2
    yield
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(config.dim, config.dim, generator=generator).to(dtype)
    bias = torch.zeros(config.dim, dtype=dtype)

    def way(pictures: int) -> tuple[Callable[[], None], float]:
        rows = pictures * positions
        x = torch.randn(rows, config.dim, generator=generator).to(dtype)
        if library == "oneDNN":
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            multiply = partial(torch.ops.mkldnn._linear_pointwise, x, packed, bias, "none", [], "")
        else:
            multiply = partial(torch.mm, x, weight, out=torch.empty_like(x))

        @torch.inference_mode()
        def call() -> None:
            multiply()  # the result is not handed out: serve would take it for logits

        return call, config.depth * cell.batch / pictures

    yield precision, [way(pictures) for pictures in sorted({1, min(cell.batch, PRODUCT_PICTURES)})]


CONTESTANTS: dict[str, Callable[[Cell], Iterator]] = {
    "timm eager": timm_network,
    "timm channels_last": partial(timm_network, channels_last=True),
    "torch.compile": partial(timm_network, compiled=True),
    "ONNX Runtime": onnx_runtime,
    "OpenVINO float32": partial(openvino, float32=True),
    "ours float32": partial(ours, precision="float32"),
    "timm bfloat16": partial(timm_network, channels_last=True, bfloat16=True),
    "OpenVINO as it comes": partial(openvino, float32=False),
    "ours bfloat16": partial(ours, precision="bfloat16"),
    "ours int8": partial(ours, precision="int8"),
    "torch.mm": partial(product, library="MKL", precision="float32"),
    "oneDNN product": partial(product, library="oneDNN", precision="float32"),
    "oneDNN product bfloat16": partial(product, library="oneDNN", precision="bfloat16"),
}
MEASURE = "timm eager"  # the others' speed and logits are compared with its
OURS = tuple(name for name in CONTESTANTS if name.startswith("ours"))
PRODUCTS = ("torch.mm", "oneDNN product", "oneDNN product bfloat16")
CEILING = PRODUCTS[:2]  # the better one of them is the ceiling


def seconds_of(call: Callable, turn: float = TURN) -> float:
    """The median of as many calls as fit into ``turn`` seconds, at least one.

    Where more than one fits the first is not counted: others have had the caches meanwhile.
    """
    times = []
    while sum(times) < turn:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def serve(name: str, cell: Cell) -> None:
    """A line of JSON when the model is loaded, one for every line that comes in, and one at their end.

    The first call writes the logits to NAME.npy in the cell's folder, and its seconds include what happens only once,
    such as compiling. Every later line is a turn, and its seconds are those of one batch.
    """
    import numpy as np

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not taken for an answer

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        preparation = CONTESTANTS[name](cell)
        next(preparation)
        before = memory("VmRSS")
        precision, alternatives = next(preparation)
    except Skip as reason:
        return answer(skipped=" ".join(str(reason).split()))
    answer(precision=precision)
    for number, _ in enumerate(sys.stdin):
        if number:
            answer(seconds=min(times * seconds_of(call) for call, times in alternatives))
            continue
        start = time.perf_counter()
        for logits in [call() for call, _ in alternatives]:
            if logits is not None:
                np.save(cell.folder / f"{name}.npy", logits)
        answer(seconds=time.perf_counter() - start)
    peak = memory("VmHWM")
    answer(megabytes=None if peak is None else peak - before)


if __name__ == "__main__":
    name, model, folder, batch, *threads = sys.argv[1:]
    serve(name, Cell(model, int(batch), Path(folder), int(threads[0]) if threads else None))
