"""Where fine-tuning starts, and training the head alone on features that are computed once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer import Classifier, load_checkpoint, zoo
from convmixer.engine import open_engine
from convmixer.model import ConvMixer, ConvMixerConfig, build
from convmixer.weights import save_checkpoint
from train import run as train_run
from train.distributed import World
from train.errors import TrainingError
from train.freeze import FeatureBatches, check_frozen, features_of, frozen
from train.recipe import Augmentation
from train.recipes import RECIPES
from train.run import parse
from train.watch import Watch

SHIPPED = "convmixer_256_8_cifar10"
SMALL = "--epochs 3 --batch-size 8 --hold-out 0.2"
FREEZE = f"--recipe finetune --freeze --workers 0 {SMALL}".split()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)


@pytest.fixture
def pets(tmp_path):
    """Forty photographs of two classes, told apart by their brightness."""
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.normal((80, 160)[i % 2], 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
        path = tmp_path / "pets" / ("my cat", "my dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "pets"


@pytest.fixture
def start(random_checkpoint):
    """A small network to start from."""
    return random_checkpoint(size=32)


@pytest.fixture
def call(call_main):
    """A function that runs train/run.py in this process; gives (code, stdout, stderr)."""

    def run(*arguments: object):
        return call_main(train_run.main, *arguments)

    return run


def test_the_best_model_that_is_here_is_the_start(tmp_path, monkeypatch, cifar10_folder):
    recipe = parse(["--recipe", "finetune", "--data", "DIR"]).recipe
    assert (recipe.weights, recipe.preprocessing.size) == (SHIPPED, 64)
    assert recipe.model == zoo.load(SHIPPED).config
    assert (
        parse(["--recipe", "finetune", "--data", "DIR", "--preprocessing.size", "48"]).recipe.preprocessing.size == 48
    )
    assert parse(["--recipe", "finetune", "--data", str(cifar10_folder)]).recipe.preprocessing.size == 32

    small = ConvMixerConfig(4, 1, kernel_size=3, patch_size=7, activation="relu")
    entry = replace(zoo.MODELS["convmixer_768_32"], config=small)
    monkeypatch.setitem(zoo.MODELS, entry.name, entry)
    (tmp_path / "cache").mkdir()
    blank = replace(zoo._description(entry), state_dict=ConvMixer(small).state_dict())
    save_checkpoint(tmp_path / "cache" / f"{entry.name}.safetensors", blank)
    recipe = parse(["--recipe", "finetune", "--data", "DIR"]).recipe
    assert (recipe.weights, recipe.model, recipe.preprocessing) == (entry.name, small, entry.preprocessing)

    (tmp_path / "recipe.json").write_text(json.dumps({"weights": SHIPPED}))  # of a run that began before it came
    resumed = ["--recipe", "finetune", "--data", "DIR", "--out", str(tmp_path), "--resume"]
    assert parse(resumed).recipe.weights == SHIPPED


@pytest.mark.parametrize(("size", "warned"), [(32, True), (64, False)])
def test_a_start_on_tiny_pictures_says_what_to_expect(call, pets, tmp_path, random_checkpoint, size, warned):
    weights = random_checkpoint(size=size)
    code, out, err = call(*FREEZE, "--data", pets, "--weights", weights, "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert sum("on photographs it gives a first guess" in line for line in out.splitlines()) == warned


def test_the_head_alone_is_trained_on_features_computed_once(call, pets, start, tmp_path):
    (pets / "my cat" / "broken.png").write_bytes(b"no picture")
    words = [*FREEZE, "--data", pets, "--weights", start, "--out", tmp_path / "run"]
    code, out, err = call(*words, "--lr", "0.1", "--epochs", "20")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("features of")]
    assert "mirrored too, and 8 held-out ones" in line
    assert out.count("left out: ") == 1 and "broken.png" in out
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "run" / "model.safetensors")
    for name, tensor in before.state_dict.items():  # batch norm's statistics, too
        assert name.startswith("head.") or np.array_equal(after.state_dict[name], tensor), name
    assert after.accuracy["top1"] == 100.0
    classifier = Classifier(str(tmp_path / "run" / "model.safetensors"))
    answers = [classifier.classify(path)[0].label for path in sorted((pets / "my dog").iterdir())]
    assert answers.count("my dog") >= 19
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["freeze"] is True
    assert {name for name, value in recipe["augmentation"].items() if value} >= {"flip"}
    assert (recipe["augmentation"]["scale"], recipe["augmentation"]["jitter"]) == (1.0, 0.0)


def test_a_frozen_run_resumes_to_the_same_weights(call, pets, start, tmp_path, monkeypatch):
    words = [*FREEZE, "--data", pets, "--weights", start]
    assert call(*words, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        original = torch.optim.AdamW.step

        def step(self, *arguments, **options):
            step.calls += 1
            if step.calls == 8:
                raise KeyboardInterrupt
            return original(self, *arguments, **options)

        step.calls = 0
        patch.setattr(torch.optim.AdamW, "step", step)
        assert call(*words, "--out", tmp_path / "cut", "--save-every", "0")[0] == 130
    code, out, _ = call(*words, "--out", tmp_path / "cut", "--resume")
    assert code == 0 and "going on after epoch 1 of 3 and step 3" in out
    whole, cut = (load_checkpoint(tmp_path / name / "model.safetensors").state_dict for name in ("whole", "cut"))
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_features_are_the_networks_own_and_those_of_the_mirrored_picture(start):
    checkpoint = load_checkpoint(start)
    network = build(checkpoint.config, checkpoint.state_dict).eval()
    engine = open_engine(checkpoint.config, checkpoint.state_dict)
    images, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    features, kept = features_of(lambda n, skipped: [(images, labels)], engine, (False, True), Watch())
    assert torch.equal(kept, labels)
    with torch.inference_mode():
        for found, pictures in zip(features, (images, images.flip(3)), strict=True):
            wanted = network.forward_features(pictures).mean((2, 3), keepdim=True)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    for flip, wanted in ((0.0, {0.0}), (0.5, {0.0, 1.0}), (1.0, {1.0})):
        recipe = replace(RECIPES["finetune"], augmentation=Augmentation(flip=flip))
        told = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 40, 4, 1, 1)  # 1: mirrored
        batches = FeatureBatches(told, torch.arange(40), recipe, World(torch.device("cpu")))
        parts = list(batches.parts(0, 0))
        assert {value for part in parts for value in part.images.flatten().tolist()} == wanted
        assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(40))
        assert torch.equal(parts[1].labels, next(batches.parts(0, 1)).labels)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--augmentation.scale", "0.5"], "leave all but --augmentation.flip"),
        (["--augmentation.mixup", "0.5"], "leave all but --augmentation.flip"),
        (["--image-sizes", "0", "16"], "leave all but --augmentation.flip"),
        (["--weights", ""], "add --weights auto"),
    ],
)
def test_what_features_cannot_have_is_one_line(call, pets, tmp_path, arguments, part):
    code, _, err = call(*FREEZE, "--data", pets, "--out", tmp_path / "run", *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert part in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "plain", "part"), [(2, [], "without torchrun"), (1, None, "by index")])
def test_streams_and_several_processes_are_refused(size, plain, part):
    class Opened:
        pass

    data = Opened()
    data.plain = plain
    with pytest.raises(TrainingError, match=part):
        check_frozen(frozen(RECIPES["finetune"]), data, World(torch.device("cpu"), size=size))
