"""What the demo answers, without a browser: HTML that can be trusted, tables, CSV, and views of the network."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from demo_browser import write_checkpoint
from PIL import Image

from convmixer import Classifier, Prediction
from convmixer.explain import HeatMap
from convmixer.labels import imagenet_labels
from demo import heat, inside, many, render, rows, words
from demo.answers import Answers, Picture, Problem
from demo.app import examples
from demo.guard import Upload
from demo.models import Models

HOSTILE = "<img src=x onerror=alert(1)> \"quoted\" 'single' ${1+1} {{x}} &amp;"


ROW = dict.fromkeys(many.COLUMNS, HOSTILE) | {"score": 1.0, "second_score": None}


class Page(HTMLParser):
    """The elements of some HTML, each as its name and attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str, **wanted) -> list[dict]:
        found = [attributes for name, attributes in self.elements if name == tag]
        return [each for each in found if all(wanted[key] in (each.get(key) or "") for key in wanted)]


@pytest.fixture(scope="module")
def answers() -> Answers:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return Answers(Models(["convmixer_256_8_cifar10"]), {"noise": noise})


def decoded(url: str) -> Image.Image:
    kind, data = url.split(",", 1)
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64", "data:image/webp;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_view_is_the_classifiers_answer(answers):
    stage, bars, answer = answers.view("main", Picture("noise"), "auto")
    classifier = answers.models.get("auto")
    expected, maps = classifier.classify_with_heatmaps(answers.examples["noise"])
    assert answer["image"] == "noise" and answer["model"] == classifier.name and answer["seconds"] > 0
    assert answer["predictions"] == [{"label": p.label, "index": p.index, "score": p.score} for p in expected]
    buttons = Page(bars).all("button")
    assert [int(button["data-index"]) for button in buttons] == [p.index for p in expected]
    assert [button["aria-pressed"] for button in buttons] == ["true"] + 4 * ["false"]
    (figure,) = Page(stage).all("figure")
    assert figure["data-index"] == str(expected[0].index)
    sent_maps = json.loads(figure["data-heat"])
    assert list(sent_maps["maps"]) == [str(heatmap.index) for heatmap in maps]
    largest = max(abs(heatmap.values).max() for heatmap in maps)
    for heatmap in maps:
        sent = sent_maps["maps"][str(heatmap.index)]
        values = np.frombuffer(base64.b64decode(sent["grid"]), np.int8).reshape(sent_maps["rows"], sent_maps["columns"])
        assert np.allclose(values * largest / 127, heatmap.values, atol=largest / 250)
        assert f"evidence for {heatmap.label}" in sent["words"]


