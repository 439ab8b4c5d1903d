"""The named models: what each is, how well it does, and where its weights are.

Weights come from the Hugging Face Hub, into its cache, or else from the authors' release, into our own.

Environment: ``CONVMIXER_CACHE`` is the folder of files from the authors' release, or put there by hand;
``COG_WEIGHTS`` the file, or timm's folder, that "auto" means; ``HF_HOME`` and others are huggingface_hub's.
"""

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import hub
from .config import PUBLISHED, ConvMixerConfig, count_parameters
from .download import DownloadError, Progress, fetch
from .engine import say_once
from .guess import CHECKPOINT_SUFFIXES
from .labels import imagenet_labels
from .preprocessing import CIFAR10, IMAGENET, Preprocessing
from .weights import Checkpoint, CheckpointError, load_checkpoint, read_description

AUTHORS = "https://github.com/tmp-iclr/convmixer/releases/download/v1.0"
ASSETS = Path(__file__).parent / "assets"
CACHED_SUFFIXES = (".safetensors", ".pth.tar")  # of files put there by hand, and of the authors' release
ON_THE_HUB = re.compile(rf"{hub.PREFIX}([\w.-]+/[\w.-]+)(?:@((?!.*\.\.)[\w./-]+))?", re.ASCII)


class ModelError(ValueError):
    """No such model: one line with the models that there are."""


@dataclass(frozen=True)
class ModelEntry:
    """One named model. It is either shipped with the package or has sources to download from."""

    name: str
    config: ConvMixerConfig
    preprocessing: Preprocessing
    accuracy: dict  # as in Checkpoint; {} for a shipped model, whose file says it
    repo: str | None = None  # on the Hugging Face Hub
    release: str | None = None  # the authors' file, the second source
    shipped: Path | None = None


def _imagenet_model(name: str, top1: float, top5: float, authors_file: str) -> ModelEntry:
    accuracy = {"top1": top1, "top5": top5, "data": "ImageNet-1k validation", "images": 50_000, "measured_by": "timm"}
    return ModelEntry(name, PUBLISHED[name], IMAGENET, accuracy, f"timm/{name}.in1k", f"{AUTHORS}/{authors_file}")


# The accuracy is that of timm's results table, at 224 pixels with IMAGENET's preprocessing:
# https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv
MODELS = {
    entry.name: entry
    for entry in (
        _imagenet_model("convmixer_1536_20", 81.382, 95.618, "convmixer_1536_20_ks9_p7.pth.tar"),
        _imagenet_model("convmixer_768_32", 80.158, 95.070, "convmixer_768_32_ks7_p7_relu.pth.tar"),
        _imagenet_model("convmixer_1024_20_ks9_p14", 76.944, 93.364, "convmixer_1024_20_ks9_p14.pth.tar"),
        ModelEntry(
            "convmixer_256_8_cifar10",
            ConvMixerConfig(256, 8, kernel_size=5, patch_size=2, num_classes=10),
            CIFAR10,
            accuracy={},
            shipped=ASSETS / "convmixer_256_8_cifar10.safetensors",
        ),
    )
}


def load(
    model: str | os.PathLike = "auto", progress: Progress | None = None, labels: Sequence[str] | None = None
) -> Checkpoint:
    """The checkpoint of whatever resolve accepts, downloaded if it is not here.

    Its name is the model's, or for a file what the file says, else the file's own name. ``labels``, one for each class,
    take the place of its own. What had to be assumed about it goes to the logger ``convmixer``, in one line.
    Raises ModelError, CheckpointError or DownloadError.
    """
    name, path = _find(model, progress)
    assume = _description(MODELS[name]) if name in MODELS and not MODELS[name].shipped else None
    try:
        checkpoint = load_checkpoint(path, assume=assume, labels=labels)
    except CheckpointError as error:
        if assume is None:
            raise
        advice = f"to download it again, run: python -m convmixer download {name}"
        raise CheckpointError(f"{error}; {advice}") from error
    if checkpoint.assumed:
        assumed = ", ".join(checkpoint.assumed)
        say_once(f"{os.fsdecode(model)}: assumed {assumed}; timm's config.json beside it would tell")
    return replace(checkpoint, name=name or checkpoint.name)


def resolve(model: str | os.PathLike = "auto", progress: Progress | None = None) -> tuple[str, Path]:
    """The name and the file of a model, which is downloaded if it was asked for by name and is not here.

    model: a name out of MODELS; ``hf:USER/NAME`` or ``hf:USER/NAME@REVISION`` on the Hugging Face Hub; a file, told by
    its suffix or its folder; a folder that timm or train/run.py wrote; or ``auto``, which is the file or folder that
    COG_WEIGHTS names, if set, else the most accurate ImageNet model that is here, else the shipped model. For a file
    or folder the name is its own. Raises ModelError, CheckpointError or DownloadError.
    """
    name, path = _find(model, progress)
    return name or path.name, path


