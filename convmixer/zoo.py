"""The named models: what each is, how well it does, and where its weights are.

Environment: ``CONVMIXER_CACHE`` is the folder of downloaded weights, ``COG_WEIGHTS`` the file that "auto" means.
"""

import difflib
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from .config import ConvMixerConfig, count_parameters
from .download import DiskError, DownloadError, Progress, fetch
from .preprocessing import CIFAR10, IMAGENET, Preprocessing
from .weights import (
    CHECKPOINT_SUFFIXES,
    Checkpoint,
    CheckpointError,
    imagenet_labels,
    load_checkpoint,
    read_description,
)

HUB = "https://huggingface.co/timm"
AUTHORS = "https://github.com/tmp-iclr/convmixer/releases/download/v1.0"
ASSETS = Path(__file__).parent / "assets"
CACHED_SUFFIXES = (".safetensors", ".pth.tar")  # files in the cache are as their source has them


class ModelError(ValueError):
    """No such model: one line with the models that there are."""


@dataclass(frozen=True)
class ModelEntry:
    """One named model. It is either shipped with the package or has sources to download from, the best one first."""

    name: str
    config: ConvMixerConfig
    preprocessing: Preprocessing
    accuracy: dict  # as in Checkpoint; {} for a shipped model, whose file says it
    sources: tuple[str, ...] = ()
    shipped: Path | None = None


def _imagenet_model(name: str, config: ConvMixerConfig, top1: float, top5: float, authors_file: str) -> ModelEntry:
    accuracy = {"top1": top1, "top5": top5, "data": "ImageNet-1k validation", "images": 50_000, "measured_by": "timm"}
    sources = (f"{HUB}/{name}.in1k/resolve/main/model.safetensors", f"{AUTHORS}/{authors_file}")
    return ModelEntry(name, config, IMAGENET, accuracy, sources)


# The accuracy is that of timm's results table, at 224 pixels with IMAGENET's preprocessing:
# https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv
MODELS = {
    entry.name: entry
    for entry in (
        _imagenet_model(
            "convmixer_1536_20",
            ConvMixerConfig(1536, 20, kernel_size=9, patch_size=7),
            top1=81.382,
            top5=95.618,
            authors_file="convmixer_1536_20_ks9_p7.pth.tar",
        ),
        _imagenet_model(
            "convmixer_768_32",
            ConvMixerConfig(768, 32, kernel_size=7, patch_size=7, activation="relu"),
            top1=80.158,
            top5=95.070,
            authors_file="convmixer_768_32_ks7_p7_relu.pth.tar",
        ),
        _imagenet_model(
            "convmixer_1024_20_ks9_p14",
            ConvMixerConfig(1024, 20, kernel_size=9, patch_size=14),
            top1=76.944,
            top5=93.364,
            authors_file="convmixer_1024_20_ks9_p14.pth.tar",
        ),
        ModelEntry(
            "convmixer_256_8_cifar10",
            ConvMixerConfig(256, 8, kernel_size=5, patch_size=2, num_classes=10),
            CIFAR10,
            accuracy={},
            shipped=ASSETS / "convmixer_256_8_cifar10.safetensors",
        ),
    )
}


def load(model: str | os.PathLike = "auto", progress: Progress | None = None) -> Checkpoint:
    """The checkpoint of a named model, downloaded if it is not here; of ``auto``, see resolve; or of a file.

    Its name is the model's, or for a file what the file says, else the file's own name. Raises ModelError,
    CheckpointError or DownloadError.
    """
    entry, path = _find(model, progress)
    if entry is None:
        return load_checkpoint(path)
    if entry.shipped:
        return replace(load_checkpoint(path), name=entry.name)
    try:
        return replace(load_checkpoint(path, assume=_description(entry)), name=entry.name)
    except CheckpointError as error:
        advice = f"to download it again, run: python -m convmixer download {entry.name}"
        raise CheckpointError(f"{error}; {advice}") from error


def resolve(model: str | os.PathLike = "auto", progress: Progress | None = None) -> tuple[str, Path]:
    """The name and the file of a model, which is downloaded if it was asked for by name and is not here.

    model: a name out of MODELS; a file, told by its suffix or its folder; or ``auto``, which is the file that
    COG_WEIGHTS names, if set, else the most accurate ImageNet model that is here, else the shipped model. For a file
    the name is the file's own. Raises ModelError, CheckpointError or DownloadError.
    """
    entry, path = _find(model, progress)
    return (path.name if entry is None else entry.name), path


