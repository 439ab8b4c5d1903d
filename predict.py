"""The Cog door: `cog run -i image=@dog.jpg`, and the HTTP API of the container that `cog build` makes.

Cog's command line reads the inputs and outputs off this text and does not run it. That is why the names of the models
are written out here, each description is one literal, and an optional field is Optional.

On a CPU nothing here imports PyTorch.
"""
# ruff: noqa: B008, UP045

import asyncio
import base64
import io
import os
from typing import Optional

import numpy as np
from cog import BaseModel, BaseRunner, Input, Path, concurrent

from convmixer.classifier import Classifier, softmax
from convmixer.explain import HeatMap
from convmixer.preprocessing import normalise
from serving import pictures
from serving.batching import Batcher
from serving.decoder import Decoder
from serving.models import Models
from serving.watcher import Watcher, check_folder

MODELS = ["auto", "convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_256_8_cifar10"]
MAX_DECODERS = 4  # each may need a gigabyte for a very large picture
MAX_PNG_PIXELS = 2**20


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
    def setup(self) -> None:
        """Get ready. Raises what zoo.load raises for "auto", and OSError, one line, where Cog could not write."""
        check_folder()
        self.watcher = Watcher()
        slots = int(os.environ.get("COG_MAX_CONCURRENCY") or 1)
        self.decoder = Decoder(min(slots, MAX_DECODERS, os.cpu_count() or 1))  # it starts while the model is loaded
        try:
            self.models = Models(together=slots)
        except BaseException:
            self.decoder.close()
            raise
        self.batcher = Batcher(look)

    @concurrent(max=16)
    async def run(
        self,
        image: Path = Input(description="The picture, as an http or https URL or as a data URI.", accept="image/*"),
        model: str = Input(
            description="The model. auto is the best one on this server; another one must be on it, too.",
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
        with self.watcher.request():
            classifier = await self.models.get(model)
            side = classifier.heatmap_side if heatmap else None
            picture = await pictures.read(image)
            pixels, shown = await self.decoder.decode(picture, classifier.preprocessing, side)
            scores, features = await self.batcher.submit(classifier, (pixels, heatmap))
            ranked = classifier.ranked(scores, int(top_k))  # in JSON 5.0 is 5, and Cog passes on either
            evidence = classifier.heat_map(shown, features, ranked[0].index) if heatmap else None
            drawn = await asyncio.to_thread(draw, evidence) if evidence else None
        predictions = [Prediction(**vars(each)) for each in ranked]
        engine, precision = classifier.engine.name, classifier.engine.precision
        return Output(model=classifier.name, engine=engine, precision=precision, predictions=predictions, heatmap=drawn)


# Cog would fetch and decode what is a Path here, into files, by ways on which a client that goes away stops the worker
# for ever. What it takes for a text it hands over as it came. (Its command line has read the text above.)
Predictor.run.__annotations__["image"] = str


def look(classifier: Classifier, items: list[tuple[np.ndarray, bool]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """The scores of what the network sees of each picture, and its last feature map if one of them wants that."""
    batch = np.stack([normalise(pixels, classifier.preprocessing) for pixels, _ in items])
    stages = int(any(wanted for _, wanted in items))
    logits, features = classifier.engine.run(batch, stages=stages)
    return list(zip(softmax(logits), features[0] if stages else [None] * len(items), strict=True))


def draw(evidence: HeatMap) -> str:
    """A heat map over its picture as a data URI, below 6 MiB whatever it shows: Cog keeps what is more on its disk."""
    overlay = evidence.overlay()
    format = "PNG" if overlay.width * overlay.height <= MAX_PNG_PIXELS else "JPEG"
    stream = io.BytesIO()
    overlay.save(stream, format, quality=90)  # of the JPEG; a PNG has none
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
