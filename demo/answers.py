"""What the page and its API answer: from a picture and a model to HTML or JSON."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from convmixer import CheckpointError, Classifier, ImageError, ModelError, Prediction
from convmixer.preprocessing import resize_and_crop
from demo import render, words
from demo.guard import find_upload
from demo.models import Models, Own

TOP_K = 5
GONE = "your picture is no longer here: uploads go after an hour, and when the demo is restarted; add it again"


@dataclass(frozen=True)
class Picture:
    """What a visitor is looking at: an uploaded file, or the example of this name where there is no file."""

    name: str
    path: Path | None = None

    def as_value(self) -> dict:
        """What the page keeps of it. It and not the server, which may be restarted, and forgets visitors at last."""
        return {"name": self.name} | ({"file": str(self.path)} if self.path else {})

    @staticmethod
    def of_value(value: object) -> "Picture":
        """Whatever a page says. Raises Problem where it names an upload that is no longer there."""
        value = value if isinstance(value, dict) else {}
        if value.get("file") is None:
            return Picture(str(value.get("name")))
        if upload := find_upload(value.get("name"), value["file"]):
            return Picture(upload.name, upload.path)
        raise Problem(GONE)


class Problem(ValueError):
    """One friendly sentence for the visitor, which names none of the server's files."""


class Answers:
    """The answers of some models about uploads and examples."""

    def __init__(self, models: Models, examples: dict[str, Image.Image]):
        self.models = models
        self.examples = examples

    def source(self, picture: Picture) -> bytes | Image.Image:
        """What the classifier reads. Raises Problem when it is not, or no longer, there."""
        if picture.path is None:
            if picture.name not in self.examples:
                raise Problem("there is no such example; choose one of those on the page")
            return self.examples[picture.name]
        try:
            return picture.path.read_bytes()  # and not the path, which would stand in the error messages
        except OSError as error:
            raise Problem(GONE) from error

    def classifier(self, model: str, own: Sequence[Own] = ()) -> Classifier:
        """One of the models, or one of the visitor's own. Raises Problem when there is no such model here."""
        try:
            return self.models.get(model, own)
        except (ModelError, CheckpointError) as error:
            raise Problem(str(error)) from error

    def view(self, view: str, picture: Picture, model: str, own: Sequence[Own] = ()) -> tuple[str, str, dict]:
        """The stage and the bars of one view of the page, and the same answer as JSON. Raises Problem."""
        return self._view(view, picture, model, own)[:3]

    def compare(self, picture: Picture, a: str, b: str, own: Sequence[Own] = ()) -> tuple[str, str, str]:
        """What two models' answers have in common, and each side's HTML. Raises Problem.

        One model would only say the same twice: in the place of the second side there are others to choose from.
        """
        stage, bars, _, of_a = self._view("a", picture, a, own)
        if a == b:
            return "", stage + bars, render.others(self.models.names(), a, self.models.missing())
        other_stage, other_bars, _, of_b = self._view("b", picture, b, own)
        return render.agreement(words.agreement(of_a, of_b)), stage + bars, other_stage + other_bars

    def offer(self, model: str, own: Sequence[Own] = ()) -> str:
        """A button for a model that knows more, below the answer of one that knows little. Raises Problem."""
        if len(self.classifier(model, own).labels) > words.FEW_CLASSES:
            return ""
        here = [name for name in self.models.names() if self.models.classes(name) > words.FEW_CLASSES]
        return render.offer(here, self.models.missing())

    def _view(self, view: str, picture: Picture, model: str, own: Sequence[Own]) -> tuple:
        classifier, source = self.classifier(model, own), self.source(picture)
        start = time.perf_counter()
        try:
            predictions, maps = classifier.classify_with_heatmaps(source, TOP_K)
        except ImageError as error:
            raise Problem(about_picture(picture.name, error)) from error
        seconds = time.perf_counter() - start
        name, side, labels = self.models.name(model), classifier.preprocessing.size, classifier.labels
        remark = words.verdict(predictions, len(labels))
        if picture.path is None:
            remark = words.lesson(picture.name, labels) or remark
        if view == "main":
            seen = resize_and_crop(maps[0].picture, classifier.preprocessing)
            text = f"It sees no more than these {side} × {side} pixels; {name} answered in {1000 * seconds:.0f} ms."
            about = render.note(words.knows(labels)) + render.seen(seen, text)
        else:
            about = render.note(f"{1000 * seconds:.0f} ms, on {side} × {side} pixels")
        return (
            render.stage(view, picture.name, predictions, maps),
            render.bars(view, name, predictions, remark, about),
            {"image": picture.name} | as_json(name, classifier, predictions, seconds),
            predictions,
        )


def about_picture(name: str, error: ImageError) -> str:
    """The error's sentence with the picture's own name in it, as it was read from bytes."""
    return str(error).replace("the picture", name, 1)


def as_json(model: str, classifier: Classifier, predictions: list[Prediction], seconds: float) -> dict:
    """An answer as the command line and the Cog door give it, and the time that it took."""
    rows = [{"label": p.label, "index": p.index, "score": p.score} for p in predictions]
    about = {"model": model, "engine": classifier.engine.name, "precision": classifier.engine.precision}
    return about | {"predictions": rows, "seconds": round(seconds, 4)}