def download(name: str, progress: Progress | None = None) -> Path:
    """The file of a named model, downloaded unless it is here and whole. Raises ModelError or DownloadError."""
    entry = _entry(name)
    if entry.shipped:
        if not entry.shipped.is_file():
            raise ModelError(f"{name} is missing from this installation: there is no {entry.shipped}")
        return entry.shipped

    def check(file: Path) -> None:
        load_checkpoint(file, assume=_description(entry))

    while (path := local_path(name)) is not None:
        try:
            check(path)
            return path
        except CheckpointError as error:
            _remove(path, error)
    failures = []
    for url in entry.sources:
        # A file for each source, because they have different formats.
        suffix = next((suffix for suffix in CACHED_SUFFIXES if url.endswith(suffix)), ".safetensors")
        try:
            return fetch([url], cache_dir() / f"{name}{suffix}", progress=progress, check=check)
        except DiskError:
            raise
        except DownloadError as error:
            failures.append(str(error))
    raise DownloadError("; ".join(failures))


def list_models() -> list[dict]:
    """A row for each named model: name, parameters, input_size (pixels), top1 (percent), data (behind top1) and path.

    path is None when the weights are not here; top1 and data are None when they are not known. No weights are read.
    """
    rows = []
    for entry in MODELS.values():
        path = local_path(entry.name)
        about = read_description(path) if entry.shipped and path else entry
        rows.append(
            {
                "name": entry.name,
                "parameters": count_parameters(entry.config),
                "input_size": about.preprocessing.size,
                "top1": about.accuracy.get("top1"),
                "data": about.accuracy.get("data"),
                "path": None if path is None else str(path),
            }
        )
    return rows


def local_path(name: str) -> Path | None:
    """Where the weights of a named model are on this machine, None if they are not. Raises ModelError."""
    entry = _entry(name)
    candidates = [entry.shipped] if entry.shipped else [cache_dir() / f"{name}{suffix}" for suffix in CACHED_SUFFIXES]
    return next((path for path in candidates if os.path.isfile(path)), None)


def cache_dir() -> Path:
    """The folder of downloaded weights; it need not exist."""
    if folder := os.environ.get("CONVMIXER_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder, "convmixer")
    if sys.platform == "win32" and (folder := os.environ.get("LOCALAPPDATA")):
        return Path(folder, "convmixer")
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "convmixer"
    except RuntimeError:  # a container may run as a user without a home
        return Path(tempfile.gettempdir(), "convmixer")


def _find(model: str | os.PathLike, progress: Progress | None) -> tuple[ModelEntry | None, Path]:
    """The entry (None for a file) and the file of what resolve accepts."""
    model = os.fsdecode(model)
    if model == "auto":
        return _find_auto()
    if model in MODELS:
        return MODELS[model], local_path(model) or download(model, progress)
    is_path_like = os.path.basename(model) != model or model.endswith(CHECKPOINT_SUFFIXES)
    if is_path_like or os.path.isfile(model):
        return None, Path(model)
    raise _unknown(model)


def _find_auto() -> tuple[ModelEntry | None, Path]:
    if file := os.environ.get("COG_WEIGHTS"):
        if not os.path.isfile(file):
            raise CheckpointError(f"the file that COG_WEIGHTS names is not there: {file}")
        return None, Path(file)
    here = [entry for entry in MODELS.values() if not entry.shipped and local_path(entry.name)]
    if here:
        best = max(here, key=lambda entry: entry.accuracy["top1"])
        return best, local_path(best.name)
    shipped = next(entry for entry in MODELS.values() if entry.shipped)
    return shipped, download(shipped.name)


def _entry(name: str) -> ModelEntry:
    if name not in MODELS:
        raise _unknown(name)
    return MODELS[name]


def _unknown(name: str) -> ModelError:
    near = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    known = f"There are auto, {', '.join(MODELS)}, and files (model.safetensors)"
    return ModelError(f"there is no model {name!r:.80}{hint} {known}")


def _description(entry: ModelEntry) -> Checkpoint:
    """What is known about a downloaded model, whose file holds nothing but tensors."""
    return Checkpoint(entry.name, entry.config, {}, imagenet_labels(), entry.preprocessing, {}, entry.accuracy)


def _remove(path: Path, reason: CheckpointError) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{reason}; it cannot be replaced: {error.strerror}") from error
