"""What the page shows, as HTML. Every text that comes from outside (labels, file names) is escaped here."""

import base64
import io
import json
from html import escape

from PIL import Image, ImageOps

from convmixer import Prediction
from convmixer.explain import HeatMap
from demo.heat import grids
from demo.words import percent

# Longer side in pixels and quality, best first: a picture is sent as the first that fits MAX_BYTES, or as the last.
SIZES = (960, 75), (800, 70), (640, 60), (480, 45), (320, 30)
MAX_BYTES = 28_000  # a third more as base64: with the rest, an answer stays below 60 kB


def stage(view: str, name: str, predictions: list[Prediction], maps: list[HeatMap]) -> str:
    """The picture, over which heat.js paints the heat map of one class, the best at first.

    view: joins this stage with the bars of the same view; "main" brings the picture, which the others show too.
    """
    picture, (left, top, right, bottom) = maps[0].picture, maps[0].box
    width, height = picture.size
    box = (
        f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
        f"width:{100 * (right - left) / width:.3f}%;height:{100 * (bottom - top) / height:.3f}%"
    )
    is_cropped = (right - left) * (bottom - top) < 0.98 * width * height
    source = f' src="{small(picture)}"' if view == "main" else ""
    return (
        f'<figure class="stage" data-view="{view}" style="--ratio:{_ratio(width, height)}" '
        f'data-heat="{escape(json.dumps(grids(predictions, maps)))}" data-index="{maps[0].index}">'
        f'<div class="frame"><img class="picture" alt="{escape(name)}"{source}>'
        f'<div class="seen{" cropped" if is_cropped else ""}" style="{box}">'
        f'<canvas class="heat" aria-hidden="true"></canvas></div></div><figcaption></figcaption></figure>'
    )


def bars(view: str, model: str, predictions: list[Prediction], remark: str, about: str) -> str:
    """The ranked answers as buttons: pressing one shows its heat map in the stage of the same view.

    remark: a sentence about the answer, a space to keep its place, or nothing; about: HTML that goes below the bars.
    """
    best, side = predictions[0], "" if view == "main" else f", side {view.upper()}"
    rows = "".join(
        f'<li><button type="button" class="bar" data-view="{view}" data-index="{p.index}" '
        f'aria-pressed="{"true" if position == 0 else "false"}" style="--share:{p.score:.4f}" '
        f'title="Show where the network sees {escape(p.label)}">'
        f'<span class="label">{escape(p.label)}</span> <span class="score">{escape(percent(p.score))}</span>'
        f'<span class="track" aria-hidden="true"><span class="fill"></span></span></button></li>'
        for position, p in enumerate(predictions)
    )
    return (
        f'<section class="answer" data-view="{view}" aria-label="Answer of {escape(model)}{side}">'
        f'<div role="status"><p class="best"><span class="sr">The answer is </span>{escape(best.label)} '
        f"<span>{escape(percent(best.score))}</span></p>"
        + (f'<p class="remark{"" if remark.strip() else " blank"}">{escape(remark)}</p>' if remark else "")
        + f'</div><ol class="bars">{rows}</ol>{about}</section>'
    )


def seen(picture: Image.Image, text: str) -> str:
    """The picture as the network's input, with a line about it."""
    width, height = picture.size
    alt = f"What the network sees: the middle of the picture at {width} × {height} pixels"
    picture = picture.copy()
    picture.thumbnail((128, 128))  # no smaller than it is shown
    source = data_url(picture, "PNG" if width < 100 else "JPEG")
    return f'<div class="about"><img alt="{alt}" src="{source}"><p>{escape(text)}</p></div>'


def problem(message: str) -> str:
    """One friendly sentence in the place of an answer."""
    return f'<section class="problem" role="alert"><p>{escape(sentence(message))}</p></section>'


def sentence(message: str) -> str:
    """A problem with a capital and a full stop; a file's name at its beginning stays as it is."""
    first, end = message.split()[0], "" if message.endswith(".") else "."
    return (message[:1].upper() + message[1:] if first.isalpha() else message) + end


