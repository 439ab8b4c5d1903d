"""The models a visitor can choose from, each loaded at its first use."""

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from convmixer import CheckpointError, Classifier, ModelError, load_checkpoint, zoo
from convmixer.config import ConvMixerConfig, count_parameters
from convmixer.weights import Checkpoint, read_description

MAX_OWN = 4  # visitors' checkpoints kept in memory; the one that was used longest ago goes first
# What one picture may cost in a visitor's checkpoint. The largest published model, 1536/20, needs 51 billion
# multiplications and 1.6 million values; a file of a few bytes could ask for ten thousand times as much.
MAX_MULTIPLICATIONS = 100e9
MAX_VALUES = 64e6


@dataclass(frozen=True)
class Own:
    """A visitor's checkpoint: what the page calls it, and its file among the uploads."""

    name: str
    path: Path


class Models:
    """The named models on this machine, the files named at the start, and visitors' own checkpoints.

    files: checkpoints to offer besides the named models, the first of which becomes the default; names are allowed
        too. Without any the default is what "auto" means. Raises what `convmixer.zoo.load` raises for each of them.
    """

    def __init__(self, files: list[str] | tuple[str, ...] = ()):
        self._lock = threading.Lock()
        self._loaded: dict[str, Classifier] = {}
        self._own: OrderedDict[Path, Classifier] = OrderedDict()
        for file in files or ["auto"]:
            classifier = Classifier(file)
            name = classifier.name if file in zoo.MODELS else unused(classifier.name, self._loaded)
            self._loaded[name] = classifier
        self.default = next(iter(self._loaded))

    def names(self) -> list[str]:
        """The models that can answer at once, the default first."""
        here = [name for name in zoo.MODELS if name not in self._loaded and zoo.local_path(name)]
        return sorted({*self._loaded, *here}, key=lambda name: (name != self.default, name))

    def missing(self) -> list[dict]:
        """A row, as in `convmixer.zoo.list_models`, for each named model that is not here, the smallest first."""
        rows = [row for row in zoo.list_models() if row["path"] is None and row["name"] not in self._loaded]
        return sorted(rows, key=lambda row: row["parameters"])

    def name(self, asked: str) -> str:
        """What a model is called that was asked for as ``asked``, which may be "auto"."""
        return self.default if asked == "auto" else asked

    def get(self, name: str, own: Sequence[Own] = ()) -> Classifier:
        """The classifier called ``name``: one of names(), "auto" for the default, or one of the visitor's own.

        Nothing is downloaded. Raises ModelError or CheckpointError.
        """
        for each in own:
            if each.name == name:
                return self._get_own(each)
        name = self.name(name)
        with self._lock:
            if name not in self._loaded:
                if name not in zoo.MODELS or zoo.local_path(name) is None:
                    raise ModelError(f"{name!r:.80} is not on this machine; choose one of {', '.join(self.names())}")
                self._loaded[name] = Classifier(name)
            return self._loaded[name]

    def describe(self, name: str) -> str:
        """One line about one of names(), for the picker: name, number of classes, accuracy where it is known."""
        top1 = self._about(name).accuracy.get("top1")
        return f"{name} · {self.classes(name):,} classes" + (f", {top1:.1f} % right" if top1 else "")

    def classes(self, name: str) -> int:
        """How many classes one of names() has."""
        return self._about(name).config.num_classes

    def _about(self, name: str):
        """What has the accuracy and the config of one of names()."""
        if name in self._loaded:
            return self._loaded[name]
        entry = zoo.MODELS[name]
        return (entry.shipped and read_description(zoo.local_path(name))) or entry

    def download(self, name: str, progress: Callable[[int, int | None], None]) -> None:
        """Fetch a named model. Raises ModelError or DownloadError."""
        if name not in zoo.MODELS:
            raise ModelError(f"there is no model {name!r:.80}; choose one of {', '.join(zoo.MODELS)}")
        zoo.download(name, progress)

    def add_own(self, path: Path, file_name: str, own: Sequence[Own] = ()) -> Own:
        """A visitor's checkpoint, read and checked. Raises CheckpointError, whose text names no folder of the server.

        path: the uploaded file; file_name: what the visitor called it; own: those that the visitor has already.
        """
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"{file_name} {str(error).removeprefix(f'{path}: ')}") from error
        check_cost(checkpoint, file_name)
        name = unused(f"yours: {checkpoint.name[:60]}", [each.name for each in own])
        self._get_own(Own(name, path))
        return Own(name, path)

    def _get_own(self, own: Own) -> Classifier:
        with self._lock:
            if own.path not in self._own:
                if not own.path.is_file():
                    raise CheckpointError("your checkpoint has been deleted after an hour; upload it again")
                self._own[own.path] = Classifier(own.path)
                while len(self._own) > MAX_OWN:
                    self._own.popitem(last=False)
            self._own.move_to_end(own.path)
            return self._own[own.path]


def unused(name: str, used: Collection[str]) -> str:
    """``name``, or with a number where it is taken: two files may say the same of themselves."""
    names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
    return next(each for each in names if each not in used)


def check_cost(checkpoint: Checkpoint, file_name: str) -> None:
    """Raises CheckpointError for a network that would need more than this page can give it."""
    config, side = checkpoint.config, checkpoint.preprocessing.size // checkpoint.config.patch_size
    if config.dim * side**2 > MAX_VALUES or multiplications(config, side) > MAX_MULTIPLICATIONS:
        raise CheckpointError(
            f"{file_name} needs too much arithmetic for a web page "
            f"({multiplications(config, side) / 1e9:,.0f} billion multiplications a picture); "
            "use it with the command line: python -m convmixer classify --model FILE"
        )


def multiplications(config: ConvMixerConfig, side: int) -> float:
    """Of one picture with side x side patches; the weights' number times the positions each is used at."""
    return float(side**2 * (count_parameters(config) - (config.dim + 1) * config.num_classes))
