"""Checkpoints that do not describe themselves: what timm says beside the tensors, and guesses, which are said aloud."""

import argparse
import json

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
from convmixer.__main__ import main
from convmixer.labels import LabelsError, imagenet_labels, read_labels
from convmixer.preprocessing import CIFAR10, IMAGENET, Preprocessing

LABELS = ["cat", "dog", "été"]
SEEN = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bilinear", "crop_pct": 0.9}


@register_model
def convmixer_tiny(pretrained=False, **kwargs):
    """A network of somebody's own, as they register it with timm."""
    sizes = {"dim": 8, "depth": 2, "kernel_size": 3, "patch_size": 4} | kwargs
    return _create_convmixer("convmixer_tiny", pretrained, **sizes)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = timm.create_model("convmixer_tiny", num_classes=3, act_layer=nn.ReLU).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.uniform_(0.2, 2)
    return network


def train_arguments(**given) -> argparse.Namespace:
    """What timm's train.py keeps of its command line, where most things are left to the model."""
    usual = {"model": "convmixer_tiny", "num_classes": None, "img_size": None, "input_size": None, "crop_pct": None}
    usual |= {"mean": None, "std": None, "interpolation": "", "model_kwargs": {}, "scale": [0.08, 1.0], "lr": 0.1}
    return argparse.Namespace(**usual | given)


def save_as_train_py(network, folder, arguments):
    saver = CheckpointSaver(network, torch.optim.SGD(network.parameters()), arguments, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, 50.0)
    return folder / "model_best.pth.tar"


def assert_as_timm(classifier, network, data_config, picture):
    """The network's input is timm's, and so are the answers."""
    image = picture(120, 90)
    expected = create_transform(**data_config)(image)
    assert np.abs(classifier.prepare(image) - expected.numpy()).max() < 1e-5
    with torch.inference_mode():
        scores = network(expected[None]).softmax(1)[0]
    assert np.abs(classifier.scores([image])[0] - scores.numpy()).max() < 1e-4


def assumption(caplog) -> str:
    """The one line that says what was assumed, without the model's name; "" if there is none."""
    lines = [record.getMessage() for record in caplog.records if record.name == "convmixer"]
    assert len(lines) < 2
    return lines[0].split(": assumed ")[1].split("; ")[0] if lines else ""


# Folders for the Hub


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_that_timm_saved(network, tmp_path, picture, caplog, safe):
    folder = tmp_path / "pets"
    seen = {"input_size": (3, 64, 64), **SEEN}
    config = {
        "label_names": ["n1", "n2", "n3"],
        "label_descriptions": dict(zip(["n1", "n2", "n3"], LABELS, strict=True)),
    }
    save_for_hf(network, folder, config, {"act_layer": "relu"}, safe_serialization=safe, data_config=seen)
    file = folder / ("model.safetensors" if safe else "pytorch_model.bin")
    for model in (folder, file):
        classifier = Classifier(model, engine="torch", device="cpu")
        assert classifier.name == (model.name.split(".")[0]) and classifier.labels == tuple(LABELS)
        assert classifier.preprocessing == Preprocessing(64, **{**SEEN, "interpolation": "bilinear"})
        assert_as_timm(classifier, network, resolve_data_config(seen), picture)
    assert assumption(caplog) == ""
    assert zoo.resolve(folder) == ("pets", folder)


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
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convmixer_1536_20"}))
    with pytest.raises(
        CheckpointError, match=r"it is 'convmixer_1536_20', ConvMixerConfig\(dim=1536.* are of .*dim=768"
    ):
        zoo.load(tmp_path)


