"""What the demo says and which models it has, without a server: words, many pictures, visitors' checkpoints."""

import base64
import json
import os

import numpy as np
import pytest
from demo_client import SHIPPED, draw, png, write_checkpoint
from PIL import Image

from convmixer import CheckpointError, Classifier, ModelError, Prediction, zoo
from convmixer.explain import HeatMap
from convmixer.labels import imagenet_labels
from demo import heat, many, render, rows, words
from demo.answers import Answers, Picture, Problem
from demo.app import examples
from demo.guard import Upload
from demo.models import MAX_MULTIPLICATIONS, MAX_OWN, MAX_VALUES, Models, multiplications


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)


def heat_map(values, size: tuple[int, int] = (6, 6)) -> HeatMap:
    return HeatMap("x", 7, np.array(values, np.float32), (0, 0, *size), Image.new("RGB", size))


# Words.


@pytest.mark.parametrize(
    ("score", "values", "sentence"),
    [
        (0.95, [[3, 0, 0], [0, 0, 0], [0, 0, 0]], "Strong evidence for x, most of it in the upper left."),
        (0.5, [[0, 0, 0], [0, 3, 0], [0, 0, 0]], "Some evidence for x, most of it in the middle."),
        (
            0.1,
            [[0, 0, 0], [0, 0, -9], [0, 3, 0]],
            "Weak evidence for x, most of it in the lower middle, and more against it.",
        ),
        (0.001, [[-3, -9], [0, 0]], "No evidence for x."),
    ],
)
def test_a_heat_map_in_words(score, values, sentence):
    assert words.evidence(score, heat_map(values)) == sentence


def test_scores_in_whole_per_cents():
    shown = [words.percent(score) for score in (0, 0.009, 0.014, 0.4789, 0.989, 0.9901)]
    assert shown == ["<1 %", "<1 %", "1 %", "48 %", "99 %", ">99 %"]


def test_two_models_agree_or_differ():
    a, b = [Prediction("cat", 0, 0.7), Prediction("dog", 1, 0.2)], [Prediction("dog", 3, 0.5)]
    assert words.agreement(a, a) == "Both say cat: 70 % and 70 %."
    assert words.agreement(a, b) == "They differ: cat, 70 %, and dog, 50 %. Both think of dog."
    assert words.agreement(a[:1], b) == "They differ: cat, 70 %, and dog, 50 %."


def test_an_unsure_answer_and_an_example_of_another_class_are_told(photos):
    answers = Answers(Models([SHIPPED]), examples())
    shown = [Picture(name) for name in answers.examples] + [Picture(path.stem, path) for path in photos.glob("*.jpg")]
    for picture in shown:
        said = answers.view("main", picture, "auto")[1]
        sentence = "Not sure: this may also be frog, or none of the ten things that it knows."
        assert ("Not sure" in said) == (sentence in said) == (picture.name == "pizza")
        lesson = f"A lesson: {picture.name} is none of the ten things that this model knows"
        assert (lesson in said) == (picture.name in ("cheetah", "lion"))
        assert "This model knows ten things only: airplane, automobile, bird," in said


def test_a_fine_grid_is_averaged_and_all_classes_have_one_scale():
    predictions, maps = [Prediction("x", 7, 0.5)], [heat_map(np.kron([[1, -2], [0, 4]], np.ones((50, 50))), (9, 9))]
    sent = heat.grids(predictions, maps)
    grid = np.frombuffer(base64.b64decode(sent["maps"]["7"]["grid"]), np.int8).reshape(sent["rows"], sent["columns"])
    assert grid.shape == (48, 48) and grid[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [32, -64, 0, 127]


def test_an_answer_is_small(tmp_path, photos):
    path = write_checkpoint(tmp_path / "m.safetensors", "m", imagenet_labels(), size=224, patch_size=7)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), dtype=np.uint8))
    answers = Answers(Models([SHIPPED, str(path)]), {"noise": noise})
    for picture in (Picture("noise"), *(Picture(photo.name, photo) for photo in photos.glob("*.jpg"))):
        for model in (SHIPPED, "m"):
            assert 5_000 < len(json.dumps(answers.view("main", picture, model))) < 58_000


