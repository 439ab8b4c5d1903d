"""Any file that may hold a ConvMixer, to NumPy arrays under timm's names.

No file is trusted. safetensors is data only; pickles are read with ``weights_only=True`` and run no code.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import safe_open

from .config import ConvMixerConfig

METADATA_KEY = "convmixer"  # the one entry that our own safetensors files carry beside the tensors
# Put in front by DistributedDataParallel, torch.compile, Lightning modules and transformers' wrapper around timm.
WRAPPER_PREFIXES = re.compile(r"((module|_orig_mod|model|net|timm_model)\.)+")
NUMBERED_NAME = re.compile(r"([0-9]{1,6})\.(.+)")  # the authors' nn.Sequential: "3.0.fn.0.weight"
FIRST_BLOCK = 3  # in the authors' nn.Sequential, after the stem's convolution, activation and norm
MOST_PROBLEMS_SHOWN = 3
NUMBER_TYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}


class CheckpointError(ValueError):
    """One line that names the file, what is wrong with it and, where that helps, what would be right."""


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], str | None, dict]:
    """The tensors of a checkpoint under timm's names; the text of our metadata entry, None in other people's files; and
    what timm's train.py says about its training, {} in other files (see `convmixer.guess`).

    The first bytes tell the kind of file. Raises CheckpointError, without the file's name, when it cannot be read.
    """
    try:
        if not path.is_file():
            raise CheckpointError("is not a file" if path.exists() else "there is no such file")
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from error
    metadata, facts = None, {}
    if start[8:] == b"{":  # safetensors: the header's length in eight bytes, then the header, which is JSON
        tensors, metadata = _read_safetensors(path)
    elif start.startswith((b"PK", b"\x80")):  # torch.save: a zip archive, or before PyTorch 1.6 a bare pickle
        tensors, facts = _read_pickle(path, zipped=start.startswith(b"PK"))
    else:
        raise CheckpointError("is empty" if not start else "is not a checkpoint (.safetensors, .pth or .pth.tar)")
    return _with_timm_names(tensors), metadata, facts


def read_metadata(path: Path) -> str | None:
    """The text of our metadata entry in a safetensors file, None in other people's; no tensor is read."""
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get(METADATA_KEY)
    except Exception as error:
        raise CheckpointError(f"cannot be read as safetensors: {error_summary(error)}") from error


def infer_config(tensors: dict[str, np.ndarray]) -> ConvMixerConfig:
    """The architecture that the tensors' shapes show; raises CheckpointError when they are not a ConvMixer's.

    The activation leaves no trace in the shapes. It is taken to be ReLU for 768/32, the one published network that has
    it (and for what was fine-tuned from it, whatever the number of classes), else GELU.
    """
    try:
        dim, in_chans, patch_size, _ = tensors["stem.0.weight"].shape
        kernel_size = tensors["blocks.0.0.fn.0.weight"].shape[-1]
        num_classes = tensors["head.weight"].shape[0]
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        activation = "relu" if (dim, depth, kernel_size, patch_size) == (768, 32, 7, 7) else "gelu"
        config = ConvMixerConfig(dim, depth, kernel_size, patch_size, num_classes, in_chans, activation)
    except KeyError as missing:
        found = ", ".join(f"{name!r:.80}" for name in islice(tensors, MOST_PROBLEMS_SHOWN))
        raise CheckpointError(f"holds no ConvMixer: there is no {missing}, but {found}") from missing
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"holds no ConvMixer: {error_summary(error)}") from error
    _check_shapes(tensors, config)
    return config


def checked_tensors(tensors: Mapping, config: ConvMixerConfig) -> dict[str, np.ndarray]:
    """The tensors as contiguous float32 arrays (batch counters as int64), if they are exactly those of ``config``.

    tensors: arrays, or PyTorch's tensors on any device. Those that are so already are not copied. Raises
    CheckpointError naming the first tensors that are missing, left over, of another shape, or not finite.
    """
    _check_shapes(tensors, config)
    plain = {}
    with np.errstate(all="ignore"):  # what overflows float32 is found below
        for name, tensor in tensors.items():
            dtype = np.int64 if name.endswith("num_batches_tracked") else np.float32
            plain[name] = np.require(as_array(tensor), dtype, ["C", "ALIGNED"])
            # A sum is finite unless a value is not, or it overflows: only then is every value looked at.
            if not np.isfinite(plain[name].sum()) and not np.isfinite(plain[name]).all():
                problem = "holds NaN or infinite values; the training may have diverged"
                raise CheckpointError(f"tensor {name!r:.80} {problem}")
    return plain