def test_our_own_config_describes_tensors_that_were_saved_again(random_checkpoint, tmp_path):
    from train.publish import hub_config

    path = random_checkpoint(classes=3)
    ours = load_checkpoint(path)
    (tmp_path / "new").mkdir()
    safetensors.torch.save_file(safetensors.torch.load_file(path), tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text(json.dumps(hub_config(ours)))
    again = load_checkpoint(tmp_path / "new" / "model.safetensors")
    assert (again.config, again.labels, again.preprocessing) == (ours.config, ours.labels, ours.preprocessing)
    assert again.assumed == ()


def test_what_our_file_says_comes_before_the_config_beside_it(random_checkpoint, tmp_path):
    path = random_checkpoint(classes=3)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convmixer_768_32", "num_classes": 9}))
    assert load_checkpoint(path).labels[0] == "label 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged config.json beside it: Expecting"),
        ("[" * 100_000, "damaged config.json"),
        ('{"architecture": {}}', "damaged config.json beside it: 'preprocessing'"),
        ('{"architecture": "x", "pretrained_cfg": []}', "damaged config.json"),
        ('{"architecture": "x", "num_classes": 7}', "num_classes is 7, and the tensors have 3"),
        ('{"architecture": "x", "model_args": {"act_layer": "silu"}}', "activation is 'silu'; it must be one of"),
        ('{"architecture": "x", "input_size": [3, 64, 32]}', r"input_size is \[3, 64, 32\]; it must be .* a square"),
        ('{"architecture": "x", "input_size": 64}', "wrongly described"),
        ('{"architecture": "x", "mean": 0.5}', "wrongly described"),
        ('{"architecture": "x", "std": [0]}', r"std is \(0, 0, 0\); it must be above 0"),
        ('{"architecture": "x", "label_names": ["a"]}', "there are 1 labels for 3 classes"),
        ('{"architecture": "x", "label_names": {"one": "a"}}', "wrongly described"),
        ('{"architecture": "x", "label_names": ["a", "b", "c"], "label_descriptions": 4}', "wrongly described"),
        ('{"architecture": "x", "crop_pct": "all"}', "crop_pct is 'all'"),
    ],
)
def test_a_config_that_is_wrong_is_one_line(network, tmp_path, text, message):
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/model.safetensors: ")


@pytest.mark.parametrize("text", ["{}", "[]", '{"model_type": "of something else"}'])
def test_a_config_of_something_else_is_none(network, tmp_path, text):
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    assert load_checkpoint(tmp_path / "model.safetensors").preprocessing == CIFAR10


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds none of model.safetensors, .*, last.pth.tar; name the file$"):
        zoo.load(tmp_path)


# Checkpoints of timm's train.py


@pytest.mark.parametrize("activation", ["relu", "nn.ReLU", nn.ReLU], ids=["timm's", "PyTorch's", "the class"])
def test_a_training_with_everything_given(network, tmp_path, picture, caplog, activation):
    """A picture size, an activation and a normalisation that the shapes of the tensors do not show."""
    given = {"img_size": 64, **SEEN, "model_kwargs": {"act_layer": activation}}
    arguments = train_arguments(**given)
    save_as_train_py(network, tmp_path, arguments)
    classifier = Classifier(tmp_path, engine="torch", device="cpu")
    assert classifier.config.activation == "relu"
    assert_as_timm(classifier, network, resolve_data_config(vars(arguments), model=network), picture)
    assert assumption(caplog) == "no names for the classes"


def test_what_a_training_left_open_is_as_in_timm_and_said(network, tmp_path, picture, caplog):
    arguments = train_arguments(model="convmixer_tiny_relu", input_size=[3, 64, 64], mean=[0.5], std=[0.25])
    path = save_as_train_py(network, tmp_path, arguments)
    classifier = Classifier(path, engine="torch", device="cpu")
    assert_as_timm(classifier, network, resolve_data_config(vars(arguments)), picture)
    assert assumption(caplog) == "ReLU, crop 0.875, bicubic, no names for the classes"


def test_a_config_beside_it_comes_before_the_command_line(network, tmp_path):
    path = save_as_train_py(network, tmp_path, train_arguments(img_size=64))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "convmixer_tiny", "input_size": [3, 48, 48]}))
    assert load_checkpoint(path).preprocessing.size == 48