def examples(pictures: dict[str, Image.Image]) -> str:
    """The example pictures as a strip of buttons."""
    return (
        '<div class="examples" role="group" aria-label="Example pictures">'
        + "".join(
            f'<button type="button" data-name="{escape(name)}" title="Try {escape(name)}">'
            f'<img alt="Example: {escape(name)}" src="{data_url(ImageOps.fit(picture, (160, 120)))}"></button>'
            for name, picture in pictures.items()
        )
        + "</div>"
    )


def sheet(picture: Image.Image, alt: str, caption: str) -> str:
    """A contact sheet, which a press enlarges to the whole window, with what it shows below it."""
    return (
        f'<figure class="sheet"><button type="button" aria-pressed="false" title="Enlarge">'
        f'<img alt="{escape(alt)}" src="{data_url(picture, "PNG")}"></button>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def blocks(pictures: list[Image.Image], chosen: int, columns: int, caption: str) -> str:
    """What the first layer and each block made of a picture, side by side; a press chooses a block, from 1 on.

    columns: patches in a row of the network's input. page.js marks the same place in all of them.
    """
    first, *others = (f'<span class="map"><img alt="" src="{data_url(picture, "PNG")}"></span>' for picture in pictures)
    tiles = "".join(
        f'<li><button type="button" data-name="{number}" aria-pressed="{"true" if number == chosen else "false"}">'
        f"{tile}<span>block {number}</span></button></li>"
        for number, tile in enumerate(others, 1)
    )
    return (
        f'<p class="note">{escape(caption)}</p><ol class="blocks" data-columns="{columns}">'
        f"<li><div>{first}<span>patches</span></div></li>{tiles}</ol>"
    )


def missing(rows: list[dict]) -> str:
    """The models that are not on this machine, each with a button that fetches it."""
    if not rows:
        return note("Every published model is on this machine.")
    items = "".join(
        f"<li><span><b>{escape(row['name'])}</b><br>{escape(row['data'])}: {row['top1']:.1f}&nbsp;% right</span>"
        f'<button type="button" data-name="{escape(row["name"])}">Download {_size(row)}'
        f'<span class="sr"> for {escape(row["name"])}</span></button></li>'
        for row in rows
    )
    return f'<ul class="missing">{items}</ul>'


def offer(here: list[str], rows: list[dict]) -> str:
    """A button for one of the models with many classes that are ``here``, or else for the first of ``rows``."""
    if not here and not rows:
        return ""
    name = here[0] if here else rows[0]["name"]
    how = "which is on this machine" if here else f"a download of {_size(rows[0])}, once"
    return (
        f'<button type="button" class="more" data-name="{escape(name)}"><b>Ask a model that knows 1,000 things</b>'
        f"<span>{escape(name)}, {how}</span></button>"
    )


def others(names: list[str], chosen: str, rows: list[dict]) -> str:
    """In the place of a second answer by the same model: the models to choose from, those to fetch after those here."""
    buttons = "".join(
        f'<button type="button" class="more" data-name="{escape(name)}"><b>{escape(name)}</b></button>'
        for name in names
        if name != chosen
    )
    text = note("Both sides have the same model. Compare it with another:")
    return f'<section class="others" aria-label="Models to compare with">{text}{buttons}{missing(rows)}</section>'


def agreement(text: str) -> str:
    return f'<p class="agreement" role="status">{escape(text)}</p>'


def _size(row: dict) -> str:
    return f"{4 * row['parameters'] / 1e6:.0f} MB"


def note(text: str) -> str:
    """A quiet line."""
    return f'<p class="note">{escape(text)}</p>'


def small(picture: Image.Image) -> str:
    """The picture as a data URL of WebP, reduced to what MAX_BYTES allow."""
    for side, quality in SIZES:
        scale = min(1, side / max(picture.size))
        size = tuple(max(1, round(scale * each)) for each in picture.size)
        buffer = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2).save(buffer, "WEBP", quality=quality, method=1)
        if buffer.tell() <= MAX_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data_url(picture: Image.Image, kind: str = "JPEG") -> str:
    """The picture in a text, so that no file of it is left behind."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88, compress_level=1)  # of JPEG and PNG; more costs more time than it saves
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _ratio(width: int, height: int) -> str:
    """Width to height for the layout; a picture of one row is shown as a stripe that can be seen."""
    return f"{min(12, max(1 / 6, width / height)):.4f}"