def download(name: str, progress: Progress | None = None) -> Path:
    """The file of a named model, downloaded unless it is here and whole; or of ``hf:USER/NAME``, as it is now.

    Raises ModelError or DownloadError, which says where to put the file by hand.
    """
    if name.startswith(hub.PREFIX):
        return _download_from_hub(name, progress)
    entry = _entry(name)
    if entry.shipped:
        if not entry.shipped.is_file():
            raise ModelError(f"{name} is missing from this installation: there is no {entry.shipped}")
        return entry.shipped

    def check(file: Path) -> None:
        load_checkpoint(file, assume=_description(entry))

    for path in filter(os.path.isfile, _places(entry)):
        try:
            check(path)
            return path
        except CheckpointError as error:
            _remove(path, error)
    try:
        is_damaged = hub.cached(entry.repo, hub.WEIGHTS) is not None
        path = hub.fetch(entry.repo, progress=progress, anew=is_damaged)
        check(path)
        return path
    except (CheckpointError, DownloadError) as error:
        failure = error
    try:
        return fetch(entry.release, cache_dir() / f"{name}.pth.tar", progress, check)
    except DownloadError as error:
        by_hand = f"or put model.safetensors of https://huggingface.co/{entry.repo} at {_places(entry)[0]} by hand"
        raise DownloadError(f"could not download {name}: {failure}; {error}; {by_hand}") from error


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
    return next(filter(os.path.isfile, _places(_entry(name))), None)


def cache_dir() -> Path:
    """Our own folder of weights; it need not exist."""
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


def _find(model: str | os.PathLike, progress: Progress | None) -> tuple[str | None, Path]:
    """The name (None for a file or folder) and the file of what resolve accepts."""
    model = os.fsdecode(model)
    if model == "auto":
        return _find_auto()
    if model in MODELS:
        return model, local_path(model) or download(model, progress)
    if model.startswith(hub.PREFIX):
        repo, revision = _on_the_hub(model)
        config, weights = (hub.cached(repo, file, revision) for file in (hub.CONFIG, hub.WEIGHTS))
        return model, weights if config and weights else _download_from_hub(model, progress)
    is_path_like = os.path.basename(model) != model or model.endswith(CHECKPOINT_SUFFIXES)
    if is_path_like or os.path.exists(model):
        return None, Path(model)
    raise _unknown(model)


def _find_auto() -> tuple[str | None, Path]:
    if file := os.environ.get("COG_WEIGHTS"):
        if not os.path.exists(file):
            raise CheckpointError(f"the file that COG_WEIGHTS names is not there: {file}")
        return None, Path(file)
    here = [entry for entry in MODELS.values() if not entry.shipped and local_path(entry.name)]
    if here:
        best = max(here, key=lambda entry: entry.accuracy["top1"])
        return best.name, local_path(best.name)
    shipped = next(entry for entry in MODELS.values() if entry.shipped)
    return shipped.name, download(shipped.name)


def _places(entry: ModelEntry) -> list[Path]:
    """Where the weights of a named model can be on this machine, what was put there by hand before what was fetched."""
    if entry.shipped:
        return [entry.shipped]
    fetched = hub.cached(entry.repo, hub.WEIGHTS)
    return [*(cache_dir() / f"{entry.name}{suffix}" for suffix in CACHED_SUFFIXES), *([fetched] if fetched else [])]


def _on_the_hub(model: str) -> tuple[str, str]:
    """The repository and the revision that hf:USER/NAME[@REVISION] names. Raises ModelError."""
    match = ON_THE_HUB.fullmatch(model)
    if match is None:
        raise ModelError(f"{model!r:.80} is no model on the Hugging Face Hub: it must be hf:USER/NAME[@REVISION]")
    return match[1], match[2] or "main"


def _download_from_hub(model: str, progress: Progress | None) -> Path:
    repo, revision = _on_the_hub(model)
    try:
        return hub.fetch(repo, revision, progress)
    except DownloadError as error:
        by_hand = f"or put its {hub.CONFIG} and {hub.WEIGHTS} into a folder by hand, and name the folder"
        raise DownloadError(f"could not download {error}; {by_hand}") from error


def _entry(name: str) -> ModelEntry:
    if name not in MODELS:
        raise _unknown(name)
    return MODELS[name]


def _unknown(name: str) -> ModelError:
    near = difflib.get_close_matches(name.lower(), MODELS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    known = f"There are auto, {', '.join(MODELS)}, hf:USER/NAME, files (model.safetensors) and timm's folders"
    return ModelError(f"there is no model {name!r:.80}{hint} {known}")


def _description(entry: ModelEntry) -> Checkpoint:
    """What is known about a downloaded model, whose file holds nothing but tensors."""
    return Checkpoint(entry.name, entry.config, {}, imagenet_labels(), entry.preprocessing, {}, entry.accuracy)


def _remove(path: Path, reason: CheckpointError) -> None:
    """Deletes a damaged file, but not from the Hub's cache, which other programs share and huggingface_hub mends."""
    try:
        if path.is_relative_to(cache_dir()):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadError(f"{reason}; it cannot be replaced: {error.strerror}") from error
