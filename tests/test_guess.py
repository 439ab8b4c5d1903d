"""Checkpoints that do not describe themselves: what timm says beside the tensors, and guesses, which are said aloud."""

import argparse
import json

import networks
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import register_model, save_for_hf
from timm.models.convmixer import _create_convmixer
from timm.utils import CheckpointSaver
from torch import nn

from convmixer import CheckpointError, Classifier, load_checkpoint, zoo
from convmixer.labels import LabelsError, read_labels
from convmixer.preprocessing import CIFAR10, IMAGENET
from train.publish import hub_config

LABELS = ("cat", "dog", "été")
SEEN = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bilinear", "crop_pct": 0.9}
SIZES = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4, "num_classes": 3}


@register_model
def convmixer_tiny(pretrained=False, **kwargs):
    """A network of somebody's own, as they register it with timm."""
    return _create_convmixer("convmixer_tiny", pretrained, **SIZES | kwargs)


@pytest.fixture(scope="module")
def network():
    network = timm.create_model("convmixer_tiny", act_layer=nn.ReLU).eval()
    network.load_state_dict(networks.network(**SIZES).state_dict())
    return network


@pytest.fixture
def bare(network, tmp_path):
    """The network's tensors alone."""
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def save_as_train_py(network, folder, **given):
    """As timm's train.py does, with its command line, where most things are left to the model."""
    usual = {"model": "convmixer_tiny", "num_classes": None, "img_size": None, "input_size": None, "crop_pct": None}
    usual |= {"mean": None, "std": None, "interpolation": "", "model_kwargs": {}, "scale": [0.08, 1.0], "lr": 0.1}
    arguments = argparse.Namespace(**usual | given)
    saver = CheckpointSaver(network, torch.optim.SGD(network.parameters()), arguments, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, 50.0)
    return vars(arguments)


def assert_as_timm(classifier, network, data_config, picture):
    """The network's input is timm's, and so are the answers."""
    expected = create_transform(**data_config)(picture(120, 90))
    assert np.abs(classifier.prepare(picture(120, 90)) - expected.numpy()).max() < 1e-5
    with torch.inference_mode():
        scores = network(expected[None]).softmax(1)[0]
    assert np.abs(classifier.scores([picture(120, 90)])[0] - scores.numpy()).max() < 1e-4


def assumption(caplog) -> str:
    """The one line that says what was assumed, without the model's name; "" if there is none."""
    lines = [record.getMessage() for record in caplog.records if record.name == "convmixer"]
    assert len(lines) < 2
    return lines[0].split(": assumed ")[1].split("; ")[0] if lines else ""


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_that_timm_saved_for_the_hub(network, tmp_path, picture, caplog, safe):
    seen, names = {"input_size": (3, 64, 64), **SEEN}, ["n1", "n2", "n3"]
    config = {"label_names": names, "label_descriptions": dict(zip(names, LABELS, strict=True))}
    folder = tmp_path / "pets"
    save_for_hf(network, folder, config, {"act_layer": "relu"}, safe_serialization=safe, data_config=seen)
    classifier = Classifier(folder, engine="torch", device="cpu")
    assert (classifier.name, classifier.labels) == ("pets", LABELS)
    assert_as_timm(classifier, network, resolve_data_config(seen), picture)
    assert assumption(caplog) == ""


def test_a_published_architecture_needs_no_more_than_its_name(tmp_path, caplog):
    with torch.device("meta"):
        tensors = timm.create_model("convmixer_768_32", num_classes=2).state_dict()
    tensors = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    config = {"architecture": "convmixer_768_32", "num_classes": 2, "label_names": {"0": "no", "1": "yes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = zoo.load(tmp_path)
    assert (checkpoint.config.activation, checkpoint.preprocessing) == ("relu", IMAGENET)
    assert checkpoint.labels == ("no", "yes") and assumption(caplog) == ""


def test_our_own_config_describes_tensors_that_were_saved_again(random_checkpoint, tmp_path):
    path = random_checkpoint(classes=3)
    (tmp_path / "config.json").write_text('{"architecture": "convmixer_768_32", "num_classes": 9}')
    ours = load_checkpoint(path)  # which says itself what it is
    safetensors.torch.save_file(safetensors.torch.load_file(path), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(ours)))
    again = load_checkpoint(tmp_path / "model.safetensors")
    assert (again.config, again.labels, again.preprocessing) == (ours.config, ours.labels, ours.preprocessing)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "damaged config.json"),
        ('{"architecture": {}}', "damaged config.json beside it: 'preprocessing'"),
        ('{"architecture": "convmixer_1536_20"}', "it is 'convmixer_1536_20', .*dim=1536.* are of .*dim=8"),
        ('{"architecture": "x", "num_classes": 7}', "num_classes is 7, and the tensors have 3"),
        ('{"architecture": "x", "model_args": {"act_layer": "silu"}}', "activation is 'silu'; it must be one of"),
        ('{"architecture": "x", "input_size": [3, 64, 32]}', r"input_size is \[3, 64, 32\]; it must be .* a square"),
        ('{"architecture": "x", "label_names": ["a"]}', "there are 1 labels for 3 classes"),
    ],
)
def test_a_config_that_is_wrong_is_one_line(bare, config, message):
    bare.with_name("config.json").write_text('{"model_type": "of something else"}')
    assert load_checkpoint(bare).preprocessing == CIFAR10
    bare.with_name("config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(bare)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{bare}: ")


