"""The Cog door: `cog predict -i image=@dog.jpg`, and the HTTP API of the container that `cog build` makes.

Cog's command line reads the inputs and outputs off this text and does not run it. That is why the names of the models
are written out here, each description is one literal, and an optional field is Optional.

On a CPU nothing here imports PyTorch.
"""
# ruff: noqa: B008, UP045

import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING, Optional

from cog import BaseModel, BaseRunner, Input, Path

from serving.cancelling import start_threads_elsewhere
from serving.decoder import Decoder
from serving.leftovers import start_deleting
from serving.stuck import Unsticker
from serving.watchdog import Watchdog, leave_signals_to_the_server

if TYPE_CHECKING:
    from PIL import Image

    from convmixer import Classifier

MODELS = ["auto", "convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_256_8_cifar10"]
MAX_BYTES = 100 * 2**20  # what Cog takes in a request; a URL could lead to more
MAX_HEATMAP_SIDE = 2048
MAX_PNG_PIXELS = 2**20


class RequestError(ValueError):
    """What the client is told: one line that names none of the server's files."""


class Prediction(BaseModel):
    label: str
    index: int
    score: float


class Output(BaseModel):
    model: str
    engine: str
    precision: str
    predictions: list[Prediction]
    heatmap: Optional[Path]


class Predictor(BaseRunner):
    decoders = 1  # pictures that are decoded at the same time
    has_one_slot = True  # Cog takes one request at a time

    def setup(self) -> None:
        """Load the model that "auto" means, which may be the file that COG_WEIGHTS names, and run it once.

        Whatever that is now stays "auto" as long as the server runs. Raises what zoo.load raises.
        """
        leave_signals_to_the_server()
        start_threads_elsewhere()
        start_deleting()
        # Cog leaves behind the files of failed downloads and those that run() returns. In a folder of their own they
        # can be deleted, and told from all other files of the server.
        self._folder = tempfile.TemporaryDirectory(prefix="convmixer-")
        self.scratch = pathlib.Path(self._folder.name).resolve()
        tempfile.tempdir = str(self.scratch)

        self.decoder, watchdog = Decoder(self.decoders), Watchdog(self.scratch)
        try:
            self.decoder.start()  # it starts while the model is loaded
            self.classifiers = warm_classifiers()
        except BaseException:
            self.decoder.close()
            watchdog.dismiss()
            raise
        self.watchdog = watchdog
        watchdog.arm()
        self.unsticker = Unsticker(Predictor.run)
        if self.has_one_slot:
            self.unsticker.start()

    def run(
        self,
        image: Path = Input(description="The picture, as an http or https URL or as a data URI.", accept="image/*"),
        model: str = Input(
            description="The model. auto is the best one on this server; the others are downloaded at their first use.",
            default="auto",
            choices=MODELS,
        ),
        top_k: int = Input(description="How many classes to return, the best first.", default=5, ge=1, le=100),
        heatmap: bool = Input(
            description="Also return the picture, scaled to 2048 pixels at most, with the evidence for the best class.",
            default=False,
        ),
    ) -> Output:
        """Classify one picture. Raises RequestError or ImageError, each with one line for the client."""
        self.unsticker.begun += 1
        remove_files(self.scratch, keep=image)
        picture = read_picture(image, self.scratch)
        # JSON makes no difference between 5 and 5.0, and Cog passes on either.
        folder = self.scratch if heatmap else None
        return answer(self.classifier(model), self.decoder, picture, int(top_k), folder)

    def classifier(self, model: str) -> "Classifier":
        """The model of this name, loaded at its first use only. Raises RequestError."""
        if model not in MODELS:
            raise RequestError(f"there is no such model; choose one of {', '.join(MODELS)}")
        if model not in self.classifiers:
            self.classifiers[model] = load(model)
        return self.classifiers[model]


def warm_classifiers() -> dict[str, "Classifier"]:
    """The model that "auto" means, under that name and its own, after one run. Raises what zoo.load raises."""
    from convmixer import Classifier, zoo

    name, _ = zoo.resolve("auto")
    classifier = Classifier("auto")
    classifier.warm_up()
    return {"auto": classifier, name: classifier}


def load(model: str) -> "Classifier":
    """The classifier of a named model, downloaded if it is not here. Raises RequestError; the server's log has why."""
    from convmixer import CheckpointError, Classifier, ModelError
    from convmixer.download import DownloadError

    try:
        return Classifier(model)
    except (CheckpointError, DownloadError, ModelError) as error:
        # sys.stderr would be the log of this prediction, which Cog may send to the client.
        print(f"{model}: {error}", file=sys.__stderr__, flush=True)
        raise RequestError(f"{model} is not on this server and cannot be downloaded; choose another model") from error


def read_picture(image: Path, folder: pathlib.Path) -> bytes:
    """The encoded picture that Cog downloaded or decoded into ``folder``, which is a resolved path.

    Raises RequestError for anything else. A text that is no URL, such as /etc/passwd, comes from Cog just as it was
    sent.
    """
    if not isinstance(image, pathlib.Path) or not image.resolve().is_relative_to(folder):
        raise RequestError("image must be an http or https URL, or a data URI: data:image/png;base64,...")
    size = image.stat().st_size
    if size > MAX_BYTES:
        raise RequestError(f"image has {size:,} bytes, more than the {MAX_BYTES:,} that can be read; make it smaller")
    return image.read_bytes()


def answer(
    classifier: "Classifier",
    decoder: Decoder,
    picture: bytes,
    top_k: int,
    heatmap_folder: pathlib.Path | None = None,
) -> Output:
    """What ``classifier`` says about an encoded picture, with a heat map in ``heatmap_folder`` if one is given.

    Raises ImageError for a picture that cannot be read and ValueError for a ``top_k`` below 1.
    """
    if heatmap_folder is None:
        prepared = decoder.prepare(picture, classifier.preprocessing)
        ranked, path = classifier.classify(prepared, top_k), None
    else:
        whole = decoder.load(picture, target_size=classifier.heatmap_side)
        ranked, evidence = classifier.classify_with_heatmap(whole, top_k)
        path = save_heatmap(evidence.overlay(), heatmap_folder)
    predictions = [Prediction(label=each.label, index=each.index, score=each.score) for each in ranked]
    return Output(
        model=classifier.name,
        engine=classifier.engine.name,
        precision=classifier.engine.precision,
        predictions=predictions,
        heatmap=path,
    )


def save_heatmap(picture: "Image.Image", folder: pathlib.Path) -> Path:
    """The file of an RGB picture, which is scaled down in place to MAX_HEATMAP_SIDE pixels a side.

    It stays below 4 MB whatever the picture shows: Cog keeps an answer of more than 6 MiB on its disk for ever.
    """
    picture.thumbnail((MAX_HEATMAP_SIDE, MAX_HEATMAP_SIDE))
    is_small = picture.width * picture.height <= MAX_PNG_PIXELS
    path = Path(folder, "heatmap.png" if is_small else "heatmap.jpg")
    picture.save(path, quality=90)  # of the JPEG; a PNG has none
    return path


def remove_files(folder: pathlib.Path, keep: Path) -> None:
    """Delete the files in ``folder`` but one: those of earlier requests, all of which have been answered."""
    for file in folder.iterdir():
        if file != keep and file.is_file():
            file.unlink()
