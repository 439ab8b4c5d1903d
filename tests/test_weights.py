"""Checkpoints: what was saved is loaded, other people's files too, and one line for whatever is none."""

import argparse
import json
import os
import pickle
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer import model
from convmixer.config import ConvMixerConfig
from convmixer.labels import imagenet_labels
from convmixer.preprocessing import CIFAR10
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


def timm_network(seed=0):
    """With batch statistics of its own, so that norms that were mixed up show in the logits."""
    torch.manual_seed(seed)
    network = TimmConvMixer(8, 3, kernel_size=5, patch_size=2, num_classes=4)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                values.copy_(torch.rand(values.shape) + 0.5)
            layer.num_batches_tracked += 3
    return network.eval()


def authors_network(seed=0):
    """As the paper's appendix writes it: one nn.Sequential, whose parameters have numbers for names."""
    network = timm_network(seed)
    return nn.Sequential(*network.stem, *network.blocks, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), network.head)


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


def save_bare_pickle(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def assert_same_logits(checkpoint, network):
    pictures = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    loaded = model.build(checkpoint.config, checkpoint.state_dict).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(pictures), network(pictures))


def assert_refused(path, message):
    """One line that names the file and holds ``message``, a regular expression."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and len(text) < 700
    assert re.search(message, text), text


@pytest.fixture(scope="module")
def network():
    return timm_network()


@pytest.fixture
def ours(network, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, checkpoint_of(network))
    return path


# Our own files


def test_what_is_saved_is_loaded_and_timm_reads_it(ours, network):
    loaded, saved = load_checkpoint(ours), checkpoint_of(network)
    for field in ("name", "config", "labels", "preprocessing", "training", "accuracy"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert_same_logits(loaded, network)
    again = timm_network(seed=1)
    timm.models.load_checkpoint(again, str(ours))
    assert_same_logits(loaded, again)


def test_the_file_says_what_it_is_without_its_tensors(ours):
    with safetensors.safe_open(ours, "pt") as file:
        metadata = json.loads(file.metadata()["convmixer"])
    assert (metadata["format_version"], metadata["architecture"]) == (1, CONFIG.to_dict())
    assert (metadata["labels"], metadata["preprocessing"]["size"]) == (list(LABELS), 32)
    assert read_description(ours).labels == LABELS and read_description(ours).state_dict == {}
    ours.write_bytes(ours.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"^{ours}: cannot be read as safetensors"):
        read_description(ours)


def test_loaded_tensors_are_mapped_and_survive_that_their_file_is_replaced(ours):
    checkpoint = load_checkpoint(ours)
    assert str(ours) in Path("/proc/self/maps").read_text()
    before = checkpoint.state_dict["head.weight"].copy()
    twice = {name: tensor * 2 for name, tensor in checkpoint.state_dict.items()}
    save_checkpoint(ours, replace(checkpoint, state_dict=twice))
    assert np.array_equal(checkpoint.state_dict["head.weight"], before)
    assert np.array_equal(load_checkpoint(ours).state_dict["head.weight"], before * 2)


def test_tensors_of_any_layout_and_real_type_are_saved_as_float32(network, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors["stem.0.weight"] = tensors["stem.0.weight"].to(memory_format=torch.channels_last)
    tensors["head.weight"] = nn.Parameter(tensors["head.weight"].double())
    tensors["head.bias"] = tensors["stem.2.bias"][:4]  # a view of another tensor
    save_checkpoint(tmp_path / "a", checkpoint_of(network, state_dict=tensors))
    loaded = load_checkpoint(tmp_path / "a").state_dict
    assert all(np.array_equal(loaded[name], tensor.detach().float()) for name, tensor in tensors.items())
    assert loaded["head.weight"].dtype == np.float32 and loaded["stem.2.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict": {}}, "'stem.0.weight' is missing"),
        ({"config": replace(CONFIG, kernel_size=3)}, r"has shape \(8, 1, 5, 5\), not \(8, 1, 3, 3\)"),
        ({"training": {"when": object()}}, "not JSON serializable"),
        ({"labels": LABELS[:3]}, "there are 3 labels for 4 classes"),
        ({"labels": ("a", "b", "c", 4)}, "labels must be"),
        ({"name": ""}, "name is ''"),
        ({"accuracy": None}, "must be dictionaries"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(network, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "model.safetensors", checkpoint_of(network, **changes))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "plain").touch()

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "link", fail)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(os.listdir(tmp_path)) == 3


# Other people's files


@pytest.mark.parametrize(
    ("build", "prefix", "save", "wrap"),
    [
        (timm_network, "", safetensors.torch.save_file, dict),
        (timm_network, "_orig_mod.module.", save_bare_pickle, dict),
        (authors_network, "", torch.save, dict),
        (authors_network, "module.", save_bare_pickle, dict),
        (timm_network, "net._orig_mod.", torch.save, lambda tensors: {"state_dict": tensors, "epoch": 3}),  # Lightning
        (timm_network, "module.", torch.save, lambda tensors: {"net": tensors, "acc": 91.2}),
        (timm_network, "", torch.save, lambda tensors: {"model_state_dict": tensors, "optimizer_state_dict": {}}),
        (timm_network, "timm_model.", torch.save, dict),  # transformers
    ],
)
def test_state_dicts_under_every_name(tmp_path, build, prefix, save, wrap):
    network, path = build(), tmp_path / "my.model.pth.tar"
    save(wrap({prefix + name: tensor for name, tensor in network.state_dict().items()}), path)
    loaded = load_checkpoint(path)
    assert_same_logits(loaded, network)
    assert (loaded.name, loaded.config, loaded.labels[3]) == ("my.model", CONFIG, "class 3")
    assert (loaded.preprocessing, loaded.training, loaded.accuracy) == (CIFAR10, {}, {})


@pytest.mark.parametrize("averaged", [False, True])
def test_training_checkpoint_as_the_authors_script_writes_it(tmp_path, averaged):
    network, average = authors_network(), authors_network(seed=1)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.interp(0.3, [0, 1], [0, 0.01])  # a NumPy number, as in their schedule
    nested = argparse.Namespace(a=np.float32(1))
    content = {
        "epoch": 149,
        "state_dict": {"module." + name: tensor for name, tensor in network.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(model="convmixer_8_3", scale=[0.08, 1.0], nested=nested),
        "metric": np.float64(81.37),
    }
    if averaged:
        content["state_dict_ema"] = average.state_dict()
    torch.save(content, tmp_path / "last.pth.tar")
    assert_same_logits(load_checkpoint(tmp_path / "last.pth.tar"), average if averaged else network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_and_missing_counters_zero(tmp_path, network, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in network.state_dict().items() if "num_batches" not in name}
    safetensors.torch.save_file(tensors, tmp_path / "half.safetensors")
    loaded = load_checkpoint(tmp_path / "half.safetensors").state_dict
    assert all(np.array_equal(loaded[name], tensor.float()) for name, tensor in tensors.items())
    assert loaded["blocks.2.3.num_batches_tracked"] == 0


def test_assumed_description_is_used_for_bare_tensors_only(tmp_path, ours, network):
    assumed = checkpoint_of(network, name="other", config=replace(CONFIG, activation="relu"), state_dict={})
    torch.save(network.state_dict(), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth", assume=assumed)
    assert (loaded.name, loaded.config, loaded.labels) == ("other", assumed.config, LABELS)
    with pytest.raises(CheckpointError, match=r"activation='gelu'.*, not .*activation='relu'"):
        load_checkpoint(ours, assume=assumed)
    assert load_checkpoint(ours, assume=replace(assumed, config=CONFIG)).name == "convmixer_8_3"


# Files that are refused


class RunsCode:
    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


@pytest.mark.parametrize(("save", "function"), [(torch.save, os.system), (save_bare_pickle, exec)])
def test_code_in_a_pickle_is_not_run(tmp_path, network, save, function):
    trace = tmp_path / "trace"
    order = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w')"
    save({"state_dict": network.state_dict(), "args": RunsCode(function, order)}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", rf"refused, it could run code \('\S*{function.__name__}'\); save a state_dict")
    assert not trace.exists()


def test_no_such_file_or_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "none.pth", "there is no such file")
    assert_refused(tmp_path, "holds none of model.safetensors, ")
    assert_refused(tmp_path / "pipe", "is not a file")
    assert_refused(tmp_path / ("n" * 300), "File name too long")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\n" * 9, "is not a checkpoint"),
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(100), "is truncated, damaged or no checkpoint"),
        (pickle.dumps({"state_dict": {}}), "is truncated, damaged or no checkpoint"),
        (struct.pack("<Q", 2**40) + b"{" + bytes(100), "is truncated, damaged or no checkpoint"),
    ],
)
def test_things_that_are_no_checkpoint(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path / "model.safetensors", message)


@pytest.mark.parametrize("save", [torch.save, save_bare_pickle, safetensors.torch.save_file])
def test_truncated_files(tmp_path, network, save):
    save(network.state_dict(), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    for size in (1, 9, 500, len(content) // 2, len(content) - 1):
        (tmp_path / "model").write_bytes(content[:size])
        assert_refused(tmp_path / "model", "is truncated|is not a checkpoint")


def test_other_networks(tmp_path):
    safetensors.torch.save_file({"conv1.weight": torch.ones(1)}, tmp_path / "resnet")
    assert_refused(tmp_path / "resnet", "holds no ConvMixer: there is no 'stem.0.weight', but 'conv1.weight'")
    safetensors.torch.save_file({"weight": torch.ones(1).to(torch.float8_e4m3fn)}, tmp_path / "a")
    assert_refused(tmp_path / "a", "holds numbers of type 'F8_E4M3'; save them as float32")
    for content in ({}, 3, {"state_dict": {}}, {3: torch.ones(1)}, torch.ones(3)):
        torch.save(content, tmp_path / "a.pth")
        assert_refused(tmp_path / "a.pth", "holds no state_dict")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.1.1.weight", None, r"'blocks.1.1.weight' is missing"),
        ("extra", torch.ones(1), "'extra' is left over"),
        ("blocks.2.1.bias", torch.ones(9), r"'blocks.2.1.bias' has shape \(9,\), not \(8,\)"),
        ("stem.0.weight", torch.ones(8), "holds no ConvMixer: not enough values"),
        ("stem.0.weight", torch.ones(0, 3, 2, 2), "dim is 0"),
        ("head.weight", torch.ones(10**15, 0), r"'head.weight' has shape \(1000000000000000, 0\)"),
        ("blocks.0.0.fn.0.weight", torch.ones(8, 1, 4, 4), "kernel_size is 4; it must be odd"),
        ("head.bias", torch.tensor([0, 0, float("nan"), 0]), "'head.bias' holds NaN"),
        ("head.bias", torch.tensor([1e300, 0, 0, 0], dtype=torch.float64), "'head.bias' holds NaN or infinite"),
        ("head.bias", torch.ones(4, device="meta"), "'head.bias' is not a plain array"),
        ("head.bias", torch.ones(4, dtype=torch.complex64), "'head.bias' holds complex numbers"),
        ("head.bias", [1.0, 2.0, 3.0, 4.0], "'head.bias' is of type list, not a tensor"),
        ("head.weight", torch.ones(1).expand(10**6, 8), "claims more values than the file has room for"),
    ],
)
def test_tensors_that_are_not_a_convmixers(tmp_path, network, name, tensor, message):
    tensors = {key: value for key, value in network.state_dict().items() if key != name}
    torch.save(tensors if tensor is None else {name: tensor} | tensors, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", message)


def test_large_finite_weights_are_not_taken_for_infinite(tmp_path, network):
    """Their sum overflows; they do not."""
    torch.save(network.state_dict() | {"head.bias": torch.full((4,), 3e38)}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").state_dict["head.bias"].tolist() == [np.float32(3e38)] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{not json", "damaged metadata: Expecting property name"),
        ("{}", "damaged metadata: 'format_version' is missing"),
        ("[" * 100_000, "damaged metadata: maximum recursion"),
        ({"format_version": 2}, "has format version 2; this release reads version 1"),
        ({"labels": None}, "damaged metadata"),
        ({"labels": list(LABELS[1:])}, "there are 3 labels for 4 classes"),
        ({"architecture": {"dim": 8, "depth": 3, "width": 8}}, "damaged metadata: .*'width'"),
        ({"architecture": CONFIG.to_dict() | {"depth": 10**18}}, "'blocks.3.0.fn.0.weight' is missing"),
        ({"architecture": CONFIG.to_dict() | {"depth": 2}}, "'blocks.2.0.fn.0.bias' is left over"),
        ({"preprocessing": CIFAR10.to_dict() | {"size": -1}}, "size is -1"),
        ({"training": "yes"}, "must be dictionaries"),
    ],
)
def test_metadata_that_does_not_fit(ours, change, message):
    tensors = safetensors.torch.load_file(ours)
    with safetensors.safe_open(ours, "pt") as file:
        metadata = json.loads(file.metadata()["convmixer"])
    text = change if isinstance(change, str) else json.dumps(metadata | change)
    safetensors.torch.save_file(tensors, ours, metadata={"convmixer": text})
    assert_refused(ours, message)


def test_imagenet_labels_are_timms_short_names_and_all_differ():
    labels, info = imagenet_labels(), ImageNetInfo()
    assert len({label.lower() for label in labels}) == len(labels) == 1000
    told_apart = {134: "crane (bird)", 517: "crane (machine)", 639: "maillot (tank suit)"}
    told_apart |= {263: "Pembroke Welsh corgi", 264: "Cardigan Welsh corgi"}  # beside 474, the cardigan one wears
    for index, label in enumerate(labels):
        assert label == told_apart.get(index, info.index_to_description(index).split(",")[0].strip())