@pytest.mark.parametrize("activation", ["nn.ReLU", nn.ReLU], ids=str)
def test_a_training_with_everything_given(network, tmp_path, picture, caplog, activation):
    """A picture size, an activation and a normalisation that the shapes of the tensors do not show."""
    given = save_as_train_py(network, tmp_path, img_size=64, model_kwargs={"act_layer": activation}, **SEEN)
    classifier = Classifier(tmp_path, engine="torch", device="cpu")
    assert_as_timm(classifier, network, resolve_data_config(given, model=network), picture)
    assert assumption(caplog) == "no names for the classes"


def test_what_a_training_left_open_is_as_in_timm_and_said(network, tmp_path, picture, caplog):
    left = {"model": "convmixer_tiny_relu", "input_size": [3, 64, 64], "mean": [0.5], "std": [0.25]}
    given = save_as_train_py(network, tmp_path, crop_mode="border", **left)
    classifier = Classifier(tmp_path, engine="torch", device="cpu")
    assert_as_timm(classifier, network, resolve_data_config(given | {"crop_mode": "center"}), picture)
    said = "ReLU, crop 0.875, bicubic, a crop of the centre, and not 'border', no names for the classes"
    assert assumption(caplog) == said


def test_only_plain_values_of_the_command_line_are_taken(network, tmp_path):
    """Nothing in a stranger's Namespace becomes more than numbers and texts."""
    given = {"img_size": torch.ones(3), "mean": [[[[0.5]]]], "std": argparse.Namespace(a=1)}
    content = {"arch": 3, "args": argparse.Namespace(**given), "state_dict": network.state_dict()}
    torch.save(content, tmp_path / "last.pth.tar")
    small = "GELU, 32 pixels, crop 1.0, bicubic, CIFAR-10's mean, CIFAR-10's std, no names for the classes"
    assert ", ".join(load_checkpoint(tmp_path / "last.pth.tar").assumed) == small


def test_what_nobody_says_is_assumed_and_said_in_one_line(tmp_path, caplog):
    of_imagenet = timm.create_model("convmixer_tiny", num_classes=1000, patch_size=7)
    safetensors.torch.save_file(of_imagenet.state_dict(), tmp_path / "mine.safetensors")
    assert zoo.load(tmp_path / "mine.safetensors").name == "mine"
    said = "GELU, 224 pixels, crop 0.96, bicubic, ImageNet's mean, ImageNet's std, ImageNet's labels"
    assert assumption(caplog) == said


@pytest.mark.parametrize("content", ["\ufeffcat\r\ndog\r\nété\r\n", json.dumps(LABELS)], ids=["text", "JSON"])
def test_labels_in_a_file_take_the_place_of_the_models(random_checkpoint, tmp_path, content):
    (tmp_path / "labels").write_bytes(content.encode())
    labels = read_labels(tmp_path / "labels")
    assert Classifier(random_checkpoint(classes=3), labels=labels).labels == labels == LABELS
    with pytest.raises(CheckpointError, match="there are 3 labels for 4 classes"):
        Classifier(random_checkpoint(classes=4), labels=labels)


def test_labels_that_are_none(tmp_path):
    (tmp_path / "holes").write_bytes(b"cat\n\ndog")
    (tmp_path / "numbers").write_bytes(b"[1, 2]")
    (tmp_path / "picture").write_bytes(b"\xff\xfe")
    wrong = {"holes": "holds an empty label", "numbers": "holds an empty label", "picture": "is no UTF-8 text"}
    for name, line in (wrong | {"missing": "cannot be read: No such file"}).items():
        with pytest.raises(LabelsError, match=line):
            read_labels(tmp_path / name)