def release(arrays: Mapping[str, np.ndarray]) -> None:
    """Lets go of the memory that memory-mapped arrays have been read into; what is used again is read again."""
    for array in arrays.values():
        while isinstance(array, np.ndarray):
            array = array.base
        content = getattr(array, "obj", None)
        if isinstance(content, mmap.mmap) and hasattr(content, "madvise"):
            content.madvise(mmap.MADV_DONTNEED)
            return  # all of a file's arrays share one


def as_array(tensor) -> np.ndarray:
    """An array as it is; a tensor of PyTorch's as an array, which on the CPU shares its memory."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
    return tensor


def _check_shapes(tensors: dict[str, np.ndarray], config: ConvMixerConfig) -> None:
    # islice: a config out of a hostile file may ask for a billion blocks.
    problems = list(islice(_problems(tensors, config), MOST_PROBLEMS_SHOWN))
    if problems:
        raise CheckpointError(f"does not fit {config}: {'; '.join(problems)}")


def _problems(tensors: dict[str, np.ndarray], config: ConvMixerConfig) -> Iterator[str]:
    expected = set()
    for name, shape in _expected_shapes(config):
        expected.add(name)
        if name not in tensors:
            yield f"{name!r:.80} is missing"
        elif tuple(tensors[name].shape) != shape:
            yield f"{name!r:.80} has shape {tuple(tensors[name].shape)}, not {shape}"
    yield from (f"{name!r:.80} is left over" for name in tensors if name not in expected)


def _expected_shapes(config: ConvMixerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    dim = config.dim

    def conv_and_norm(conv: str, norm: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{conv}.weight", (dim, *shape)
        yield f"{conv}.bias", (dim,)
        for field in ("weight", "bias", "running_mean", "running_var"):
            yield f"{norm}.{field}", (dim,)
        yield f"{norm}.num_batches_tracked", ()

    yield from conv_and_norm("stem.0", "stem.2", config.in_chans, config.patch_size, config.patch_size)
    for i in range(config.depth):
        yield from conv_and_norm(f"blocks.{i}.0.fn.0", f"blocks.{i}.0.fn.2", 1, config.kernel_size, config.kernel_size)
        yield from conv_and_norm(f"blocks.{i}.1", f"blocks.{i}.3", dim, 1, 1)
    yield "head.weight", (config.num_classes, dim)
    yield "head.bias", (config.num_classes,)


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str | None]:
    """The tensors as they are in the file, memory-mapped, and our metadata entry."""
    try:
        with safe_open(path, framework="np") as file, open(path, "rb") as raw:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            # The library copies what it reads; it has made sure that the tensors lie one behind the other.
            content = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
            offset, arrays = 8 + struct.unpack("<Q", content[:8])[0], {}
            for name in file.offset_keys():
                about = file.get_slice(name)
                dtype, shape = NUMBER_TYPES[about.get_dtype()], about.get_shape()
                arrays[name] = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
                offset += arrays[name].nbytes
                if about.get_dtype() == "BF16":
                    arrays[name] = (arrays[name].astype(np.uint32) << 16).view(np.float32)
            return arrays, metadata
    except KeyError as number_type:
        raise CheckpointError(f"holds numbers of type {number_type}; save them as float32") from number_type
    except Exception as error:
        raise CheckpointError(f"is truncated, damaged or no checkpoint: {error_summary(error)}") from error


def _read_pickle(path: Path, *, zipped: bool) -> tuple[dict[str, np.ndarray], dict]:
    try:
        from .pickles import read_pickle
    except ImportError as error:
        raise CheckpointError(
            "is a pickle, which PyTorch reads, and PyTorch is not installed: pip install torch, or give a .safetensors"
        ) from error
    return read_pickle(path, zipped=zipped)


def _with_timm_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {WRAPPER_PREFIXES.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    if "0.weight" in tensors:
        numbers = [int(match[1]) for name in tensors if (match := NUMBERED_NAME.fullmatch(name))]
        tensors = {_timm_name(name, head=max(numbers)): tensor for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith(".running_mean")]:
        # Missing in files from before PyTorch 0.4.1; inference does not use it.
        tensors.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", np.zeros((), np.int64))
    return tensors


def _timm_name(name: str, head: int) -> str:
    """timm's name for a tensor of the authors' nn.Sequential, whose last layer has the number ``head``."""
    match = NUMBERED_NAME.fullmatch(name)
    if not match:
        return name
    number, rest = int(match[1]), match[2]
    if number < FIRST_BLOCK:
        return f"stem.{name}"
    return f"head.{rest}" if number == head else f"blocks.{number - FIRST_BLOCK}.{rest}"


def error_summary(error: Exception) -> str:
    """The first sentence of another library's error, printable, or the error's type when it says nothing."""
    text = re.split(r"\n|\. ", str(error))[0][:200]
    return "".join(character if character.isprintable() else "?" for character in text) or type(error).__name__