def test_only_plain_values_of_the_command_line_are_taken(network, tmp_path):
    """Nothing in a stranger's Namespace becomes more than numbers and texts."""
    deep = [[[[0.5]]]]
    arguments = train_arguments(
        img_size=torch.ones(3), crop_pct=np.float64(0.5), mean=deep, std=argparse.Namespace(a=1)
    )
    torch.save({"arch": 3, "args": arguments, "state_dict": network.state_dict()}, tmp_path / "last.pth.tar")
    checkpoint = load_checkpoint(tmp_path / "last.pth.tar")
    assert checkpoint.preprocessing == Preprocessing(224, 0.875) and len(checkpoint.assumed) == 7
    torch.save({"args": {"img_size": 64}, "state_dict": network.state_dict()}, tmp_path / "last.pth.tar")
    assert load_checkpoint(tmp_path / "last.pth.tar").preprocessing == CIFAR10


# Other people's checkpoints, and guesses


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda tensors: {"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}, "epoch": 3},
        lambda tensors: {"state_dict": {f"net._orig_mod.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {"net": {f"module.{name}": tensor for name, tensor in tensors.items()}, "acc": 91.2},
        lambda tensors: {"model_state_dict": tensors, "optimizer_state_dict": {"state": {}}},
        lambda tensors: {f"timm_model.{name}": tensor for name, tensor in tensors.items()},
    ],
    ids=["Lightning", "Lightning, compiled", "net", "PyTorch's tutorial", "transformers"],
)
def test_wrappings(network, tmp_path, wrapped):
    torch.save(wrapped(network.state_dict()), tmp_path / "a.ckpt")
    tensors = load_checkpoint(tmp_path / "a.ckpt").state_dict
    assert all(np.array_equal(tensors[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("classes", "patch", "line"),
    [
        (3, 4, "GELU, 32 pixels, crop 1.0, bicubic, CIFAR-10's mean, CIFAR-10's std, no names for the classes"),
        (1000, 7, "GELU, 224 pixels, crop 0.96, bicubic, ImageNet's mean, ImageNet's std, ImageNet's labels"),
    ],
)
def test_what_nobody_says_is_assumed_and_said_in_one_line(tmp_path, caplog, classes, patch, line):
    network = timm.create_model("convmixer_tiny", num_classes=classes, patch_size=patch)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "mine.safetensors")
    assert zoo.load(tmp_path / "mine.safetensors").name == "mine"
    assert assumption(caplog) == line


# Labels


def test_labels_in_a_file(network, tmp_path, picture, capsys):
    safetensors.torch.save_file(network.state_dict(), tmp_path / "mine.safetensors")
    picture().save(tmp_path / "a.png")
    (tmp_path / "labels.txt").write_bytes("\ufeffcat\r\ndog\r\nété\r\n".encode())
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    for name in ("labels.txt", "labels.json"):
        assert read_labels(tmp_path / name) == tuple(LABELS)
        options = ["--model", tmp_path / "mine.safetensors", "--labels", tmp_path / name, "--json", "--engine", "numpy"]
        assert main(list(map(str, ["classify", tmp_path / "a.png", *options]))) == 0
        out, err = capsys.readouterr()
        assert {row["label"] for row in json.loads(out)["predictions"]} == set(LABELS)
        assert "no names" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds an empty label, or none"),
        (b"cat\n\ndog", "holds an empty label"),
        (b"[1, 2]", "holds an empty label, or none; it must be one text for each class"),
        (b'["cat"', "is no UTF-8 text with one label a line, and no JSON list"),
        (b"\xff\xfe", "is no UTF-8 text"),
    ],
)
def test_labels_that_are_none(tmp_path, content, message):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(LabelsError, match=message):
        read_labels(tmp_path / "labels")
    with pytest.raises(LabelsError, match="cannot be read: No such file"):
        read_labels(tmp_path / "missing")


def test_labels_come_before_the_models_own_and_must_be_as_many(random_checkpoint):
    path = random_checkpoint(classes=3)
    assert Classifier(path, engine="numpy", labels=LABELS).labels == tuple(LABELS)
    with pytest.raises(CheckpointError, match="there are 2 labels for 3 classes"):
        Classifier(path, engine="numpy", labels=LABELS[:2])
    assert len(imagenet_labels()) == 1000
