"""Many pictures at once: a table, a CSV file, and a line for each picture that cannot be read."""

import secrets
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.utils import get_upload_folder

from convmixer import Classifier, ImageError
from convmixer.classify import percent
from convmixer.results import csv_line
from demo import render
from demo.answers import Answers, Problem, about_picture
from demo.guard import Upload

LIMIT = 500  # pictures a request
SLICE = 16  # read before the network runs
COLUMNS = ["picture", "answer", "score", "second", "second_score", "problem"]
HEADERS = ["Picture", "Answer", "Score", "Second", "Score", "Problem"]
HINT = f"Up to {LIMIT} pictures at a time. One that cannot be read is named, and the others are answered."


def lay_out(answers: Answers, ui: SimpleNamespace, limits: dict) -> None:
    """The tab's components and events. Of the page it needs the model, the own checkpoint and the problem."""
    files = gr.File(file_count="multiple", label="Pictures", height=140, elem_id="files")
    with gr.Row():
        folder = gr.UploadButton("Choose a folder", file_count="directory", elem_id="folder")
        download = gr.DownloadButton("Download as CSV", interactive=False, elem_id="csv")
    result = gr.HTML(render.note(HINT), elem_id="batch", apply_default_css=False)

    def run(uploads: list[Upload] | None, model: str, own, progress=gr.Progress()):  # noqa: B008
        if not uploads:
            return {ui.problem: gr.skip()}
        try:
            if len(uploads) > LIMIT:
                raise Problem(f"these are {len(uploads):,} pictures; up to {LIMIT} fit in one go")
            classifier = answers.classifier(model, own)
        except Problem as trouble:
            return {ui.problem: render.problem(str(trouble))}
        start = time.perf_counter()
        rows = classify(classifier, uploads)
        answered = list(progress.tqdm(rows, total=len(uploads), unit="pictures", desc="Classifying"))
        return {
            ui.problem: "",
            result: summarise(answered, model, time.perf_counter() - start) + render.table(HEADERS, table(answered)),
            download: gr.update(value=str(write_csv(answered)), interactive=True),
        }

    outputs = [ui.problem, result, download]
    options = limits | {"api_visibility": "private", "show_progress_on": [result]}
    files.upload(run, [files, ui.model, ui.own], outputs, **options)
    folder.upload(run, [folder, ui.model, ui.own], outputs, **options)


def classify(classifier: Classifier, uploads: list[Upload]) -> Iterator[dict]:
    """A row with COLUMNS for each upload, in order. Scores are 0 to 1; what is not known is None or empty."""
    remaining = iter(uploads)
    while some := list(islice(remaining, SLICE)):
        prepared = [_prepare(classifier, upload) for upload in some]
        readable = [one for one in prepared if not isinstance(one, str)]
        answers = iter(classifier.classify_many(readable, 2))
        for upload, one in zip(some, prepared, strict=True):
            values = ["", None, "", None, one] if isinstance(one, str) else [*_best_two(next(answers)), ""]
            yield dict(zip(COLUMNS, [upload.name, *values], strict=True))


def _prepare(classifier: Classifier, upload: Upload):
    """The network's input, or in a text why there is none."""
    try:
        return classifier.prepare(upload.path.read_bytes())
    except ImageError as error:
        return about_picture(upload.name, error)
    except OSError:
        return "the upload is no longer there; add it again"


def _best_two(predictions: list) -> list:
    best, second = [*predictions, None][:2]  # a network of one class has no second answer
    return [best.label, best.score, second.label if second else "", second.score if second else None]


def summarise(rows: list[dict], model: str, seconds: float) -> str:
    """One line about a batch."""
    broken = sum(bool(row["problem"]) for row in rows)
    parts = [f"{len(rows) - broken} of {len(rows)} pictures answered by {model} in {seconds:.1f} s"]
    return render.note(". ".join([*parts, f"{broken} could not be read"] if broken else parts) + ".")


def table(rows: list[dict]) -> list[list[str]]:
    """The rows for people: scores in percent."""
    return [
        [("" if value is None else percent(value)) if "score" in column else value for column, value in row.items()]
        for row in rows
    ]


def write_csv(rows: list[dict]) -> Path:
    """A file with the rows for programs: a header, scores in full. It lies among the uploads and goes with them."""
    path = Path(get_upload_folder(), secrets.token_hex(32), "convmixer.csv")
    path.parent.mkdir(parents=True)
    text = "".join(map(csv_line, [COLUMNS, *(row.values() for row in rows)]))
    path.write_text(text, encoding="utf-8-sig", newline="")  # the mark tells spreadsheets that it is UTF-8
    return path
