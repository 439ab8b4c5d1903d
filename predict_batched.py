"""The Cog door for many at a time: the same API as predict.py, with slots whose requests share the network.

    python serve.py --slots 16                        # by hand; or COG_MAX_CONCURRENCY=16 with Cog's own server
    run: "predict_batched.py:Predictor"               # in cog.yaml, for the container: 16 slots, as below

For GPUs, which take hardly longer for sixteen pictures than for one; see serving/batching.py. Cog's command line reads
this text and does not run it, which is why the inputs and outputs of predict.py are written out once more (a test holds
them equal).
"""
# ruff: noqa: B008, UP045

import asyncio
import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from cog import BaseModel, BaseRunner, Input, Path, concurrent

import predict
from serving.batching import Batcher
from serving.stuck import Unsticker

if TYPE_CHECKING:
    import numpy as np

    import convmixer

MODELS = ["auto", "convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_256_8_cifar10"]
WINDOW_S = 0.005
MAX_DECODERS = 4  # each may need a gigabyte for a very large picture
ABANDONED_S = 600  # a download that has brought nothing for so long, in seconds, has failed


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
        """What predict.py does, with several pictures decoded at once. Raises what zoo.load raises."""
        self.single = predict.Predictor()
        self.single.decoders = min(MAX_DECODERS, os.cpu_count() or 1)
        self.single.has_one_slot = False  # it watches threads, and the requests here are none
        self.single.setup()
        self.batcher = Batcher(window_s=WINDOW_S, preparers=self.single.decoders)
        self.one_heatmap = asyncio.Semaphore(1)  # the whole picture is held for it, some of which take a gigabyte
        self.loading: dict[str, asyncio.Task] = {}
        self.inputs: set[pathlib.Path] = set()  # of the requests that are under way
        self.unsticker = Unsticker(predict.Predictor.run, is_under_way=lambda: bool(self.inputs))
        self.unsticker.start()

    @concurrent(max=16)
    async def run(
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
        self.inputs.add(image)
        try:
            classifier = await self.classifier(model)
            answer = self.answer_with_heatmap if heatmap else self.answer
            # JSON makes no difference between 5 and 5.0, and Cog passes on either.
            return await answer(classifier, image, int(top_k))
        finally:
            self.inputs.discard(image)

    async def classifier(self, model: str) -> "convmixer.Classifier":
        """The model of this name, loaded at its first use only, while the others answer. Raises RequestError."""
        if model in self.single.classifiers:
            return self.single.classifiers[model]
        if model not in self.loading:
            self.loading[model] = asyncio.create_task(asyncio.to_thread(self.single.classifier, model))
            self.loading[model].add_done_callback(functools.partial(self._loaded, model))
        return await asyncio.shield(self.loading[model])  # several may wait for it, and one of them go away

    def _loaded(self, model: str, task: asyncio.Task) -> None:
        del self.loading[model]
        task.exception()  # has been looked at, even if nobody waited to the end

    async def answer(self, classifier: "convmixer.Classifier", image: Path, top_k: int) -> Output:
        """The classes of a picture, which goes through the network with those of other requests."""

        def prepare() -> tuple["np.ndarray", int]:
            return self.single.decoder.prepare(self._read(image), classifier.preprocessing), top_k

        return output(classifier, await self.batcher.submit(Together(classifier), prepare))

    async def answer_with_heatmap(self, classifier: "convmixer.Classifier", image: Path, top_k: int) -> Output:
        """The same for one picture by itself, with a heat map, whose file lives as long as Cog holds the output."""

        def prepare() -> tuple[Any, int]:
            return self.single.decoder.load(self._read(image), target_size=classifier.heatmap_side), top_k

        async with self.one_heatmap:
            run = functools.partial(look, classifier)  # equal to no other, so that it is no one's but this request's
            ranked, evidence = await self.batcher.submit(run, prepare)
            path = await asyncio.to_thread(save_heatmap, evidence, self.single.scratch)
        return output(classifier, ranked, path)

    def _read(self, image: Path) -> bytes:
        remove_abandoned(self.single.scratch, self.inputs)
        try:
            return predict.read_picture(image, self.single.scratch)
        except FileNotFoundError as error:  # a download that was slow beyond all measure
            raise predict.RequestError("image took too long to arrive; send it again") from error


@dataclass(frozen=True)
class Together:
    """What the network does for several requests at once. Two of the same classifier are equal."""

    classifier: "convmixer.Classifier"

    def __call__(self, requests: list[tuple["np.ndarray", int]]) -> list[list["convmixer.Prediction"]]:
        """The ranked classes for each prepared picture (3, size, size) and its top_k."""
        pictures, numbers = zip(*requests, strict=True)
        rows = self.classifier.classify_many(pictures, max(numbers))
        return [row[:top_k] for row, top_k in zip(rows, numbers, strict=True)]


def look(classifier: "convmixer.Classifier", requests: list[tuple]) -> list[tuple]:
    """The ranked classes and the heat map for each RGB picture and its top_k."""
    return [classifier.classify_with_heatmap(picture, top_k) for picture, top_k in requests]


def output(
    classifier: "convmixer.Classifier", ranked: list["convmixer.Prediction"], heatmap: Path | None = None
) -> Output:
    predictions = [Prediction(label=each.label, index=each.index, score=each.score) for each in ranked]
    engine, precision = classifier.engine.name, classifier.engine.precision
    return Output(model=classifier.name, engine=engine, precision=precision, predictions=predictions, heatmap=heatmap)


def save_heatmap(evidence: "convmixer.explain.HeatMap", scratch: pathlib.Path) -> Path:
    """The file of a heat map, in a folder of its own. It is deleted with the object that is returned.

    Cog reads the file after run() has returned, and gives no sign when it has. But it holds the output for as long.
    """
    folder = tempfile.mkdtemp(prefix="heatmap-", dir=scratch)
    try:
        path = predict.save_heatmap(evidence.overlay(), pathlib.Path(folder))
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(path, shutil.rmtree, folder, ignore_errors=True)
    return path


def remove_abandoned(folder: pathlib.Path, inputs: Collection[pathlib.Path]) -> None:
    """Delete what nobody has written to ``folder`` for ABANDONED_S, except the inputs of the requests under way.

    Cog deletes a request's input when it is answered, but not the file of a download that failed.
    """
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # it may be gone by now
            if file not in inputs and file.is_file() and time.time() - file.stat().st_mtime > ABANDONED_S:
                file.unlink()
