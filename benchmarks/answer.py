"""Where each millisecond of one answer goes: `Classifier.classify` of a file, taken apart as it runs.

    python benchmarks/answer.py [--models NAME ...] [--rounds 30] [--threads N] [--json FILE]

The shipped model and a 768/32 with random weights, each on three pictures that are drawn here: a photograph of 12
megapixels as a phone saves it (JPEG, to be turned by its EXIF orientation), a JPEG of 640 x 480, and a PNG of 32 x 32.

The functions that `classify` calls are timed where it calls them. What one of them spends in another counts only for
the inner one, so that the parts add up to the whole. The pictures take turns, files are in the page cache, and the
figures are medians over the rounds; one round before them is not counted.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `convmixer` and `benchmarks` are found

from benchmarks.inference_report import machine  # noqa: E402
from benchmarks.options import Parser, at_least_one  # noqa: E402

SHIPPED, LARGE = "convmixer_256_8_cifar10", "convmixer_768_32"
DECODE, CONVERT, RESIZE, TENSOR = "read and decode", "orientation and colours", "resize and crop", "tensor"
NETWORK, RANKING, AROUND = "network", "softmax and ranking", "everything around"
PARTS = (DECODE, CONVERT, RESIZE, TENSOR, NETWORK, RANKING, AROUND)
ORIENTATION, TURNED = 0x0112, 6  # the EXIF tag, and its value for a phone that was held upright


class Stopwatch:
    """Seconds spent in each part; while an inner part runs, the outer one's clock stands."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running: list[str] = []
        self.since = 0.0

    def timed(self, part: str, function: Callable) -> Callable:
        """``function``, its time counted as ``part``."""

        def call(*arguments, **options):
            self._change()
            self.running.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._change()
                self.running.pop()

        return call

    def _change(self) -> None:
        now = self.clock()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now


@contextmanager
def taken_apart() -> Iterator[Callable]:
    """Puts a stopwatch around what `Classifier.classify` calls; gives a function that classifies and reads it.

    Raises AttributeError where a function is not called so any more.
    """
    from PIL import ImageFile

    from convmixer import classifier, preprocessing
    from convmixer.classifier import Classifier
    from convmixer.cpu.engine import KernelEngine

    watch = Stopwatch()
    places = (
        (ImageFile.ImageFile, "load", DECODE),  # Pillow reads the pixels here, and before it only the header
        (classifier, "load_image", CONVERT),
        (preprocessing, "resize_and_crop", RESIZE),
        (classifier, "preprocess", TENSOR),
        (KernelEngine, "run", NETWORK),
        (Classifier, "logits", AROUND),
        (Classifier, "scores", RANKING),
        (Classifier, "classify", AROUND),
    )
    originals = [getattr(place, name) for place, name, _ in places]

    def one_answer(model: Classifier, file: Path) -> dict[str, float]:
        watch.seconds = dict.fromkeys(PARTS, 0.0)
        model.classify(file)
        return watch.seconds

    try:
        for (place, name, part), original in zip(places, originals, strict=True):
            setattr(place, name, watch.timed(part, original))
        yield one_answer
    finally:
        for (place, name, _), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def draw_pictures(folder: Path) -> dict[str, Path]:
    """Files by what they are: soft shapes with a camera's noise, whose decoding costs what a photograph's does."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)

    def draw(width: int, height: int) -> Image.Image:
        shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-6, 7, pixels.shape, dtype=np.int16)
        return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))

    files = {}

    def save(what: str, picture: Image.Image, suffix: str, **options: object) -> None:
        path = folder / f"{len(files)}{suffix}"
        picture.save(path, **options)
        files[f"{what}, {path.stat().st_size / 1000:,.0f} kB"] = path

    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    save("JPEG 4000 x 3000", draw(4000, 3000), ".jpg", quality=90, exif=exif)
    save("JPEG 640 x 480", draw(640, 480), ".jpg", quality=90)
    save("PNG 32 x 32", draw(32, 32), ".png")
    return files


def measure(model: str, folder: Path, rounds: int) -> dict[str, dict]:
    """Milliseconds by picture and part, and under "classify" those of the whole."""
    from benchmarks.inference_models import random_checkpoint
    from convmixer import Classifier, save_checkpoint

    source = model
    if model != SHIPPED:
        source = str(folder / f"{model}.safetensors")
        save_checkpoint(source, random_checkpoint(model))
    classifier, files = Classifier(source, device="cpu"), draw_pictures(folder)
    spent = {what: [] for what in files}
    with taken_apart() as one_answer:
        for number in range(rounds + 1):
            for what, file in files.items():
                parts = one_answer(classifier, file)
                if number:
                    spent[what].append(parts)
    result = {}
    for what, answers in spent.items():
        result[what] = {part: 1000 * statistics.median(answer[part] for answer in answers) for part in PARTS}
        result[what]["classify"] = 1000 * statistics.median(sum(answer.values()) for answer in answers)
    return result


def table(model: str, result: dict[str, dict]) -> Iterator[str]:
    """Markdown: a row a part, a column a picture."""
    yield ""
    yield f"| `{model}`, milliseconds | {' | '.join(result)} |"
    yield "|---|" + "---|" * len(result)
    for part in (*PARTS, "classify"):
        bold = "**" if part == "classify" else ""
        cells = [f"{bold}{values[part]:.2f}{bold}" for values in result.values()]
        yield f"| {bold}{part}{bold} | {' | '.join(cells)} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks/answer.py", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=(SHIPPED, LARGE), default=(SHIPPED, LARGE), metavar="NAME")
    parser.add_argument("--rounds", type=at_least_one, default=30)
    parser.add_argument("--threads", type=at_least_one, help="of the network; default: one for each core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, too")
    options = parser.parse_args(argv)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no folder for {options.json}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from convmixer.cpu.threads import usable_cpus

    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    about, results = machine(), {}
    print(f"{about['processor']}, {usable_cpus()} threads, medians of {options.rounds} rounds")
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[model] = measure(model, Path(folder), options.rounds)
        print(*table(model, results[model]), sep="\n", flush=True)
    if options.json:
        figures = {"machine": about, "threads": usable_cpus(), "rounds": options.rounds}
        options.json.write_text(json.dumps(figures | {"milliseconds": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
