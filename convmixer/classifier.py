"""The classifier: a network, its preprocessing and its labels, loaded once and used for any number of pictures."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from . import zoo
from .cpu.engine import KernelEngine
from .cpu.kernel import PRECISIONS, KernelError
from .explain import HeatMap, class_activation_map
from .images import load_image
from .model import ConvMixer, build, to_arrays
from .preprocessing import crop_box, preprocess
from .weights import Checkpoint

# Pictures that are in memory together. The engine goes through them as it suits the CPU's cache.
SLICE = 64
# Without an engine, pictures run through the network together while one feature map of them all fits in this many
# bytes: larger slices fall out of the cache between two layers, and take longer a picture than one at a time.
CPU_SLICE_BYTES = 4 * 2**20
HEATMAP_DETAIL = 1024  # pixels: a picture under a heat map is not read at a smaller short side


@dataclass(frozen=True)
class Prediction:
    """One class of an answer; ``score`` is its share of the softmax over all classes, 0 to 1."""

    label: str
    index: int
    score: float


class Classifier:
    """Classifies pictures.

    A picture is whatever `convmixer.images.load_image` reads (path, bytes, file, PIL image), or a tensor that `prepare`
    gave.

    model: a name of `convmixer.zoo.MODELS`, "auto", or a checkpoint file; a named model is downloaded once.
    device: "cpu", "cuda", "cuda:1", ...; by default the GPU where there is one.
    precision: what most of the arithmetic is done in: "float32", whose logits are those of the network; on the CPU
        "bfloat16" or "int8", which are faster and less exact, where the processor has them; on a GPU "bfloat16",
        through the kernels of `convmixer.gpu`. By default what the environment variable CONVMIXER_PRECISION says, else
        "float32".
    progress: called with (bytes so far, total bytes or None) during a download.

    Raises what `convmixer.zoo.load` raises for the model, and ValueError for a device or precision that cannot be used.
    The methods raise ImageError for a picture that cannot be read.

    On the CPU the network runs through `convmixer.engine`, and on a GPU in bfloat16 through `convmixer.gpu`, with the
    weights that it had at the start. Else, and on a CPU without a compiler, ``engine`` is None and PyTorch runs it.
    """

    def __init__(
        self,
        model: str = "auto",
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        progress: Callable[[int, int | None], None] | None = None,
    ):
        self.device = choose_device(device)  # first: a mistyped device should not cost a download
        precision = precision or os.environ.get("CONVMIXER_PRECISION") or "float32"
        _check_precision(precision, self.device)
        checkpoint: Checkpoint = zoo.load(model, progress)
        self.name = checkpoint.name
        self.config = checkpoint.config
        self.labels = checkpoint.labels
        self.preprocessing = checkpoint.preprocessing
        self.accuracy = checkpoint.accuracy
        self.training = checkpoint.training
        self.network = build(checkpoint.config, checkpoint.state_dict).to(self.device).eval()
        self.engine = _engine(self.network, precision, self.device)

    @property
    def heatmap_side(self) -> int:
        """The ``target_size``, in pixels, at which load_image should read a picture that gets a heat map."""
        return max(HEATMAP_DETAIL, self.preprocessing.resize)

    def classify(self, image, top_k: int = 5) -> list[Prediction]:
        """The ``top_k`` best classes of one picture, best first; all of them where there are fewer."""
        return self.classify_many([image], top_k)[0]

    def classify_many(self, images: Iterable, top_k: int = 5) -> list[list[Prediction]]:
        """`classify` for each picture, in order. Only one slice of them is in memory at a time."""
        _check_top_k(top_k)
        return [self._ranked(row, top_k) for row in self.scores(images)]

    def scores(self, images: Iterable) -> Tensor:
        """The softmax over all classes, float32 (N, classes) on the CPU, of N pictures."""
        return self.logits(images).softmax(dim=1)

    @torch.inference_mode()
    def logits(self, images: Iterable) -> Tensor:
        """The network's logits, float32 (N, classes) on the CPU, of N pictures."""
        images, rows = iter(images), []
        while slice_ := list(islice(images, self._slice_size())):
            batch = torch.stack([image if isinstance(image, Tensor) else self.prepare(image) for image in slice_])
            rows.append(self._run(batch))
        return torch.cat(rows) if rows else torch.empty(0, self.config.num_classes)

    def prepare(self, image) -> Tensor:
        """One picture as the network's input: normalised float32 (3, size, size), far smaller than most pictures."""
        return preprocess(load_image(image, target_size=self.preprocessing.resize), self.preprocessing)

    def heatmap(self, image, index: int | None = None) -> HeatMap:
        """The class activation map of class ``index``, by default the best one. Raises ValueError for no such class."""
        return self.classify_with_heatmap(image, index=index)[1]

    @torch.inference_mode()
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
        return self._ranked(scores, top_k), self._heatmap(picture, features, index)

    @torch.inference_mode()
    def classify_with_heatmaps(self, image, top_k: int = 5) -> tuple[list[Prediction], list[HeatMap]]:
        """`classify`, and the `heatmap` of each of its classes in the same order, in one pass through the network."""
        _check_top_k(top_k)
        picture, features, scores = self._look(image)
        predictions = self._ranked(scores, top_k)
        return predictions, [self._heatmap(picture, features, prediction.index) for prediction in predictions]

    def _look(self, image) -> tuple[Image.Image, Tensor, Tensor]:
        """The decoded picture, its last feature map (dim, h, w), and its scores (classes,) on the CPU."""
        picture = load_image(image, target_size=self.heatmap_side)
        logits, features = self._run_with_features(preprocess(picture, self.preprocessing)[None])
        return picture, features[0], logits.softmax(dim=1)[0]

    def _run(self, batch: Tensor) -> Tensor:
        """Logits, float32 on the CPU, of a batch (N, 3, H, W) on the CPU."""
        if self.engine:
            return self.engine(batch)
        return self.network(batch.to(self.device)).float().cpu()

    def _run_with_features(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the last feature map (N, dim, h, w) on the device."""
        if self.engine:
            return self.engine.with_features(batch)
        features = self.network.forward_features(batch.to(self.device))
        return self.network.forward_head(features).float().cpu(), features

    def _heatmap(self, picture: Image.Image, features: Tensor, index: int) -> HeatMap:
        head = self.network.head
        values = class_activation_map(features, head.weight[index], head.bias[index]).float().cpu().numpy()
        return HeatMap(self.labels[index], index, values, crop_box(picture.size, self.preprocessing), picture)

    def _slice_size(self) -> int:
        if self.engine or self.device.type != "cpu":
            return SLICE
        side = self.preprocessing.size // self.config.patch_size
        return max(1, CPU_SLICE_BYTES // (4 * self.config.dim * side * side))

    def _ranked(self, scores: Tensor, top_k: int) -> list[Prediction]:
        best = scores.topk(min(top_k, len(scores)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Prediction(self.labels[index], index, score) for index, score in pairs]


def _check_top_k(top_k: int) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1")


def _check_precision(precision: str, device: torch.device) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    usable = {"cpu": list(PRECISIONS), "cuda": ["float32", "bfloat16"]}.get(device.type, ["float32"])
    if precision not in usable:
        raise ValueError(f"precision {precision!r} is not for {device.type}; there it must be {' or '.join(usable)}")


class _CpuEngine:
    def __init__(self, engine: KernelEngine):
        self.engine = engine

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.from_numpy(self.engine.run(batch.detach().float().cpu().numpy())[0])

    def with_features(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = self.engine.run(batch.detach().float().cpu().numpy(), stages=1)
        return torch.from_numpy(logits), torch.from_numpy(features[0])


def _engine(network: ConvMixer, precision: str, device: torch.device):
    """None where this machine cannot have one. Raises ValueError if the precision then cannot be had either."""
    if device.type != "cpu":
        if precision == "float32":
            return None
        from .gpu.engine import GpuEngine  # brings Triton along

        return GpuEngine(network, device)
    try:
        return _CpuEngine(KernelEngine(network.config, to_arrays(network), precision))
    except KernelError as error:
        if precision != "float32":
            raise ValueError(f"precision {precision!r} cannot be used ({error}); try 'float32'") from error
        return None


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device that was named, by default the GPU where there is one. Raises ValueError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} cannot be used ({reason}); try 'cpu', or 'cuda' on an NVIDIA GPU"
        ) from error
    return chosen
