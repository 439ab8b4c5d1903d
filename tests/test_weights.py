import argparse
import json
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer import model
from convmixer.config import ConvMixerConfig, count_parameters
from convmixer.labels import imagenet_labels
from convmixer.preprocessing import CIFAR10
from convmixer.readers import infer_config
from convmixer.weights import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_description,
    save_checkpoint,
    write_atomically,
)

CONFIG = ConvMixerConfig(dim=8, depth=3, kernel_size=5, patch_size=2, num_classes=4)
LABELS = ("cat", "dog", "été", "猫")


def authors_network(config, activation=nn.GELU):
    """The network as the paper's appendix writes it: one nn.Sequential, whose parameters have numbers for names."""

    class Residual(nn.Module):
        def __init__(self, fn):
            super().__init__()
            self.fn = fn

        def forward(self, x):
            return self.fn(x) + x

    def block():
        depthwise = nn.Conv2d(config.dim, config.dim, config.kernel_size, groups=config.dim, padding="same")
        spatial = nn.Sequential(depthwise, activation(), nn.BatchNorm2d(config.dim))
        pointwise = nn.Conv2d(config.dim, config.dim, kernel_size=1)
        return nn.Sequential(Residual(spatial), pointwise, activation(), nn.BatchNorm2d(config.dim))

    stem = nn.Conv2d(config.in_chans, config.dim, kernel_size=config.patch_size, stride=config.patch_size)
    return nn.Sequential(
        *[stem, activation(), nn.BatchNorm2d(config.dim)],
        *[block() for _ in range(config.depth)],
        *[nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(config.dim, config.num_classes)],
    )


def timm_network(config, activation=nn.GELU):
    fields = {key: value for key, value in config.to_dict().items() if key != "activation"}
    return TimmConvMixer(**fields, act_layer=activation)


def trained(network, seed=0):
    """``network`` with batch statistics of its own, so that norms that were mixed up show in the logits."""
    torch.manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                values.copy_(torch.rand(values.shape) + 0.5)
            layer.num_batches_tracked += 3
    return network.eval()


def assert_same_logits(checkpoint, network):
    pictures = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    loaded = model.build(checkpoint.config, checkpoint.state_dict).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(pictures), network(pictures))


def checkpoint_of(network, **changes):
    fields = {
        "name": "convmixer_8_3",
        "config": CONFIG,
        "state_dict": network.state_dict(),
        "labels": LABELS,
        "preprocessing": CIFAR10,
        "training": {"recipe": "cifar10", "seed": 3, "nested": {"values": [1, None, 0.5]}},
        "accuracy": {"top1": 91.2, "data": "CIFAR-10 test", "images": 10_000},
    }
    return Checkpoint(**fields | changes)


def assert_refused(path, message):
    """One line that names the file and holds ``message``, a regular expression."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 700
    assert re.search(message, text), text


@pytest.fixture(scope="module")
def network():
    return trained(timm_network(CONFIG))


@pytest.fixture
def ours(network, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, checkpoint_of(network))
    return path


def rewrite(path, change):
    """Have ``change`` edit the decoded metadata of our file, or be its new text, and write the file back."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["convmixer"])
    if callable(change):
        change(metadata)
    text = json.dumps(metadata) if callable(change) else change
    safetensors.torch.save_file(tensors, path, metadata={"convmixer": text})


# Our own files


def test_what_is_saved_is_loaded(ours, network):
    loaded, saved = load_checkpoint(ours), checkpoint_of(network)
    for field in ("name", "config", "labels", "preprocessing", "training", "accuracy"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.state_dict.keys() == saved.state_dict.keys()
    assert all(np.array_equal(loaded.state_dict[name], tensor) for name, tensor in saved.state_dict.items())
    assert_same_logits(loaded, network)


def test_file_has_one_metadata_entry_of_the_documented_form(ours):
    with safetensors.safe_open(ours, "pt") as file:
        assert file.metadata().keys() == {"convmixer"}
        metadata = json.loads(file.metadata()["convmixer"])
    assert metadata["format_version"] == 1
    assert metadata["architecture"] == CONFIG.to_dict()
    assert metadata["labels"] == list(LABELS)
    assert metadata["preprocessing"]["size"] == 32
    assert metadata.keys() == {
        *("format_version", "name", "architecture", "labels", "preprocessing", "training", "accuracy")
    }


def test_timm_reads_our_file(ours, network):
    again = timm_network(CONFIG)
    timm.models.load_checkpoint(again, str(ours))
    assert_same_logits(load_checkpoint(ours), again.eval())


def test_description_is_read_without_the_tensors(ours):
    content = ours.read_bytes()
    description = read_description(ours)
    assert description.name == "convmixer_8_3" and description.labels == LABELS and description.state_dict == {}
    ours.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"^{ours}: cannot be read as safetensors"):
        read_description(ours)


