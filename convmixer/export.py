"""A model as one ONNX file that needs nothing of this project: weights, labels and preprocessing are inside."""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from . import zoo
from .config import ConvMixerConfig, count_parameters
from .download import Progress
from .model import ConvMixer, build
from .readers import error_summary
from .weights import Checkpoint, write_atomically

PROTOBUF_LIMIT = 2**31  # bytes; an ONNX file is one protobuf message
ROOM_FOR_THE_GRAPH = 2**24  # bytes beside the weights; more than a million labels would take
WORST_DIFFERENCE = 1e-4  # of the largest logit; rounding alone stays a hundred times below it
CHECKED_BATCHES = (1, 3)


class ExportError(RuntimeError):
    """One line that says why no ONNX file was written."""


@dataclass(frozen=True)
class Export:
    """What was written, and how well it was found to agree with PyTorch."""

    path: Path
    size: int  # bytes
    opset: int
    difference: float | None  # largest difference of a logit, as a share of the largest logit; None: not checked


def export_onnx(model: str | os.PathLike, path: str | os.PathLike, progress: Progress | None = None) -> Export:
    """Write a model, given as `convmixer.zoo.load` takes it, as one self-contained ONNX file.

    Input ``image``: float32 (batch, in_chans, size, size), normalised, any batch; size is the preprocessing's. Output
    ``logits``: float32 (batch, classes). The file's metadata_props hold ``name`` and, as JSON, ``labels`` (in index
    order), ``preprocessing`` (as `Preprocessing.to_dict`) and ``architecture``. Where ONNX Runtime is installed, its
    logits are compared with PyTorch's before anything is written.

    Raises ExportError, what zoo.load raises, and OSError; a file that was at ``path`` is then still there, unchanged.
    """
    path = _checked_target(Path(path))
    if not all(importlib.util.find_spec(package) for package in ("onnx", "onnxscript")):
        raise ExportError("this needs the packages onnx and onnxscript: pip install 'convmixer[onnx]'")
    checkpoint = zoo.load(model, progress)
    _check_sizes(checkpoint.config, checkpoint.preprocessing.size)
    network = build(checkpoint.config, checkpoint.state_dict).eval()
    content, opset = _to_onnx(network, checkpoint)
    difference = _difference(content, network, checkpoint.preprocessing.size)
    if difference is not None and not difference <= WORST_DIFFERENCE:  # "not <=": it may be NaN
        raise ExportError(f"{path}: not written; ONNX Runtime's logits differ from PyTorch's by {difference:.1e}")
    write_atomically(path, lambda file: file.write(content))
    return Export(path, len(content), opset, difference)


def _checked_target(path: Path) -> Path:
    if path.suffix.lower() != ".onnx":
        raise ExportError(f"{path}: the name of the file to write must end in .onnx")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ExportError(f"{path}: is a folder; name a file")
    return path


def _check_sizes(config: ConvMixerConfig, size: int) -> None:
    """Raises ExportError for weights that do not fit into one file, and for pictures smaller than a patch."""
    weights = 4 * count_parameters(config)  # bytes of float32
    if weights > PROTOBUF_LIMIT - ROOM_FOR_THE_GRAPH:
        raise ExportError(f"the weights take {weights / 2**30:.1f} GiB; one ONNX file holds less than 2 GiB")
    if size < config.patch_size:
        raise ExportError(f"the model's pictures of {size} pixels hold no patch of {config.patch_size} pixels")


def _to_onnx(network: ConvMixer, checkpoint: Checkpoint) -> tuple[bytes, int]:
    """The content of the ONNX file, and the version of the operator set that it is written in."""
    size = checkpoint.preprocessing.size
    # Two pictures, because the exporter takes a size of one for a constant.
    example = torch.zeros(2, network.config.in_chans, size, size)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,  # the other exporter is deprecated
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        proto = program.model_proto
    except (RuntimeError, ImportError) as error:  # ImportError: a package that onnxscript needs
        raise ExportError(f"{checkpoint.name} cannot be exported: {error_summary(error)}") from error
    del proto.graph.value_info[:]  # shapes between the layers, which every reader infers
    for part in (proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.ClearField("metadata_props")  # the exporter's notes; among them are source lines and this machine's paths
        part.ClearField("doc_string")
    for key, value in _metadata(checkpoint).items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString(), next(opset.version for opset in proto.opset_import if not opset.domain)


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "name": checkpoint.name,
        "labels": json.dumps(checkpoint.labels),
        "preprocessing": json.dumps(checkpoint.preprocessing.to_dict()),
        "architecture": json.dumps(checkpoint.config.to_dict()),
    }


def _difference(content: bytes, network: ConvMixer, size: int) -> float | None:
    """The largest difference of ONNX Runtime's logits from PyTorch's for random input, as Export has it."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    generator, differences = torch.Generator().manual_seed(0), []
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        for batch in CHECKED_BATCHES:
            images = torch.randn(batch, network.config.in_chans, size, size, generator=generator)
            with torch.inference_mode():
                expected = network(images)
            logits = torch.from_numpy(session.run(["logits"], {"image": images.numpy()})[0])
            scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            differences.append((logits - expected).abs().max() / scale)
    except Exception as error:  # ONNX Runtime's own errors have no common base
        raise ExportError(f"not written; ONNX Runtime cannot run the model: {error_summary(error)}") from error
    return torch.stack(differences).max().item()  # unlike Python's max, keeps NaN


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's warnings to itself; they are about its own insides and other networks' operators."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