def test_a_fine_grid_is_averaged():
    values = np.kron(np.array([[1, -2], [0, 4]]), np.ones((50, 50))).astype(np.float32)
    sent = heat.grids([Prediction("x", 7, 0.5)], [HeatMap("x", 7, values, (0, 0, 9, 9), Image.new("RGB", (9, 9)))])
    grid = np.frombuffer(base64.b64decode(sent["maps"]["7"]["grid"]), np.int8).reshape(sent["rows"], sent["columns"])
    assert grid.shape == (48, 48) and grid[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [32, -64, 0, 127]


@pytest.mark.parametrize(
    "score, values, sentence",
    [
        (0.95, [[3, 0], [0, 0]], "Strong evidence for x, most of it in the upper left."),
        (0.5, [[0, 0], [0, 3]], "Some evidence for x, most of it in the middle."),
        (0.001, [[3, -9], [0, 0]], "Weak evidence for x, most of it in the upper left, and more against it."),
        (0.001, [[-3, -9], [0, 0]], "No evidence for x."),
    ],
)
def test_a_heat_map_in_words(score, values, sentence):
    heatmap = HeatMap("x", 0, np.array(values, np.float32), (0, 0, 6, 6), Image.new("RGB", (6, 6)))
    assert words.evidence(score, heatmap) == sentence


def test_scores_in_whole_per_cents():
    shown = [words.percent(score) for score in (0, 0.009, 0.014, 0.4789, 0.989, 0.9901, 1)]
    assert shown == ["<1 %", "<1 %", "1 %", "48 %", "99 %", ">99 %", ">99 %"]


def test_an_unsure_answer_says_so(photos):
    answers = Answers(Models(["convmixer_256_8_cifar10"]), examples())
    remarks = {}
    for name, path in [(name, None) for name in answers.examples] + [
        (path.stem, path) for path in photos.glob("*.jpg")
    ]:
        remarks[name, path is None] = Page(answers.view("main", Picture(name, path), "auto")[1]).text
    unsure = "Not sure: this may also be frog, or none of the ten things that it knows."
    lesson = " is none of the ten things that this model knows"
    assert unsure in remarks["pizza", False]
    for (name, is_example), text in remarks.items():
        assert ("Not sure" in text) == (name == "pizza")
        assert (f"A lesson: {name}{lesson}" in text) == (is_example and name in ("cheetah", "lion"))
        assert "This model knows ten things only: airplane, automobile, bird," in text


def test_two_models_agree_or_differ():
    a, b = ([Prediction(*each) for each in rows] for rows in ([("cat", 0, 0.7), ("dog", 1, 0.2)], [("dog", 3, 0.5)]))
    assert words.agreement(a, a) == "Both say cat: 70 % and 70 %."
    assert words.agreement(a, b) == "They differ: cat, 70 %, and dog, 50 %. Both think of dog."
    assert words.agreement(a[:1], b) == "They differ: cat, 70 %, and dog, 50 %."


def test_an_answer_of_a_large_model_is_small_too(tmp_path, photos):
    path = write_checkpoint(tmp_path / "m.safetensors", "m", imagenet_labels(), size=224, patch_size=7)
    answers = Answers(Models([str(path)]), {})
    for photo in photos.glob("*.jpg"):
        stage, bars, answer = answers.view("main", Picture(photo.name, photo), "m")
        assert len(json.dumps([stage, bars, answer])) < 58_000


def test_the_seen_part_lies_where_the_network_looks(answers):
    stage, _, _ = answers.view("main", Picture("noise"), "auto")
    (box,) = Page(stage).all("div", **{"class": "seen"})
    assert box["style"] == "left:16.667%;top:0.000%;width:66.667%;height:100.000%"  # 40 x 40 out of 60 x 40
    assert "cropped" in box["class"]


def test_an_upload_is_read_and_a_vanished_one_asked_for_again(answers, tmp_path):
    path = tmp_path / "picture.png"
    answers.examples["noise"].save(path)
    as_upload = answers.view("main", Picture("mine.png", path), "auto")[2]
    assert as_upload["predictions"] == answers.view("main", Picture("noise"), "auto")[2]["predictions"]
    path.unlink()
    with pytest.raises(Problem, match="uploads go after an hour, and when the demo is restarted; add it again"):
        answers.view("main", Picture("mine.png", path), "auto")


def test_problems_name_the_visitors_file_and_no_folder(answers, tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("text")
    for ask in (
        lambda: answers.view("main", Picture("mine.png", path), "auto"),
        lambda: inside.look(answers, Picture("mine.png", path), "auto", [], inside.BLOCKS, 1),
    ):
        with pytest.raises(Problem, match=r"^mine\.png cannot be read as a picture; supported formats are") as caught:
            ask()
        assert str(tmp_path) not in str(caught.value)


def test_a_model_or_an_example_that_is_not_there_is_a_problem(answers):
    with pytest.raises(Problem, match="not on this machine"):
        answers.view("main", Picture("noise"), "nonsense")
    with pytest.raises(Problem, match="no such example"):
        answers.view("main", Picture("../../etc/passwd"), "auto")


def test_texts_from_outside_stay_texts():
    heatmap = HeatMap(HOSTILE, 3, np.eye(4, dtype=np.float32), (0, 0, 8, 8), Image.new("RGB", (8, 8)))
    predictions = [Prediction(HOSTILE, 3, 1.0)]
    html = {
        "stage": render.stage("main", HOSTILE, predictions, [heatmap]),
        "bars": render.bars("main", HOSTILE, predictions, HOSTILE, render.note(HOSTILE)),
        "problem": render.problem(HOSTILE),
        "table": rows.table([ROW | {"problem": ""}, ROW], 2 * [Upload(HOSTILE, Path(HOSTILE))], 2 * ["data:image/x"]),
        "blocks": render.blocks([heatmap.picture], 1, 4, HOSTILE),
        "sheet": render.sheet(heatmap.picture, HOSTILE, HOSTILE),
        "examples": render.examples({HOSTILE: heatmap.picture}),
    }
    for name, text in html.items():
        page = Page(text)
        assert all(picture["src"].startswith("data:image/") for picture in page.all("img")), name
        assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes), name
        strings = page.text + "".join(str(value) for _, attributes in page.elements for value in attributes.values())
        assert HOSTILE in strings, name


def test_every_picture_has_an_alternative_text(answers):
    views = [answers.view("main", Picture("noise"), "auto")[0], render.examples(answers.examples)]
    views += [inside.look(answers, Picture("noise"), "auto", [], view, 3) for view in inside.VIEWS]
    for html in views:
        pictures = Page(html).all("img")
        assert pictures and all("alt" in picture for picture in pictures)


@pytest.mark.parametrize(
    "row, column, where",
    [(0, 0, "upper left"), (1, 1, "middle"), (1, 2, "middle right"), (2, 1, "lower middle"), (2, 2, "lower right")],
)
def test_the_place_of_the_strongest_evidence_in_words(row, column, where):
    values = np.full((6, 6), -1, np.float32)
    values[2 * row, 2 * column + 1] = 0.5
    assert words.place(HeatMap("x", 0, values, (0, 0, 6, 6), Image.new("RGB", (6, 6)))) == f"in the {where}"


def test_long_and_thin_pictures_keep_a_shape_that_can_be_seen():
    for size in ((3000, 1), (1, 3000), (1, 1)):
        picture = Image.new("RGB", size)
        heatmap = HeatMap("x", 0, np.ones((2, 2), np.float32), (0, 0, *size), picture)
        stage = render.stage("main", "x", [Prediction("x", 0, 0.5)], [heatmap])
        ratio = float(re.search("--ratio:([0-9.]+)", stage).group(1))
        assert 0.15 < ratio <= 12
        assert max(decoded(render.small(picture)).size) <= 960


def test_look_inside_shows_the_networks_own_filters(answers):
    classifier = answers.models.get("auto")
    from convmixer import sheets

    for view, expected in (
        (inside.PATCHES, sheets.patch_filters(classifier.weights["stem.0.weight"])),
        (inside.DEPTHWISE, sheets.depthwise_filters(classifier.weights["blocks.2.0.fn.0.weight"])),
    ):
        (picture,) = Page(inside.look(answers, Picture("noise"), "auto", [], view, 3)).all("img")
        assert np.array_equal(np.asarray(decoded(picture["src"])), np.asarray(expected))
    blocks = Page(inside.look(answers, Picture("noise"), "auto", [], inside.BLOCKS, 8))
    assert len(blocks.all("img")) == classifier.config.depth + 2  # the stem, each block, and the strongest channels


def uploads(folder: Path, contents: dict[str, bytes]) -> list[Upload]:
    for number, content in enumerate(contents.values()):
        (folder / str(number)).write_bytes(content)
    return [Upload(name, folder / str(number)) for number, name in enumerate(contents)]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_batch_answers_in_order_and_names_what_it_cannot_read(answers, tmp_path):
    contents = {f"{seed}.png": png(seed) for seed in range(20)}
    contents = dict(list(contents.items())[:5]) | {"broken.png": b"text", "empty.jpg": b""} | contents
    files = [*uploads(tmp_path, contents), Upload("gone.png", tmp_path / "gone")]
    classifier = Classifier("convmixer_256_8_cifar10")
    table = list(many.classify(classifier, files, []))
    assert [row["picture"] for row in table] == [*contents, "gone.png"]
    for row in table:
        if row["picture"] in ("broken.png", "empty.jpg"):
            assert row["problem"].startswith(row["picture"]) and row["answer"] == "" and row["score"] is None
        elif row["picture"] == "gone.png":
            assert "add it again" in row["problem"]
        else:
            best, second = classifier.classify(png(int(row["picture"][:-4])), 2)
            assert (row["answer"], row["second"], row["problem"]) == (best.label, second.label, "")
            assert row["score"] == pytest.approx(best.score, abs=1e-5)
    assert (
        many.summarise(table, "a model", 1.23).count("20 of 23 pictures answered by a model in 1.2 s. 3 could not") == 1
    )


def test_a_network_of_one_class_has_no_second_answer(random_checkpoint, tmp_path):
    classifier = Classifier(random_checkpoint(classes=1))
    (row,) = many.classify(classifier, uploads(tmp_path, {"a.png": png(0)}), [])
    assert (row["answer"], row["second"], row["second_score"]) == ("label 0", "", None)
    assert '<td data-header="Score" data-sort=""></td>' in rows.table([row], [Upload("a.png", tmp_path)], [""])


def test_the_csv_holds_full_scores_and_any_name(answers, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    name = 'a "quoted", name\nwith a line.png'
    given = uploads(tmp_path, {name: png(0), "=кот.png": png(1)})
    table = list(many.classify(answers.models.get("auto"), given, []))
    path = many.write_csv(table)
    assert path.is_relative_to(tmp_path / "uploads")
    with path.open(encoding="utf-8-sig", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["picture"] for row in read] == [name, "'=кот.png"]  # no formula
    assert [float(row["score"]) for row in read] == [row["score"] for row in table]
    assert many.write_csv(table) != path  # nobody can guess another visitor's
