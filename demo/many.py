"""Many pictures at once: a table, a CSV file, and a line for each picture that cannot be read."""

import re
import secrets
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
from gradio.utils import get_upload_folder

from convmixer import Classifier, ImageError
from convmixer.results import csv_line
from demo import render, rows
from demo.answers import Answers, Problem, about_picture
from demo.guard import MAX_FILE, Upload

LIMIT = 500  # pictures a request
SLICE = 16  # read before the network runs
COLUMNS = ["picture", "answer", "score", "second", "second_score", "problem"]
TOO_LARGE = re.compile(rb"convmixer: too large: (\d{1,15})")  # many.js puts it in the place of such a file
OPEN = """element.addEventListener('click', event => {
    const button = event.target.closest('button[data-file]');
    if (button) trigger('choose', {name: button.dataset.name, file: button.dataset.file});
});"""
HINT = f"Up to {LIMIT} pictures at a time. One that cannot be read is named, and the others are answered."


def lay_out(answers: Answers, ui: SimpleNamespace, limits: dict) -> None:
    """The tab's components and events. Of the page it needs the model, the own checkpoint and the problem."""
    files = gr.File(file_count="multiple", label="Pictures", height=140, elem_id="files")
    with gr.Row():
        folder = gr.UploadButton("Choose a folder", file_count="directory", elem_id="folder")
        download = gr.DownloadButton("Download as CSV", interactive=False, elem_id="csv")
    ui.batch = result = gr.HTML(render.note(HINT), elem_id="batch", apply_default_css=False, js_on_load=OPEN)

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
        small: list[str] = []
        some = classify(classifier, uploads, small)
        answered = list(progress.tqdm(some, total=len(uploads), unit="pictures", desc="Classifying"))
        return {
            ui.problem: "",
            result: summarise(answered, model, time.perf_counter() - start) + rows.table(answered, uploads, small),
            download: gr.update(value=str(write_csv(answered)), interactive=True),
        }

    def clear():
        return {ui.problem: "", result: render.note(HINT), download: gr.update(interactive=False)}

    outputs = [ui.problem, result, download]
    options = limits | {"api_visibility": "private", "show_progress_on": [result]}
    for event in (files.upload, files.delete):
        event(run, [files, ui.model, ui.own], outputs, **options)
    files.clear(clear, None, outputs, **options)
    folder.upload(run, [folder, ui.model, ui.own], outputs, **options)


def classify(classifier: Classifier, uploads: list[Upload], thumbnails: list[str]) -> Iterator[dict]:
    """A row with COLUMNS for each upload, in order. Scores are 0 to 1; what is not known is None or empty.

    thumbnails: where a small picture of each goes, as a data URL.
    """
    remaining = iter(uploads)
    while some := list(islice(remaining, SLICE)):
        prepared = [_prepare(classifier, upload) for upload in some]
        readable = [one for one in prepared if not isinstance(one, str)]
        answers = iter(classifier.classify_many(readable, 2))
        for upload, one in zip(some, prepared, strict=True):
            thumbnails.append("" if isinstance(one, str) else rows.thumbnail(one, classifier.preprocessing))
            values = ["", None, "", None, one] if isinstance(one, str) else [*_best_two(next(answers)), ""]
            yield dict(zip(COLUMNS, [path(upload), *values], strict=True))


def _prepare(classifier: Classifier, upload: Upload):
    """The network's input, or in a text why there is none."""
    try:
        content = upload.path.read_bytes()
        if large := TOO_LARGE.fullmatch(content[:40]):
            return f"it has {int(large[1]) / 2**20:.0f} MB, and up to {MAX_FILE // 2**20} MB fit; make it smaller"
        return classifier.prepare(content)
    except ImageError as error:
        return about_picture(path(upload), error)
    except OSError:
        return "the upload is no longer there; add it again"


def _best_two(predictions: list) -> list:
    best, second = [*predictions, None][:2]  # a network of one class has no second answer
    return [best.label, best.score, second.label if second else "", second.score if second else None]


def summarise(answered: list[dict], model: str, seconds: float) -> str:
    """One line about a batch."""
    broken = sum(bool(row["problem"]) for row in answered)
    parts = [f"{len(answered) - broken} of {len(answered)} pictures answered by {model} in {seconds:.1f} s"]
    return render.note(". ".join([*parts, f"{broken} could not be read"] if broken else parts) + ".")


def path(upload: Upload) -> str:
    """What the visitor calls it, with the folders that it lies in."""
    return upload.name.replace(" › ", "/")


def write_csv(answered: list[dict]) -> Path:
    """A file with the rows for programs: a header, scores in full. It lies among the uploads and goes with them."""
    file = Path(get_upload_folder(), secrets.token_hex(32), "convmixer.csv")
    file.parent.mkdir(parents=True)
    text = "".join(map(csv_line, [COLUMNS, *(row.values() for row in answered)]))
    file.write_text(text, encoding="utf-8-sig", newline="")  # the mark tells spreadsheets that it is UTF-8
    return file
