"""Any file that may hold a ConvMixer, to plain tensors under timm's names.

No file is trusted. safetensors is data only; pickles are read with ``weights_only=True`` and run no code.
"""

import os
import re
import threading
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .config import ConvMixerConfig
from .pickles import PickleError, check_pickles

METADATA_KEY = "convmixer"  # the one entry that our own safetensors files carry beside the tensors
STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # as timm names them, the preferred one first
WRAPPER_PREFIXES = re.compile(r"(module\.|_orig_mod\.)+")  # put in front by DistributedDataParallel and torch.compile
NUMBERED_NAME = re.compile(r"([0-9]{1,6})\.(.+)")  # the authors' nn.Sequential: "3.0.fn.0.weight"
FIRST_BLOCK = 3  # in the authors' nn.Sequential, after the stem's convolution, activation and norm
MOST_PROBLEMS_SHOWN = 3


class CheckpointError(ValueError):
    """One line that names the file, what is wrong with it and, where that helps, what would be right."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a checkpoint under timm's names, and the text of our metadata entry, None in other people's files.

    The first bytes tell the kind of file. Raises CheckpointError, without the file's name, when it cannot be read.
    """
    try:
        if not path.is_file():
            raise CheckpointError("is not a file" if path.exists() else "there is no such file")
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from error
    metadata = None
    if start[8:] == b"{":  # safetensors: the header's length in eight bytes, then the header, which is JSON
        tensors, metadata = _read_safetensors(path)
    elif start.startswith((b"PK", b"\x80")):  # torch.save: a zip archive, or before PyTorch 1.6 a bare pickle
        tensors = _read_pickle(path, zipped=start.startswith(b"PK"))
    else:
        raise CheckpointError("is empty" if not start else "is not a checkpoint (.safetensors, .pth or .pth.tar)")
    return _with_timm_names(tensors), metadata


def read_metadata(path: Path) -> str | None:
    """The text of our metadata entry in a safetensors file, None in other people's; no tensor is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(METADATA_KEY)
    except Exception as error:
        raise CheckpointError(f"cannot be read as safetensors: {error_summary(error)}") from error


def infer_config(tensors: dict[str, Tensor]) -> ConvMixerConfig:
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


def checked_tensors(tensors: dict[str, Tensor], config: ConvMixerConfig) -> dict[str, Tensor]:
    """The tensors as contiguous float32 on the CPU (batch counters as int64), if they are exactly those of ``config``.

    Tensors that are so already are not copied. Raises CheckpointError naming the first tensors that are missing, left
    over, of another shape, or not finite.
    """
    _check_shapes(tensors, config)
    plain = {}
    for name, tensor in tensors.items():
        dtype = torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        plain[name] = tensor.detach().to("cpu", dtype).contiguous()
        # A sum is finite unless a value is not, or it overflows: only then is every value looked at.
        if not plain[name].sum().isfinite() and not plain[name].isfinite().all():
            raise CheckpointError(f"tensor {name!r:.80} holds NaN or infinite values; the training may have diverged")
    return plain


def _check_shapes(tensors: dict[str, Tensor], config: ConvMixerConfig) -> None:
    # islice: a config out of a hostile file may ask for a billion blocks.
    problems = list(islice(_problems(tensors, config), MOST_PROBLEMS_SHOWN))
    if problems:
        raise CheckpointError(f"does not fit {config}: {'; '.join(problems)}")


def _problems(tensors: dict[str, Tensor], config: ConvMixerConfig) -> Iterator[str]:
    expected = set()
    for name, shape in _expected_shapes(config):
        expected.add(name)
        if name not in tensors:
            yield f"{name!r:.80} is missing"
        elif tensors[name].shape != shape:
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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get(METADATA_KEY)
    except Exception as error:  # not SafetensorError alone: it knows number types that torch does not
        raise CheckpointError(f"is truncated, damaged or no checkpoint: {error_summary(error)}") from error


class _Ignored:
    """Stands in for the harmless objects beside the weights in a training checkpoint; their content is dropped."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


# timm's saver keeps the command line; the authors' learning rates, from np.interp, are NumPy numbers (module names
# before and since NumPy 2).
_IGNORED_GLOBALS = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    )
]
_process_wide_settings = threading.Lock()  # torch's list of globals and the warning filters are not a thread's own


def _read_pickle(path: Path, *, zipped: bool) -> dict[str, Tensor]:
    try:
        with _process_wide_settings, torch.serialization.safe_globals(_IGNORED_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols and sparse tensors: they end as errors below
            with open(path, "rb") as file:
                check_pickles(file)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PickleError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # a damaged pickle can trip torch into nearly any exception
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise CheckpointError(
                f"is refused, it could run code ({forbidden[1]!r:.80}); save a state_dict alone"
            ) from error
        raise CheckpointError(f"is truncated, damaged or no checkpoint: {error_summary(error)}") from error
    tensors = _find_state_dict(content)
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            raise CheckpointError(f"holds no state_dict: {name!r:.80} is of type {type(tensor).__name__}, not a tensor")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise CheckpointError(f"tensor {name!r:.80} is not a plain array")
        if tensor.is_complex():
            raise CheckpointError(f"tensor {name!r:.80} holds complex numbers")
    # A stride of zero lets a tiny file claim a huge tensor, which the conversion to float32 would then really make.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > os.path.getsize(path):
        raise CheckpointError("claims more values than the file has room for")
    return tensors


def _find_state_dict(content: object) -> dict:
    if isinstance(content, dict):
        nested = (content.get(key) for key in STATE_DICT_KEYS)
        content = next((value for value in nested if isinstance(value, dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError("holds no state_dict; it must be a dictionary of tensors")
    return content


def _with_timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {WRAPPER_PREFIXES.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    if "0.weight" in tensors:
        numbers = [int(match[1]) for name in tensors if (match := NUMBERED_NAME.fullmatch(name))]
        tensors = {_timm_name(name, head=max(numbers)): tensor for name, tensor in tensors.items()}
    for name in [name for name in tensors if name.endswith(".running_mean")]:
        # Missing in files from before PyTorch 0.4.1; inference does not use it.
        tensors.setdefault(name.removesuffix("running_mean") + "num_batches_tracked", torch.tensor(0))
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
