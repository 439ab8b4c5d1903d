"""The classifier: a network, its preprocessing and its labels, loaded once and used for any number of pictures."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from . import zoo
from .bulk import prepared
from .engine import find_device, open_engine
from .explain import HeatMap, class_activation_map
from .images import ImageError, load_image, read_all
from .preprocessing import crop_box, preprocess
from .readers import as_array, release
from .weights import Checkpoint

if TYPE_CHECKING:
    from .model import ConvMixer

# Pictures that are in memory together. The engine goes through them as it suits the device.
SLICE = 64
HEATMAP_DETAIL = 1024  # pixels: a picture under a heat map is not read at a smaller short side


@dataclass(frozen=True)
class Prediction:
    """One class of an answer; ``score`` is its share of the softmax over all classes, 0 to 1."""

    label: str
    index: int
    score: float


class Classifier:
    """Classifies pictures.

    A picture is whatever `convmixer.images.load_image` reads (path, bytes, file, PIL image), or an array that `prepare`
    gave.

    model: a name of `convmixer.zoo.MODELS`, "auto", "hf:USER/NAME[@REVISION]" on the Hugging Face Hub, a checkpoint
        file, or a folder that timm wrote; what was asked for by name is downloaded once.
    device: "cpu", "cuda", "cuda:1", ...; by default the GPU where there is one.
    precision: what most of the arithmetic is done in. "float32" gives the network's own logits; "bfloat16", "float16"
        and "int8" are faster and less exact, where the processor has them. By default what the environment variable
        CONVMIXER_PRECISION says, else "auto": float32 on a CPU, 16 bits on a GPU.
    allow_truncated: take pictures whose file ends too early, as `load_image` does.
    engine: "kernel" (this project's), "numpy", "torch", or "auto", the fastest here; see `convmixer.engine.choose`.
    progress: called with (bytes so far, total bytes or None) during a download.
    labels: one text for each class, in the place of the model's own; see `convmixer.labels.read_labels`.

    Raises what `convmixer.zoo.load` raises for the model, and ValueError for a device, precision or engine that cannot
    be used. The methods raise ImageError for a picture that cannot be read.
    """

    def __init__(
        self,
        model: str = "auto",
        *,
        device: str | None = None,
        precision: str | None = None,
        engine: str = "auto",
        allow_truncated: bool = False,
        progress: Callable[[int, int | None], None] | None = None,
        labels: Sequence[str] | None = None,
    ):
        self.device = find_device(device and str(device), engine)  # first: a mistake should not cost a download
        precision = precision or os.environ.get("CONVMIXER_PRECISION") or "auto"
        checkpoint: Checkpoint = zoo.load(model, progress, labels)
        self.allow_truncated = allow_truncated
        self.name = checkpoint.name
        self.config = checkpoint.config
        self.labels = checkpoint.labels
        self.preprocessing = checkpoint.preprocessing
        self.accuracy = checkpoint.accuracy
        self.training = checkpoint.training
        self.weights = checkpoint.state_dict  # float32 arrays under timm's names
        self.engine = open_engine(self.config, self.weights, self.device, engine, precision)
        if self.engine.name != "torch":
            release(self.weights)

    @cached_property
    def network(self) -> "ConvMixer":
        """The network in PyTorch, in evaluation mode, on the device; built when it is first asked for."""
        from .model import build

        return getattr(self.engine, "network", None) or build(self.config, self.weights).to(self.device).eval()

    @property
    def heatmap_side(self) -> int:
        """The ``target_size``, in pixels, at which load_image should read a picture that gets a heat map."""
        return max(HEATMAP_DETAIL, self.preprocessing.resize)

    def warm_up(self, batch: int = 1) -> None:
        """Do now what the first answers about 1 to ``batch`` pictures at a time would wait for."""
        self.engine.warm_up(self.preprocessing.size, batch)

    def classify(self, image, top_k: int = 5) -> list[Prediction]:
        """The ``top_k`` best classes of one picture, best first; all of them where there are fewer."""
        _check_top_k(top_k)
        return self.ranked(self.scores([image])[0], top_k)

    def classify_many(self, images: Iterable, top_k: int = 5, errors: str = "raise") -> list:
        """`classify` for each picture, in order; they are decoded on all cores, and only a few are in memory at a time.

        errors: "raise", or "return" to get the ImageError of a picture that cannot be read in the place of its answer.
        """
        return [answer for batch in self.answers(images, top_k, errors) for answer in batch]

    def answers(
        self,
        images: Iterable,
        top_k: int = 5,
        errors: str = "raise",
        workers: int | None = None,
        read: Callable = lambda image: image,
    ) -> Iterator[list]:
        """`classify_many`, as the answers come: lists of up to SLICE.

        workers: pictures that are decoded at a time. read: makes a picture of what stands for it, in those workers.
        """
        _check_top_k(top_k)
        if errors not in ("raise", "return"):
            raise ValueError(f"errors is {errors!r}; it must be 'raise' or 'return'")
        for batch in prepared(images, lambda image: self.prepare(read(image)), SLICE, workers):
            good = [one for one in batch if not isinstance(one, ImageError)]
            broken = next((one for one in batch if isinstance(one, ImageError)), None)
            if broken and errors == "raise":
                raise broken
            ranked = iter([self.ranked(row, top_k) for row in softmax(self._logits(good))])
            yield [one if isinstance(one, ImageError) else next(ranked) for one in batch]

    def scores(self, images: Iterable) -> np.ndarray:
        """The softmax over all classes, float32 (N, classes), of N pictures."""
        return softmax(self.logits(images))

    def logits(self, images: Iterable) -> np.ndarray:
        """The network's logits, float32 (N, classes), of N pictures."""
        images, rows = iter(images), [np.empty((0, self.config.num_classes), np.float32)]
        while slice_ := list(islice(images, SLICE)):
            rows.append(self._logits([self.prepare(image) for image in slice_]))
        return np.concatenate(rows)

    def _logits(self, prepared: list[np.ndarray]) -> np.ndarray:
        if not prepared:
            return np.empty((0, self.config.num_classes), np.float32)
        return self.engine.run(np.stack(prepared))[0]

    def features(self, image) -> np.ndarray:
        """The feature maps of one picture behind the stem and behind each block: float32 (depth + 1, dim, h, w)."""
        return self.engine.run(self.prepare(image)[None], stages=self.config.depth + 1)[1][:, 0]

    def prepare(self, image) -> np.ndarray:
        """One picture as the network's input: normalised float32 (3, size, size), far smaller than most pictures.

        An array, or a tensor of PyTorch's, is taken to be prepared already. Raises ImageError for one of another shape
        or type.
        """
        if not hasattr(image, "dtype"):
            return preprocess(self._load(image, self.preprocessing.resize), self.preprocessing)
        prepared, side = as_array(image), self.preprocessing.size
        shape = (self.config.in_chans, side, side)
        if prepared.shape != shape or prepared.dtype != np.float32:
            raise ImageError(
                f"an array is a prepared picture, float32 {shape}; this one is {prepared.dtype} {prepared.shape}:"
                " give pixels as PIL.Image.fromarray(array)"
            )
        return prepared

    def heatmap(self, image, index: int | None = None) -> HeatMap:
        """The class activation map of class ``index``, by default the best one. Raises ValueError for no such class."""
        return self.classify_with_heatmap(image, index=index)[1]

    def classify_with_heatmap(
        self, image, top_k: int = 5, index: int | None = None
    ) -> tuple[list[Prediction], HeatMap]:
        """`classify` and `heatmap` in one pass through the network."""
        _check_top_k(top_k)
        classes = self.config.num_classes
        if index is not None and not 0 <= index < classes:
            raise ValueError(f"index is {index}; {self.name} has the classes 0 to {classes - 1}")
        picture, features, scores = self._look(image)
        index = int(scores.argmax()) if index is None else index
        return self.ranked(scores, top_k), self.heat_map(picture, features, index)

    def classify_with_heatmaps(self, image, top_k: int = 5) -> tuple[list[Prediction], list[HeatMap]]:
        """`classify`, and the `heatmap` of each of its classes in the same order, in one pass through the network."""
        _check_top_k(top_k)
        picture, features, scores = self._look(image)
        predictions = self.ranked(scores, top_k)
        return predictions, [self.heat_map(picture, features, prediction.index) for prediction in predictions]

    def _load(self, image, target_size: int) -> Image.Image:
        return load_image(image, target_size=target_size, allow_truncated=self.allow_truncated)

    def _look(self, image) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """The picture to show; of what `prepare` gives, the last feature map (dim, h, w) and the scores (classes,)."""
        if hasattr(image, "read"):
            image = read_all(image)  # for it is read twice, each time at the size that suits
        picture = self._load(image, self.heatmap_side)
        logits, features = self.engine.run(self.prepare(image)[None], stages=1)
        return picture, features[0, 0], softmax(logits)[0]

    def heat_map(self, picture: Image.Image, features: np.ndarray, index: int) -> HeatMap:
        """The heat map of one class over an RGB picture, from the picture's last feature map (dim, h, w)."""
        weight, bias = self.weights["head.weight"][index], self.weights["head.bias"][index]
        values = class_activation_map(features, weight, bias)
        return HeatMap(self.labels[index], index, values, crop_box(picture.size, self.preprocessing), picture)

    def ranked(self, scores: np.ndarray, top_k: int) -> list[Prediction]:
        """The ``top_k`` best of the scores (classes,) of one picture."""
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [Prediction(self.labels[index], index, float(scores[index])) for index in best.tolist()]


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax of each row of float32 (N, classes)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _check_top_k(top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1")
