"""The command line's main command: pictures in, answers out."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

from .classifier import SLICE, Classifier
from .download import terminal_progress
from .files import find_pictures, read_source
from .images import ImageError
from .labels import read_labels
from .results import Results
from .sample import draw_sample

DONE, SOME_FAILED, WRONG = 0, 1, 2  # exit codes; WRONG: nothing was answered
HEATMAP_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PROGRESS_SECONDS = 0.2  # between two states of the progress line


def run(arguments: argparse.Namespace) -> int:
    """`python -m convmixer classify`. Gives the exit code."""
    classifier = Classifier(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        engine=arguments.engine,
        allow_truncated=arguments.allow_truncated,
        progress=terminal_progress(arguments.model),
        labels=read_labels(arguments.labels) if arguments.labels else None,
    )
    if arguments.sample:
        show("sample", classifier, classifier.classify(draw_sample(), arguments.top_k), arguments.json)
        return DONE
    found = find_pictures(arguments.images)
    for line in found.unreadable:
        tell(line)
    if not found.names:
        tell(f"{', '.join(arguments.images)}: no picture in this folder; name a picture or a folder of pictures")
        return WRONG
    if arguments.heatmap:
        return with_heatmap(classifier, found.names[0], arguments)
    code = classify(classifier, found.names, arguments)
    if found.others:
        tell(f"{found.others:,} {'file' if found.others == 1 else 'files'} left out that are no pictures")
    return SOME_FAILED if found.unreadable and code == DONE else code


def with_heatmap(classifier: Classifier, name: str, arguments: argparse.Namespace) -> int:
    try:
        predictions, heatmap = classifier.classify_with_heatmap(read_source(name), arguments.top_k)
    except ImageError as error:
        tell(str(error))
        return WRONG
    heatmap.overlay().save(arguments.heatmap)
    show(name, classifier, predictions, arguments.json)
    print(f"{arguments.heatmap}: where the network saw {shown(heatmap.label)}", file=sys.stderr)
    return DONE


def classify(classifier: Classifier, names: list[str], arguments: argparse.Namespace) -> int:
    """Answers pictures by name, in order, to standard output or into a file."""
    with contextlib.ExitStack() as stack:
        results = None
        if arguments.output:
            results = stack.enter_context(Results(arguments.output, arguments.top_k, arguments.resume))
            names = [name for name in names if name not in results.done]
        progress = Progress(len(names), len(results.done) if results else 0)
        # On a terminal the answers themselves show how far it is.
        is_seen = sys.stderr.isatty() and (results or not sys.stdout.isatty())
        report = stack.enter_context(progress) if is_seen else progress
        remaining = iter(names)
        for batch in classifier.answers(names, arguments.top_k, "return", arguments.workers, read_source):
            for one in batch:
                name = next(remaining)
                if isinstance(one, ImageError):
                    progress.failed += 1
                    report.tell(str(one))
                elif results:
                    results.add(answer(name, classifier, one))
                else:
                    show(name, classifier, one, arguments.json)
                report.step()
    if results or len(names) > SLICE:
        tell(progress.summary())
    return DONE if not progress.failed else SOME_FAILED if progress.failed < progress.done else WRONG


class Progress:
    """How far it is; in a with block also a line on the terminal."""

    def __init__(self, total: int, earlier: int):
        self.total, self.earlier, self.done, self.failed = total, earlier, 0, 0
        self.start = self.shown_at = time.monotonic()
        self._is_seen = False

    def __enter__(self) -> "Progress":
        self._is_seen = True
        return self

    def __exit__(self, *_) -> None:
        self._write("")

    def step(self) -> None:
        self.done += 1
        if self._is_seen and time.monotonic() - self.shown_at > PROGRESS_SECONDS:
            self.shown_at = time.monotonic()
            left = (self.total - self.done) / self.rate()
            self._write(f"  {self.done:,} of {self.total:,}, {self.rate():,.0f} a second, {clock(left)} left")

    def tell(self, line: str) -> None:
        self._write("")
        tell(line)

    def rate(self) -> float:
        return self.done / max(1e-9, time.monotonic() - self.start)

    def summary(self) -> str:
        """One line for the end."""
        parts = [f"{self.done - self.failed:,} pictures answered in {clock(time.monotonic() - self.start)}"]
        parts[0] += f", {self.rate():,.0f} a second"
        parts += [f"{self.failed:,} could not be read"] * bool(self.failed)
        parts += [f"{self.earlier:,} were there already"] * bool(self.earlier)
        return "; ".join(parts)

    def _write(self, line: str) -> None:
        if self._is_seen:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def answer(name: str, classifier: Classifier, predictions: list) -> dict:
    """One picture's answer as JSON values."""
    rows = [{"label": p.label, "index": p.index, "score": p.score} for p in predictions]
    engine = classifier.engine
    return {
        "image": name,
        "model": classifier.name,
        "engine": engine.name,
        "precision": engine.precision,
        "predictions": rows,
    }


def show(name: str, classifier: Classifier, predictions: list, as_json: bool) -> None:
    """Prints the answer for one picture, as a table or as one line of JSON."""
    if as_json:
        print(json.dumps(answer(name, classifier, predictions)), flush=True)
        return
    labels = [shown(p.label) for p in predictions]
    width = max(map(len, labels))
    print(f"{shown(name)}  ({shown(classifier.name)})")
    for label, p in zip(labels, predictions, strict=True):
        print(f"  {label:<{width}}  {percent(p.score):>8}  {'█' * round(30 * p.score)}".rstrip())
    sys.stdout.flush()


def shown(text: str) -> str:
    """A text out of a stranger's file, without what would command the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def percent(score: float) -> str:
    """A softmax score as percent with two decimals. It is never quite 0 or 1, even where float32 rounds it to that."""
    if score < 0.0001:
        return "<0.01 %"
    return ">99.99 %" if score > 0.9999 else f"{100 * score:.2f} %"


def tell(line: str) -> None:
    """One line on standard error."""
    print(f"convmixer: {line}", file=sys.stderr)


def check(arguments: argparse.Namespace, fail: Callable[[str], None]) -> None:
    """What argparse cannot check by itself, before anything is loaded; ``fail`` is called with one line."""
    if not arguments.images and not arguments.sample:
        fail("no picture was given: name a file or a folder, or use --sample")
    if arguments.images and arguments.sample:
        fail("--sample stands in for a picture: leave out the file names")
    if arguments.resume and not arguments.output:
        fail("--resume goes on with a file: name it with --output")
    for option in ("heatmap", "output"):
        file = getattr(arguments, option)
        if file is not None and not os.path.isdir(os.path.dirname(file) or "."):
            fail(f"--{option} {file}: that folder does not exist")
    if arguments.heatmap is not None:
        if len(arguments.images) > 1 or any(os.path.isdir(name) for name in arguments.images):
            fail("--heatmap writes one picture: name one picture to classify")
        if not arguments.heatmap.lower().endswith(HEATMAP_SUFFIXES):
            fail(f"--heatmap {arguments.heatmap}: the name must end in one of {', '.join(HEATMAP_SUFFIXES)}")
