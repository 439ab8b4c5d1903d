"""What a checkpoint is that does not describe itself: what timm says beside the tensors, and guesses at the rest.

timm writes ``config.json`` beside the weights that it saves for the Hub, and its train.py the command line into each
checkpoint. Both use the same names; here they are *facts*, a dictionary.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from .config import PUBLISHED, ConvMixerConfig
from .labels import imagenet_labels
from .preprocessing import CIFAR10, IMAGENET, Preprocessing
from .readers import CheckpointError, error_summary, infer_config

CONFIG = "config.json"
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "model_best.pth.tar", "last.pth.tar")  # the best one first
CHECKPOINT_SUFFIXES = (".safetensors", ".pth.tar", ".pth", ".pt", ".tar", ".bin")
TIMM = Preprocessing(224, 0.875)  # where neither the command line nor the architecture says otherwise


def checkpoint_in(folder: Path) -> Path:
    """The checkpoint in a folder that timm or this project wrote. Raises CheckpointError."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: holds none of {', '.join(FOLDER_FILES)}; name the file")


def name_of(path: Path) -> str:
    """What a checkpoint is called that does not say it: as its file or folder, whichever was named, less the suffix."""
    suffix = next((suffix for suffix in CHECKPOINT_SUFFIXES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix) or path.absolute().name


def read_config(folder: Path) -> dict:
    """The facts in ``config.json``, {} where there is none or it is not about a network. Raises CheckpointError."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or "architecture" not in config:
            return {}
        if isinstance(config["architecture"], dict):  # as train/publish.py writes it
            size, activation = config["preprocessing"]["size"], config["architecture"]["activation"]
            own = {"input_size": [3, size, size], "act_layer": activation, "label_names": config["labels"]}
            return own | config["preprocessing"] | {"architecture": config["name"]}
        facts = config.get("pretrained_cfg", {}) | config | config.get("model_args", {})
        return _said({"label_names": facts.get("labels")} | facts)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"has a {CONFIG} beside it that cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"has a damaged {CONFIG} beside it: {error_summary(error)}") from error


def facts_of_training(architecture: object, arguments: Mapping) -> dict:
    """The facts in what timm's train.py keeps in a checkpoint: its ``arch``, and its ``args`` as a dictionary."""
    options = arguments.get("model_kwargs")
    return _said({"architecture": architecture} | dict(arguments) | (options if isinstance(options, dict) else {}))


def guess(tensors: Mapping[str, np.ndarray], facts: Mapping, labels: Sequence[str] | None) -> dict[str, object]:
    """The config, labels and preprocessing, and what of them was ``assumed``, as the Checkpoint's fields.

    The tensors' shapes come first, then the facts. What neither tells is taken to be as in the published network of
    that name or shape; else as timm does, if it wrote the facts; else ImageNet's for patches of 7 pixels or more, and
    CIFAR-10's for smaller ones. Raises CheckpointError where the facts are not those of these tensors.
    """
    try:
        known = PUBLISHED.get(str(facts.get("architecture")).split(".")[0])
        config, assumed = _architecture(infer_config(tensors), known, facts)
        preprocessing, also_assumed = _preprocessing(config, known, facts)
        labels = labels or _labels(facts)
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"is wrongly described by the {CONFIG} beside it, or its training: {error}") from error
    assumed += also_assumed
    if not labels:
        is_imagenet = config.num_classes == len(imagenet_labels())
        labels = imagenet_labels() if is_imagenet else [f"class {i}" for i in range(config.num_classes)]
        assumed.append("ImageNet's labels" if is_imagenet else "no names for the classes")
    return {
        "config": config,
        "labels": tuple(labels),
        "preprocessing": preprocessing,
        "assumed": tuple(assumed),
    }


def _said(facts: dict) -> dict:
    """Only what is said: timm leaves open what it takes from the architecture."""
    return {name: value for name, value in facts.items() if value is not None and value not in ("", [], ())}


def _architecture(
    config: ConvMixerConfig, known: ConvMixerConfig | None, facts: Mapping
) -> tuple[ConvMixerConfig, list[str]]:
    """``config``, which the shapes showed, with the activation, which they do not."""
    classes = facts.get("num_classes", config.num_classes)
    if classes != config.num_classes:
        raise ValueError(f"num_classes is {classes!r:.80}, and the tensors have {config.num_classes}")
    if "act_layer" in facts:
        return replace(config, activation=str(facts["act_layer"]).split(".")[-1].lower()), []
    if known:
        if not _has_shape_of(known, config):
            raise ValueError(f"it is {facts['architecture']!r:.80}, {known}, and the tensors are of {config}")
        return replace(config, activation=known.activation), []
    if "relu" in str(facts.get("architecture")).lower():
        config = replace(config, activation="relu")
    return config, [{"gelu": "GELU", "relu": "ReLU"}[config.activation]]


def _has_shape_of(known: ConvMixerConfig, config: ConvMixerConfig) -> bool:
    """Whether this is ``known`` but for what a fine-tuning may change, and the activation."""
    free = ("num_classes", "in_chans", "activation")
    return replace(known, **{name: getattr(config, name) for name in free}) == config


def _preprocessing(
    config: ConvMixerConfig, known: ConvMixerConfig | None, facts: Mapping
) -> tuple[Preprocessing, list[str]]:
    is_own = not any(_has_shape_of(known, config) for known in PUBLISHED.values())
    base = TIMM if facts and is_own else IMAGENET if config.patch_size >= 7 else CIFAR10
    said = {name: facts[name] for name in ("crop_pct", "interpolation") if name in facts}
    for name in ("mean", "std"):
        if name in facts:
            values = tuple(facts[name])
            said[name] = values * 3 if len(values) == 1 else values
    if "input_size" in facts or "img_size" in facts:
        size = facts["input_size"] if "input_size" in facts else [0, facts["img_size"], facts["img_size"]]
        if not isinstance(size, list | tuple) or len(size) != 3 or size[1] != size[2]:
            raise ValueError(f"input_size is {size!r:.80}; it must be channels, height and width of a square")
        said["size"] = size[1]
    preprocessing = Preprocessing(**asdict(base) | said)
    if known:
        assumed = []
    else:
        texts = {"size": f"{base.size} pixels", "crop_pct": f"crop {base.crop_pct}", "interpolation": "bicubic"}
        whose = "CIFAR-10's" if base is CIFAR10 else "ImageNet's"
        texts |= {"mean": f"{whose} mean", "std": f"{whose} std"}
        assumed = [text for name, text in texts.items() if name not in said]
    if facts.get("crop_mode", "center") != "center":
        assumed.append(f"a crop of the centre, and not {facts['crop_mode']!r:.80}")
    return preprocessing, assumed


def _labels(facts: Mapping) -> list[str]:
    """The labels that the facts hold, [] if they hold none: a list, or a dictionary from indices."""
    names, descriptions = facts.get("label_names", []), facts.get("label_descriptions", {})
    if isinstance(names, dict):
        names = [names[index] for index in sorted(names, key=int)]
    return [str(descriptions.get(name, name)) for name in names]
