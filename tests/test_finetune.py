"""Where fine-tuning starts, and training the head alone on features that are computed once."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from convmixer import load_checkpoint, zoo
from convmixer.engine import open_engine
from convmixer.model import ConvMixer, ConvMixerConfig, build
from convmixer.weights import save_checkpoint
from train import run as train_run
from train.distributed import World
from train.errors import TrainingError
from train.freeze import FeatureBatches, check_frozen, features_of, frozen
from train.recipes import RECIPES
from train.run import parse
from train.watch import Watch

SHIPPED = "convmixer_256_8_cifar10"
FINETUNE = ["--recipe", "finetune", "--workers", 0, "--hold-out", 0.2]
FREEZE = [*FINETUNE, "--freeze", "--epochs", 3, "--batch-size", 8]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Forty photographs of two classes, told apart by their brightness, and a file that is none."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pets")
    for i in range(40):
        pixels = rng.normal((80, 160)[i % 2], 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
        path = folder / ("my cat", "my dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "my cat" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def call(call_main, pets, tmp_path):
    """A function that runs train/run.py on the pets in this process; gives (code, stdout, stderr)."""
    return lambda *words: call_main(train_run.main, "--data", pets, "--out", tmp_path / "run", *words)


def test_the_best_model_that_is_here_is_the_start(tmp_path, monkeypatch, cifar10):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)
    words = ["--recipe", "finetune", "--data", "DIR"]
    recipe = parse(words).recipe
    assert (recipe.weights, recipe.model) == (SHIPPED, zoo.load(SHIPPED).config)
    assert recipe.preprocessing.size == 64  # its own 32 are too few for photographs
    assert parse([*words, "--data", str(cifar10)]).recipe.preprocessing.size == 32

    small = ConvMixerConfig(4, 1, kernel_size=3, patch_size=7, activation="relu")
    entry = replace(zoo.MODELS["convmixer_768_32"], config=small)
    monkeypatch.setitem(zoo.MODELS, entry.name, entry)
    (tmp_path / "cache").mkdir()
    blank = replace(zoo._description(entry), state_dict=ConvMixer(small).state_dict())
    save_checkpoint(tmp_path / "cache" / f"{entry.name}.safetensors", blank)
    recipe = parse(words).recipe
    assert (recipe.weights, recipe.model, recipe.preprocessing) == (entry.name, small, entry.preprocessing)

    (tmp_path / "recipe.json").write_text(json.dumps({"weights": SHIPPED}))  # of a run that began before it came
    assert parse([*words, "--out", str(tmp_path), "--resume"]).recipe.weights == SHIPPED


def test_finetuning_starts_from_the_weights_and_takes_the_datas_own_labels(call, tmp_path, random_checkpoint):
    weights = random_checkpoint(size=32)
    words = [*FINETUNE, "--weights", weights]
    code, out, err = call(*words, "--epochs", 1, "--lr", 0, "--ema", 0.9)
    assert (code, err) == (0, "")
    assert out.count("on photographs it gives a first guess") == 1  # who learnt on 32 pixels
    tuned, start = load_checkpoint(tmp_path / "run" / "model.safetensors"), load_checkpoint(weights)
    assert tuned.labels == ("my cat", "my dog")
    assert tuned.preprocessing == replace(start.preprocessing, size=64)
    for name, tensor in start.state_dict.items():
        if name.endswith(("weight", "bias")) and not name.startswith("head."):
            assert np.array_equal(tuned.state_dict[name], tensor), name  # the rate was 0
    assert tuned.state_dict["head.weight"].shape == (2, 16)
    code, _, err = call(*words, "--model.kernel-size", 7, "--out", tmp_path / "other")
    assert code == 2 and "leave the fields of --model as they are" in err


def test_the_head_alone_is_trained_on_features_computed_once(call, tmp_path, random_checkpoint):
    start = random_checkpoint(size=64)
    code, out, err = call(*FREEZE, "--weights", start, "--lr", "0.1", "--epochs", "20")
    assert (code, err) == (0, "")
    assert out.count("mirrored too, and 8 held-out ones computed once in") == 1
    assert out.count("left out: ") == 1 and "broken.png" in out
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "run" / "model.safetensors")
    for name, tensor in before.state_dict.items():  # batch norm's statistics, too
        assert name.startswith("head.") or np.array_equal(after.state_dict[name], tensor), name
    assert after.accuracy["top1"] == 100.0


def test_features_are_the_networks_own_and_those_of_the_mirrored_picture(random_checkpoint):
    checkpoint = load_checkpoint(random_checkpoint())
    network = build(checkpoint.config, checkpoint.state_dict).eval()
    engine = open_engine(checkpoint.config, checkpoint.state_dict)
    images, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    features, kept = features_of(lambda n, skipped: [(images, labels)], engine, (False, True), Watch())
    assert torch.equal(kept, labels)
    with torch.inference_mode():
        for found, pictures in zip(features, (images, images.flip(3)), strict=True):
            wanted = network.forward_features(pictures).mean((2, 3), keepdim=True)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

    told = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 40, 4, 1, 1)  # 1: mirrored
    batches = FeatureBatches(told, torch.arange(40), RECIPES["finetune"], World(torch.device("cpu")))
    parts = list(batches.parts(0, 0))
    assert torch.cat([part.images for part in parts]).unique().tolist() == [0.0, 1.0]
    assert torch.cat([part.labels for part in parts]).sort().values.equal(torch.arange(40))
    assert next(batches.parts(0, 1)).labels.equal(parts[1].labels)  # a resumed epoch goes on the same


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--augmentation.scale", "0.5"], "leave all but --augmentation.flip"),
        (["--weights", ""], "add --weights auto"),
    ],
)
def test_what_features_cannot_have_is_one_line(call, tmp_path, arguments, part):
    code, _, err = call(*FREEZE, *arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert part in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("size", "plain", "part"), [(2, [], "without torchrun"), (1, None, "by index")])
def test_streams_and_several_processes_are_refused(size, plain, part):
    with pytest.raises(TrainingError, match=part):
        check_frozen(frozen(RECIPES["finetune"]), SimpleNamespace(plain=plain), World(torch.device("cpu"), size=size))