def test_the_seen_part_lies_where_the_network_looks():
    box = (10, 0, 50, 40)  # 40 x 40 in the middle of 60 x 40
    figure = render.stage("main", "x", [Prediction("x", 7, 0.5)], [HeatMap("x", 7, np.ones((2, 2)), box, draw(1))])
    assert 'class="seen cropped" style="left:16.667%;top:0.000%;width:66.667%;height:100.000%"' in figure


# Many pictures.


def test_a_picture_that_is_gone_and_a_network_of_one_class_in_the_table(random_checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    files, thumbnails = [Upload(name, tmp_path / name) for name in ("a.png", "gone.png")], []
    row, gone = many.classify(Classifier(random_checkpoint(classes=1)), files, thumbnails)
    assert (row["answer"], row["second"], row["second_score"]) == ("label 0", "", None)
    assert (gone["picture"], gone["score"]) == ("gone.png", None) and "add it again" in gone["problem"]
    with pytest.raises(Problem, match="add it again"):
        Answers(Models(), {}).source(Picture("gone.png", tmp_path / "gone.png"))
    assert '<td data-header="Score" data-sort=""></td>' in rows.table([row, gone], files, thumbnails)


# Models.


def test_models_that_are_here_answer_and_the_others_could_be_fetched(random_checkpoint):
    models = Models()
    assert models.default == SHIPPED and models.names() == [SHIPPED] and models.get("auto") is models.get(SHIPPED)
    missing = models.missing()
    assert {row["name"] for row in missing} == {name for name in zoo.MODELS if name != SHIPPED}
    assert missing == sorted(missing, key=lambda row: row["parameters"])
    zoo.cache_dir().mkdir()
    random_checkpoint().rename(zoo.cache_dir() / "convmixer_768_32.safetensors")
    assert models.names() == [SHIPPED, "convmixer_768_32"] and len(models.missing()) == len(missing) - 1
    for name in ("convmixer_1536_20", "../../etc/passwd"):
        with pytest.raises(ModelError, match=f"is not on this machine; choose one of {SHIPPED}"):
            models.get(name)


def test_the_first_file_is_the_default_and_equal_names_are_told_apart(random_checkpoint):
    models = Models([str(random_checkpoint(seed=0)), str(random_checkpoint(seed=1)), SHIPPED])
    assert models.default == "random" and models.names() == ["random", SHIPPED, "random (2)"]
    own = [models.add_own(random_checkpoint(seed=2), "mine.safetensors")]
    own += [models.add_own(random_checkpoint(seed=3), "mine.safetensors", own)]
    assert [each.name for each in own] == ["yours: random", "yours: random (2)"]
    four = [models.get(name, own) for name in ("random", "random (2)", "yours: random", "yours: random (2)")]
    assert len({classifier.classify(draw(1), 1)[0].score for classifier in four}) == 4
    with pytest.raises(ModelError):  # another visitor's
        models.get("yours: random")


def test_few_own_checkpoints_stay_in_memory_and_a_deleted_one_is_asked_for_again(random_checkpoint):
    models = Models()
    owns = [models.add_own(random_checkpoint(seed), "mine.safetensors") for seed in range(MAX_OWN + 1)]
    kept = models.get(owns[1].name, [owns[1]])
    for own in owns[:2]:
        os.remove(own.path)
    assert models.get(owns[1].name, [owns[1]]) is kept
    with pytest.raises(CheckpointError, match="upload it again"):
        models.get(owns[0].name, [owns[0]])


@pytest.mark.parametrize(("size", "architecture"), [(4096, {"patch_size": 1}), (4096, {"patch_size": 2, "dim": 64})])
def test_a_small_checkpoint_that_asks_for_much_is_refused_before_it_runs(tmp_path, size, architecture):
    small = {"dim": 4, "depth": 1, "kernel_size": 3} | architecture
    path = write_checkpoint(tmp_path / "costly.safetensors", size=size, **small)
    assert path.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=r"costly\.safetensors needs too much .*command line"):
        Models().add_own(path, "costly.safetensors")
    largest, side = zoo.MODELS["convmixer_1536_20"].config, 224 // 7  # which must do
    assert multiplications(largest, side) < MAX_MULTIPLICATIONS and largest.dim * side**2 < MAX_VALUES
