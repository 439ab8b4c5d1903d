"""The table of many pictures, as HTML. many.js sorts it, and a press on a row opens its picture in the tab Answer."""

import re
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from convmixer.preprocessing import Preprocessing
from demo.guard import Upload
from demo.render import data_url
from demo.words import percent

THUMBNAIL = 48  # pixels
HEADERS = "Picture", "Answer", "Score", "Second", "Score"


def table(rows: Sequence[dict], uploads: Sequence[Upload], thumbnails: Sequence[str]) -> str:
    """rows: as many.classify gives them, with their uploads and small pictures, empty where one cannot be read."""
    head = "".join(
        f'<th scope="col"><button type="button" data-column="{column}">{header}</button></th>'
        for column, header in enumerate(HEADERS)
    )
    body = "".join(map(_row, rows, uploads, thumbnails))
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: dict, upload: Upload, thumbnail: str) -> str:
    name = _breakable(row["picture"])
    if row["problem"]:
        return f'<tr class="broken"><th scope="row" colspan="5">{name}<p>{escape(row["problem"])}</p></th></tr>'
    cells = []
    for label, score in (row["answer"], row["score"]), (row["second"], row["second_score"]):
        cells += [(label, label), ("", "") if score is None else (percent(score), f"{score:.6f}")]
    others = "".join(
        f'<td data-header="{header}" data-sort="{escape(value)}">{escape(text)}</td>'
        for header, (text, value) in zip(HEADERS[1:], cells, strict=True)
    )
    return (
        f'<tr><th scope="row"><button type="button" data-name="{escape(upload.name)}" '
        f'data-file="{escape(str(upload.path))}" title="Open it under Answer"><img alt="" src="{thumbnail}">'
        f"<span>{name}</span></button></th>{others}</tr>"
    )


def thumbnail(prepared: np.ndarray, preprocessing: Preprocessing) -> str:
    """The network's input (3, s, s), made small: what it was decoded from need not be decoded twice."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (255 * (prepared[:3] * std + mean)).clip(0, 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_url(picture, "WEBP")


def _breakable(name: str) -> str:
    """A file's name, whose lines break after its separators only."""
    return re.sub(r"([/_.\-])", r"\1<wbr>", escape(name))
