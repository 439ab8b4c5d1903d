"""What the page shows, as HTML. Every text that comes from outside (labels, file names) is escaped here."""

import base64
import io
from html import escape

from PIL import Image, ImageOps

from convmixer import Prediction
from convmixer.classify import percent
from convmixer.explain import HeatMap

DISPLAY_SIDE = 1000  # pixels; a picture is shown no larger than this


def stage(view: str, name: str, maps: list[HeatMap]) -> str:
    """The picture with a heat map of each class laid over it; the first one shows.

    view: joins this stage with the bars of the same view. maps: of one picture, as `classify_with_heatmaps` gives them.
    """
    picture, (left, top, right, bottom) = maps[0].picture, maps[0].box
    width, height = picture.size
    layers = "".join(_layer(kind, position == 0, heatmap) for position, heatmap in enumerate(maps) for kind in KINDS)
    box = (
        f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
        f"width:{100 * (right - left) / width:.3f}%;height:{100 * (bottom - top) / height:.3f}%"
    )
    is_cropped = (right - left) * (bottom - top) < 0.98 * width * height
    return (
        f'<figure class="stage" data-view="{view}" style="--ratio:{_ratio(width, height)}">'
        f'<div class="frame"><img class="picture" alt="{escape(name)}" src="{data_url(shown(picture))}">'
        f'<div class="seen{" cropped" if is_cropped else ""}" style="{box}">{layers}</div></div></figure>'
    )


KINDS = {"for": "Where the network sees {label}", "signed": "What speaks for and against {label}"}


def _layer(kind: str, is_on: bool, heatmap: HeatMap) -> str:
    alt = f"{KINDS[kind].format(label=heatmap.label)}: strongest {place(heatmap)} of what it looks at"
    return (
        f'<img class="layer{" on" if is_on else ""}" data-kind="{kind}" data-index="{heatmap.index}" '
        f'alt="{escape(alt)}" src="{data_url(heatmap.layer(signed=kind == "signed"), "PNG")}">'
    )


def bars(view: str, model: str, predictions: list[Prediction], about: str) -> str:
    """The ranked answers as buttons: pressing one shows its heat map in the stage of the same view.

    about: HTML that goes below them.
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
        f'<p class="best" role="status"><span class="sr">The answer is </span>{escape(best.label)} '
        f"<span>{escape(percent(best.score))}</span></p>"
        f'<ol class="bars">{rows}</ol>{about}</section>'
    )


def seen(picture: Image.Image, text: str) -> str:
    """The picture as the network's input, with a line about it."""
    width, height = picture.size
    alt = f"What the network sees: the middle of the picture at {width} × {height} pixels"
    return f'<div class="about"><img alt="{alt}" src="{data_url(picture, "PNG")}"><p>{escape(text)}</p></div>'


def problem(message: str) -> str:
    """One friendly sentence in the place of an answer."""
    first, end = message.split()[0], "" if message.endswith(".") else "."
    text = message[:1].upper() + message[1:] if first.isalpha() else message  # a file's name stays as it is
    return f'<section class="problem" role="alert"><p>{escape(text)}{end}</p></section>'


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


def row_of_pictures(pictures: list[Image.Image], names: list[str], caption: str) -> str:
    """Small pictures in a row, each with its name below it."""
    tiles = "".join(
        f'<li><img alt="Features of {escape(name)}" src="{data_url(picture, "PNG")}"><span>{escape(name)}</span></li>'
        for name, picture in zip(names, pictures, strict=True)
    )
    return f'<ol class="row-of-pictures">{tiles}</ol><p class="note">{escape(caption)}</p>'


def missing(rows: list[dict]) -> str:
    """The models that are not on this machine, each with a button that fetches it."""
    if not rows:
        return note("Every published model is on this machine.")
    items = "".join(
        f"<li><span><b>{escape(row['name'])}</b><br>{escape(row['data'])}: {row['top1']:.1f} % right</span>"
        f'<button type="button" data-name="{escape(row["name"])}" aria-label="Download {escape(row["name"])}">'
        f"Download {4 * row['parameters'] / 1e6:.0f} MB</button></li>"
        for row in rows
    )
    return f'<ul class="missing">{items}</ul>'


def table(headers: list[str], rows: list[list[str]]) -> str:
    """A table; its first column names the rows."""
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """A quiet line."""
    return f'<p class="note">{escape(text)}</p>'


def place(heatmap: HeatMap) -> str:
    """Where the strongest evidence is, in words: "in the upper left", "in the middle"."""
    rows, columns = heatmap.values.shape
    row, column = divmod(int(heatmap.values.argmax()), columns)
    vertical = ("upper", "middle", "lower")[3 * row // rows]
    horizontal = ("left", "middle", "right")[3 * column // columns]
    return f"in the {vertical if vertical == horizontal else f'{vertical} {horizontal}'}"


def shown(picture: Image.Image) -> Image.Image:
    """The picture, reduced to what a page shows of it."""
    scale = min(1, DISPLAY_SIDE / max(picture.size))
    size = tuple(max(1, round(scale * side)) for side in picture.size)
    return picture if scale == 1 else picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


def data_url(picture: Image.Image, kind: str = "JPEG") -> str:
    """The picture in a text, so that no file of it is left behind."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88, compress_level=1)  # of JPEG and PNG; more costs more time than it saves
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _ratio(width: int, height: int) -> str:
    """Width to height for the layout; a picture of one row is shown as a stripe that can be seen."""
    return f"{min(12, max(1 / 6, width / height)):.4f}"
