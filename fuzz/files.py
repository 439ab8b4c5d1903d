"""Files for the fuzzing of checkpoints: valid ones of every kind that is read, and hostile safetensors."""

import argparse
import io
import json
import re
import struct
from collections import OrderedDict
from functools import cache

import numpy as np
import safetensors.torch
import torch

from convmixer.model import ConvMixer, ConvMixerConfig
from fuzz.mutations import Rng, chance, pick

CONFIG = ConvMixerConfig(dim=4, depth=1, kernel_size=3, patch_size=2, num_classes=3)
LABELS = ("ant", "bee", "cow")


@cache
def _state_dict() -> dict:
    torch.manual_seed(0)
    return ConvMixer(CONFIG).state_dict()


def tiny(rng: Rng, shared: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a tiny network, in a type that is read.

    shared: all are views of one, and there are no batch counters, as before PyTorch 0.4.1.
    """
    kind = pick(rng, (torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64))
    if shared:
        tensors = {name: tensor for name, tensor in _state_dict().items() if tensor.is_floating_point()}
        parts = (
            torch.cat([tensor.flatten() for tensor in tensors.values()])
            .to(kind)
            .split([*map(torch.numel, tensors.values())])
        )
        return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
    return {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in _state_dict().items()}


def description() -> dict:
    preprocessing = {"size": 8, "resize": 8, "crop_pct": 1.0, "interpolation": "bicubic"}
    return {
        "format_version": 1,
        "name": "tiny",
        "architecture": CONFIG.to_dict(),
        "labels": list(LABELS),
        "preprocessing": preprocessing | {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "training": {"seed": 0},
        "accuracy": {"top1": 33.3},
    }


# Whole files.


def ours(rng: Rng) -> bytes:
    return safetensors.torch.save(tiny(rng), {"convmixer": json.dumps(description())})


def bare(rng: Rng) -> bytes:
    """safetensors without metadata, as timm writes them."""
    return safetensors.torch.save(tiny(rng), {"format": "pt"} if chance(rng, 0.5) else None)


def training_checkpoint(rng: Rng, shared: bool = True) -> dict:
    """A state_dict alone, or as training scripts write it beside other things; ``shared`` as for tiny."""
    prefix = "module." if chance(rng, 0.3) else ""
    tensors = OrderedDict((prefix + name, tensor) for name, tensor in tiny(rng, shared).items())
    if chance(rng, 0.3):
        return tensors
    content = {"epoch": 3, "arch": "convmixer", "state_dict": tensors, "args": None}
    content["args"] = argparse.Namespace(lr=0.1, img_size=8, mean=[0.5], model_kwargs={"act_layer": "gelu"})
    if chance(rng, 0.5):
        content |= {"state_dict_ema": tensors, "metric": np.float64(0.5)}
    return content


def saved(content: object, zipped: bool) -> bytes:
    """As torch.save writes it: a zip archive, or as before PyTorch 1.6."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    if zipped:
        return stream.getvalue()
    # There a tensor's memory is called by its address, and several are sorted by it: with one, and another name for it,
    # the file is the same every time.
    numbers: dict[bytes, bytes] = {}

    def renamed(match: re.Match) -> bytes:
        return b"X\x0e\0\0\0" + numbers.setdefault(match[1], b"%014d" % len(numbers))

    return re.sub(rb"X[\x0c-\x10]\0\0\0(\d{12,16})", renamed, stream.getvalue())


def zipped(rng: Rng) -> bytes:
    return saved(training_checkpoint(rng, shared=False), True)


def legacy(rng: Rng) -> bytes:
    return saved(training_checkpoint(rng), False)


# safetensors with a header of our making.

HOSTILE_VALUES = (
    None, True, -1, 0, 1, 2, 4, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, float("nan"), float("inf"), "", "x",
    "\n\x1b[31m", "\ud800", "a" * 5000, [], {}, [[]], [[[[1]]]], {"a": {}}, [None], "relu", "nearest", 4096, 8192, 0.5,
    1e-300, [0.5] * 3, [0, 0, 0], [1e39] * 3, ["ant"] * 1000, "../../x", "4", [4], 1.0, 4.0,
)  # fmt: skip


def changed_tree(rng: Rng, value: object, depth: int = 0) -> object:
    """A JSON value in which one thing is another, missing, or there twice."""
    if isinstance(value, dict) and value and not (depth and chance(rng, 0.15)):
        key = pick(rng, list(value))
        match int(rng.integers(8)):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return value | {pick(rng, ("extra", "dim", "stem.0.weight", "__metadata__", "a\nb", "")): value[key]}
            case 2:
                return dict.fromkeys(value, value[key])
            case _:
                return value | {key: changed_tree(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and chance(rng, 0.7):
        at = int(rng.integers(len(value)))
        match int(rng.integers(4)):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return [*value, *[value[at]] * int(pick(rng, (1, 2, 1000)))]
            case _:
                return [*value[:at], changed_tree(rng, value[at], depth + 1), *value[at + 1 :]]
    if isinstance(value, int) and chance(rng, 0.3):
        return value + int(rng.integers(-3, 4))
    return pick(rng, HOSTILE_VALUES)


def changed_text(rng: Rng, text: str) -> str:
    """JSON that is odd as a text: nested too deep, numbers too long, keys twice."""
    match int(rng.integers(7)):
        case 0:
            return "[" * int(pick(rng, (10, 1000, 100_000)))
        case 1:
            depth = int(pick(rng, (50, 990, 5000, 100_000)))
            return text.replace("3", "[" * depth + "]" * depth, 1)
        case 2:
            return text.replace("4", "4" * int(pick(rng, (20, 400, 5000))), 1)
        case 3:
            return text[:-1] + ", " + text[1:]
        case 4:
            return text[: int(rng.integers(len(text)))]
        case 5:
            return text.replace('"', pick(rng, ("'", '"\\u0000', "\\")), int(rng.integers(1, 4)))
        case _:
            return pick(rng, ("NaN", "null", "[]", "{}", "1", '"x"', "-Infinity", "\ufeff" + text, ""))


def hostile_description(rng: Rng) -> bytes:
    """Our own file, whose metadata entry says something else."""
    changed = description()
    for _ in range(int(rng.integers(1, 4))):
        changed = changed_tree(rng, changed)
        changed = changed if isinstance(changed, dict) else {"format_version": 1, "name": changed}
    text = json.dumps(changed)
    text = changed_text(rng, text) if chance(rng, 0.25) else text
    return safetensors.torch.save(tiny(rng), {"convmixer": text})


def hostile_header(rng: Rng) -> bytes:
    """safetensors whose header lies about types, shapes, offsets or its own length."""
    whole = ours(rng)
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for _ in range(int(rng.integers(1, 3))):
        name = pick(rng, list(header))
        if chance(rng, 0.6) and isinstance(header[name], dict) and name != "__metadata__":
            field, values = pick(
                rng,
                (
                    ("dtype", ("F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "F32", "x", 7, None)),
                    (
                        "shape",
                        ([], [0], [-1], [2**63], [2**32, 2**32], [4], [1] * 500, [4, 1, 3, 3], "4", None, [0, 2**60]),
                    ),
                    (
                        "data_offsets",
                        ([0, 0], [0, 2**63], [2**63, 0], [0], [-4, 0], [0, 16], [0, len(data)], None, "0"),
                    ),
                ),
            )
            header[name] = header[name] | {field: pick(rng, values)}
        else:
            header = changed_tree(rng, header)
            if not isinstance(header, dict) or not header:
                break
    text = json.dumps(header)
    text = (changed_text(rng, text) if chance(rng, 0.2) else text).encode(errors="surrogatepass")
    said = len(text) if chance(rng, 0.85) else pick(rng, (0, 1, len(text) - 1, 2**31, 2**63, 2**64 - 1, 100_000_001))
    if not text.startswith(b"{") and chance(rng, 0.5):
        text = b"{" + text
    return struct.pack("<Q", said) + text + data[: len(data) if chance(rng, 0.8) else int(rng.integers(len(data)))]