def test_loaded_tensors_are_mapped_from_the_file(ours):
    checkpoint = load_checkpoint(ours)
    assert str(ours) in Path("/proc/self/maps").read_text()
    replacement = {name: tensor * 2 for name, tensor in checkpoint.state_dict.items()}
    before = checkpoint.state_dict["head.weight"].copy()
    save_checkpoint(ours, replace(checkpoint, state_dict=replacement))  # over the file that it came from
    assert np.array_equal(checkpoint.state_dict["head.weight"], before)
    assert np.array_equal(load_checkpoint(ours).state_dict["head.weight"], before * 2)


def test_tensors_of_any_layout_and_real_type_are_saved_as_float32(network, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors["stem.0.weight"] = tensors["stem.0.weight"].to(memory_format=torch.channels_last)
    tensors["head.weight"] = nn.Parameter(tensors["head.weight"].double())
    tensors["head.bias"] = tensors["stem.2.bias"][:4]  # a view of another tensor
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, checkpoint_of(network, state_dict=tensors))
    loaded = load_checkpoint(path).state_dict
    assert all(np.array_equal(loaded[name], tensor.detach().float()) for name, tensor in tensors.items())
    assert loaded["head.weight"].dtype == np.float32 and loaded["stem.2.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_dict": {}}, "'stem.0.weight' is missing"),
        ({"config": replace(CONFIG, kernel_size=3)}, r"has shape \(8, 1, 5, 5\), not \(8, 1, 3, 3\)"),
        ({"training": {"when": object()}}, "not JSON serializable"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(network, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "model.safetensors", checkpoint_of(network, **change))
    with pytest.raises(CheckpointError, match=r"'head.bias' holds NaN"):
        diverged = network.state_dict() | {"head.bias": torch.tensor([0.0, float("nan"), 0.0, 0.0])}
        save_checkpoint(tmp_path / "model.safetensors", checkpoint_of(network, state_dict=diverged))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:3]}, "there are 3 labels for 4 classes"),
        ({"labels": ("a", "b", "c", 4)}, "labels must be"),
        ({"name": ""}, "name is ''"),
        ({"accuracy": None}, "must be dictionaries"),
    ],
)
def test_fields_that_do_not_belong_together(network, change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint_of(network, **change)


# Writing


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_written_file_has_the_usual_permissions_and_links_stay(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Other people's files


def save_zipped(content, path):
    torch.save(content, path)


def save_bare_pickle(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_zipped, save_bare_pickle, safetensors.torch.save_file])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("style", [timm_network, authors_network])
def test_state_dicts_in_both_key_styles(tmp_path, style, prefix, save):
    network = trained(style(CONFIG))
    path = tmp_path / "my.model.pth.tar"
    save({prefix + name: tensor for name, tensor in network.state_dict().items()}, path)
    loaded = load_checkpoint(path)
    assert_same_logits(loaded, network)
    assert loaded.config == CONFIG
    assert loaded.name == "my.model"
    assert loaded.labels == ("class 0", "class 1", "class 2", "class 3")
    assert (loaded.preprocessing, loaded.training, loaded.accuracy) == (CIFAR10, {}, {})


@pytest.mark.parametrize("save", [save_zipped, save_bare_pickle])
@pytest.mark.parametrize("averaged", [False, True])
def test_training_checkpoint_as_the_authors_script_writes_it(tmp_path, averaged, save):
    network, average = trained(authors_network(CONFIG)), trained(authors_network(CONFIG), seed=1)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.interp(0.3, [0, 1], [0, 0.01])  # a NumPy number, as in their schedule
    content = {
        "epoch": 149,
        "arch": "convmixer_8_3",
        "state_dict": {"module." + name: tensor for name, tensor in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(
            model="convmixer_8_3", scale=[0.08, 1.0], nested=argparse.Namespace(a=np.float32(1))
        ),
        "amp_scaler": {"scale": 65536.0},
        "metric": np.float64(81.37),
    }
    if averaged:
        content["state_dict_ema"] = OrderedDict(average.state_dict())
    save(content, tmp_path / "last.pth.tar")
    assert_same_logits(load_checkpoint(tmp_path / "last.pth.tar"), average if averaged else network)


def test_half_precision_becomes_float32_and_missing_counters_zero(tmp_path, network):
    tensors = {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        safetensors.torch.save_file({k: v.to(dtype) for k, v in tensors.items()}, tmp_path / "half.safetensors")
        loaded = load_checkpoint(tmp_path / "half.safetensors").state_dict
        assert all(np.array_equal(loaded[name], tensor.to(dtype).float()) for name, tensor in tensors.items())
        assert loaded["blocks.2.3.num_batches_tracked"] == 0
        model.build(CONFIG, loaded)


@pytest.mark.parametrize("classes", [1000, 10])
@pytest.mark.parametrize("name", ["convmixer_1536_20", "convmixer_1024_20_ks9_p14", "convmixer_768_32"])
def test_published_architectures_are_inferred(name, classes):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=classes)
    config = infer_config(network.state_dict())
    assert config.activation == ("relu" if name == "convmixer_768_32" else "gelu")
    assert count_parameters(config) == sum(p.numel() for p in network.parameters())
    assert (config.num_classes, config.in_chans) == (classes, 3)


def test_assumed_description_is_used_for_bare_tensors_only(tmp_path, ours, network):
    assumed = checkpoint_of(network, name="other", config=replace(CONFIG, activation="relu"), state_dict={})
    save_zipped(network.state_dict(), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", assume=assumed)
    assert (loaded.name, loaded.config, loaded.labels) == ("other", assumed.config, LABELS)
    with pytest.raises(CheckpointError, match=r"activation='gelu'.*, not .*activation='relu'"):
        load_checkpoint(ours, assume=assumed)
    assert load_checkpoint(ours, assume=replace(assumed, config=CONFIG)).name == "convmixer_8_3"
    wider = replace(assumed, config=replace(CONFIG, dim=16))
    with pytest.raises(CheckpointError, match=r"'stem.0.weight' has shape \(8, 3, 2, 2\), not \(16, 3, 2, 2\)"):
        load_checkpoint(tmp_path / "a.pth", assume=wider)


# Files that are refused


class RunsCode:
    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


@pytest.mark.parametrize("save", [save_zipped, save_bare_pickle])
@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir], ids=lambda function: function.__name__)
def test_code_in_a_pickle_is_not_run(tmp_path, network, save, function):
    trace = tmp_path / "trace"
    order = {os.system: f"touch {trace}", os.mkdir: str(trace)}.get(function, f"open({str(trace)!r}, 'w')")
    save({"state_dict": network.state_dict(), "args": RunsCode(function, order)}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", rf"refused, it could run code \('\S*{function.__name__}'\); save a state_dict")
    assert not trace.exists()


def test_no_such_file_or_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "none.pth", "there is no such file")
    assert_refused(tmp_path, "holds none of model.safetensors, ")
    assert_refused(tmp_path / "pipe", "is not a file")
    assert_refused(tmp_path / ("n" * 300), "File name too long")


def test_things_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for content in (b"text\n" * 9, b"{}", b'{"a": [1]}' * 9, bytes(100), (tmp_path / "picture.png").read_bytes()):
        path.write_bytes(content)
        assert_refused(path, "is not a checkpoint")
    path.write_bytes(b"")
    assert_refused(path, "is empty")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/text", "text")
    assert_refused(path, "is truncated, damaged or no checkpoint")
    path.write_bytes(pickle.dumps({"state_dict": {}}))
    assert_refused(path, "is truncated, damaged or no checkpoint")


@pytest.mark.parametrize("save", [save_zipped, save_bare_pickle, safetensors.torch.save_file])
def test_truncated_files(tmp_path, network, save):
    path = tmp_path / "model"
    save(network.state_dict(), path)
    content = path.read_bytes()
    for size in (1, 8, 9, 20, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert_refused(path, "is truncated|is not a checkpoint")


def test_safetensors_header_with_a_hostile_size(tmp_path):
    for length in (2**63, 2**40, 10**9):
        (tmp_path / "a").write_bytes(struct.pack("<Q", length) + b"{" + bytes(100))
        assert_refused(tmp_path / "a", "is truncated, damaged or no checkpoint")


def test_other_networks(tmp_path):
    safetensors.torch.save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "resnet")
    assert_refused(tmp_path / "resnet", "holds no ConvMixer: there is no 'stem.0.weight', but ")
    for content in ({}, [], 3, {"state_dict": {}}, {"epoch": 3}, {3: torch.ones(1)}, torch.ones(3)):
        save_zipped(content, tmp_path / "a.pth")
        assert_refused(tmp_path / "a.pth", "holds no state_dict")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.1.1.weight", None, r"'blocks.1.1.weight' is missing"),
        ("head.weight", None, "there is no 'head.weight'"),
        ("extra", torch.ones(1), "'extra' is left over"),
        ("blocks.2.1.bias", torch.ones(9), r"'blocks.2.1.bias' has shape \(9,\), not \(8,\)"),
        ("stem.0.weight", torch.ones(8, 3, 2, 3), r"'stem.0.weight' has shape \(8, 3, 2, 3\), not \(8, 3, 2, 2\)"),
        ("stem.0.weight", torch.ones(8), "holds no ConvMixer: not enough values"),
        ("stem.0.weight", torch.ones(0, 3, 2, 2), "dim is 0"),
        ("head.weight", torch.ones(10**15, 0), r"'head.weight' has shape \(1000000000000000, 0\)"),
        ("blocks.0.0.fn.0.weight", torch.ones(8, 1, 4, 4), "kernel_size is 4; it must be odd"),
        ("head.bias", torch.tensor([0, 0, float("nan"), 0]), "'head.bias' holds NaN"),
        ("stem.2.running_var", torch.tensor([float("inf")] + [1.0] * 7), "'stem.2.running_var' holds NaN or infinite"),
        ("head.bias", torch.tensor([1e300, 0, 0, 0], dtype=torch.float64), "'head.bias' holds NaN or infinite"),
        ("head.bias", torch.ones(4).to_sparse(), "'head.bias' is not a plain array"),
        ("head.bias", torch.ones(4, device="meta"), "'head.bias' is not a plain array"),
        ("head.bias", torch.ones(4, dtype=torch.complex64), "'head.bias' holds complex numbers"),
        ("head.bias", [1.0, 2.0, 3.0, 4.0], "'head.bias' is of type list, not a tensor"),
        ("head.weight", torch.ones(1).expand(10**6, 8), "claims more values than the file has room for"),
        (
            "stem.0.weight",
            torch.ones(1).expand(10**9, 3, 10**3, 10**3),
            "claims more values than the file has room for",
        ),
    ],
)
def test_tensors_that_are_not_a_convmixers(tmp_path, network, name, tensor, message):
    tensors = {key: value for key, value in network.state_dict().items() if key != name}
    if tensor is not None:
        tensors = {name: tensor} | tensors
    save_zipped(tensors, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", message)


def test_large_finite_weights_are_not_taken_for_infinite(tmp_path, network):
    """Their sum overflows; they do not."""
    tensors = network.state_dict() | {"head.bias": torch.full((4,), 3e38)}
    save_zipped(tensors, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").state_dict["head.bias"].tolist() == [np.float32(3e38)] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{not json", "damaged metadata: Expecting property name"),
        ("[" * 100_000, "damaged metadata: maximum recursion"),
        ("[1]", "damaged metadata"),
        (
            lambda metadata: metadata.update(format_version=2),
            "has format version 2; this release reads version 1",
        ),
        (lambda metadata: metadata.pop("format_version"), "damaged metadata: 'format_version' is missing"),
        (lambda metadata: metadata.pop("labels"), "damaged metadata: 'labels' is missing"),
        (lambda metadata: metadata["labels"].pop(), "there are 3 labels for 4 classes"),
        (lambda metadata: metadata.update(labels=4), "damaged metadata"),
        (lambda metadata: metadata.update(architecture=[]), "damaged metadata"),
        (lambda metadata: metadata["architecture"].update(dim=True), "dim is True"),
        (lambda metadata: metadata["architecture"].update(activation=["gelu"]), "damaged metadata"),
        (lambda metadata: metadata["architecture"].update(width=8), "damaged metadata: .*'width'"),
        (
            lambda metadata: metadata["architecture"].update(dim=16),
            r"'stem.0.weight' has shape \(8, 3, 2, 2\)",
        ),
        (
            lambda metadata: metadata["architecture"].update(depth=10**18),
            "'blocks.3.0.fn.0.weight' is missing",
        ),
        (lambda metadata: metadata["architecture"].update(dim=10**18), "has shape"),
        (lambda metadata: metadata["architecture"].update(depth=2), "'blocks.2.0.fn.0.bias' is left over"),
        (lambda metadata: metadata["preprocessing"].update(size=-1), "size is -1"),
        (lambda metadata: metadata.update(training="yes"), "must be dictionaries"),
        (lambda metadata: metadata.update(name=3), "name is 3"),
    ],
)
def test_metadata_that_does_not_fit(ours, change, message):
    rewrite(ours, change)
    assert_refused(ours, message)


# Labels


def test_imagenet_labels_are_timms_short_names_and_all_differ():
    labels, info = imagenet_labels(), ImageNetInfo()
    assert len({label.lower() for label in labels}) == len(labels) == 1000
    told_apart = {134: "crane (bird)", 517: "crane (machine)", 639: "maillot (tank suit)"}
    told_apart |= {263: "Pembroke Welsh corgi", 264: "Cardigan Welsh corgi"}  # beside 474, the cardigan one wears
    for index, label in enumerate(labels):
        assert label == told_apart.get(index, info.index_to_description(index).split(",")[0].strip())
    assert (labels[207], labels[285], labels[999]) == ("golden retriever", "Egyptian cat", "toilet tissue")
