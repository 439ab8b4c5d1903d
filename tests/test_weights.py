"""Checkpoints: what was saved is loaded, other people's files too, and one line for whatever is none."""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from safetensors.torch import save_file
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import nn

from convmixer import model
from convmixer.config import ConvMixerConfig
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


def timms(seed=0):
    return networks.network(seed, **CONFIG.to_dict())


def authors(seed=0):
    """As the paper's appendix writes it: one nn.Sequential, whose parameters have numbers for names."""
    network = timms(seed)
    layers = *network.stem, *network.blocks, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), network.head
    return nn.Sequential(*layers).eval()


def checkpoint_of(network, **changes):
    training = {"recipe": "cifar10", "nested": {"values": [1, None, 0.5]}}
    mine = Checkpoint("mine", CONFIG, network.state_dict(), LABELS, CIFAR10, training, {"top1": 91.2})
    return replace(mine, **changes)


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


@pytest.fixture
def ours(tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", checkpoint_of(timms()))
    return tmp_path / "model.safetensors"


def test_what_is_saved_is_loaded_and_timm_reads_it(tmp_path):
    network, path = timms(), tmp_path / "model.safetensors"
    odd = network.state_dict()  # as training may leave it
    odd["stem.0.weight"] = odd["stem.0.weight"].to(memory_format=torch.channels_last)
    odd["head.weight"] = nn.Parameter(odd["head.weight"].double())
    saved = checkpoint_of(network, state_dict=odd)
    save_checkpoint(path, saved)
    loaded, described = load_checkpoint(path), read_description(path)
    for field in ("name", "config", "labels", "preprocessing", "training", "accuracy"):
        assert getattr(loaded, field) == getattr(described, field) == getattr(saved, field)
    assert_same_logits(loaded, network)
    theirs = TimmConvMixer(8, 3, kernel_size=5, patch_size=2, num_classes=4)
    timm.models.load_checkpoint(theirs, str(path))
    assert_same_logits(loaded, theirs.eval())


def test_loaded_tensors_are_mapped_and_survive_that_their_file_is_replaced(ours):
    checkpoint = load_checkpoint(ours)
    assert str(ours) in Path("/proc/self/maps").read_text()
    before = checkpoint.state_dict["head.weight"].copy()
    twice = {name: tensor * 2 for name, tensor in checkpoint.state_dict.items()}
    save_checkpoint(ours, replace(checkpoint, state_dict=twice))
    assert np.array_equal(checkpoint.state_dict["head.weight"], before)
    assert np.array_equal(load_checkpoint(ours).state_dict["head.weight"], before * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict": {}}, "'stem.0.weight' is missing"),
        ({"training": {"when": object()}}, "not JSON serializable"),
        ({"labels": ("a", "b", "c", 4)}, "the labels must be a tuple of texts"),
        ({"training": None}, "must be dictionaries"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path / "model.safetensors", checkpoint_of(timms(), **changes))
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "plain").touch()

    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    with pytest.raises(ValueError, match="half"):
        write_atomically(tmp_path / "link", lambda file: file.write(b"half") and int("half"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize(
    ("build", "prefix", "save", "wrap"),
    [
        (timms, "", save_file, dict),
        (timms, "_orig_mod.module.", save_bare_pickle, dict),
        (authors, "module.", torch.save, dict),
        (timms, "net._orig_mod.", torch.save, lambda tensors: {"state_dict": tensors, "epoch": 3}),  # Lightning
        (timms, "timm_model.", torch.save, lambda tensors: {"net": tensors}),  # transformers
        (lambda: timms().bfloat16(), "", save_file, lambda tensors: {k: v for k, v in tensors.items() if v.ndim}),
    ],
)
def test_state_dicts_under_every_name(tmp_path, build, prefix, save, wrap):
    network, path = build(), tmp_path / "my.model.pth.tar"
    save(wrap({prefix + name: tensor for name, tensor in network.state_dict().items()}), path)
    loaded = load_checkpoint(path)
    assert_same_logits(loaded, network.float())
    assert (loaded.name, loaded.config, loaded.labels[3]) == ("my.model", CONFIG, "class 3")


def test_training_checkpoint_as_the_authors_script_writes_it(tmp_path):
    network, average = authors(), authors(seed=1)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.interp(0.3, [0, 1], [0, 0.01])  # a NumPy number, as in their schedule
    content = {"epoch": 149, "optimizer": optimizer.state_dict(), "metric": np.float64(81.37)}
    content["args"] = argparse.Namespace(scale=[0.08, 1.0], nested=argparse.Namespace(a=np.float32(1)))
    content |= {"state_dict": network.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save(content, tmp_path / "last.pth.tar")
    assert_same_logits(load_checkpoint(tmp_path / "last.pth.tar"), average)


@pytest.mark.parametrize(("save", "function"), [(torch.save, os.system), (save_bare_pickle, exec)])
def test_code_in_a_pickle_is_not_run(tmp_path, save, function):
    trace = tmp_path / "trace"
    order = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w')"
    runs_code = type("RunsCode", (), {"__reduce__": lambda self: (function, (order,))})
    save({"state_dict": timms().state_dict(), "args": runs_code()}, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", rf"refused, it could run code \('\S*{function.__name__}'\); save a state_dict")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "there is no such file"),
        (os.mkdir, "holds none of model.safetensors, "),
        (os.mkfifo, "is not a file"),
        (Path.touch, "is empty"),
        (lambda path: path.write_bytes(b"text\n" * 9), "is not a checkpoint"),
        (lambda path: path.write_bytes(bytes(5) + b"\1\0\0{" + bytes(100)), "is truncated, damaged or no"),  # 1 TB
        (lambda path: save_file({"conv1.weight": torch.ones(1)}, path), "there is no 'stem.0.weight', but 'conv1.wei"),
        (lambda path: save_file({"a": torch.ones(1).to(torch.float8_e5m2)}, path), "numbers of type 'F8_E5M2'; save"),
        (lambda path: torch.save(torch.ones(3), path), "holds no state_dict; it must be a dictionary of tensors"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, write, message):
    write(tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", message)


@pytest.mark.parametrize("save", [torch.save, save_bare_pickle, save_file])
def test_truncated_files(tmp_path, save):
    save(timms().state_dict(), tmp_path / "model")
    content = (tmp_path / "model").read_bytes()
    for size in (1, 9, 500, len(content) // 2, len(content) - 1):
        (tmp_path / "model").write_bytes(content[:size])
        assert_refused(tmp_path / "model", "is truncated|is not a checkpoint")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("blocks.1.1.weight", None, r"'blocks.1.1.weight' is missing"),
        ("extra", torch.ones(1), "'extra' is left over"),
        ("blocks.2.1.bias", torch.ones(9), r"'blocks.2.1.bias' has shape \(9,\), not \(8,\)"),
        ("blocks.0.0.fn.0.weight", torch.ones(8, 1, 4, 4), "kernel_size is 4; it must be odd"),
        ("head.bias", torch.tensor([1e300, 0, 0, 0], dtype=torch.float64), "'head.bias' holds NaN or infinite"),
        ("head.bias", torch.ones(4, device="meta"), "'head.bias' is not a plain array"),
        ("head.bias", torch.ones(4, dtype=torch.complex64), "'head.bias' holds complex numbers"),
        ("head.bias", [1.0, 2.0, 3.0, 4.0], "'head.bias' is of type list, not a tensor"),
        ("head.weight", torch.ones(1).expand(10**6, 8), "claims more values than the file has room for"),
    ],
)
def test_tensors_that_are_not_a_convmixers(tmp_path, name, tensor, message):
    tensors = {key: value for key, value in timms().state_dict().items() if key != name}
    torch.save(tensors if tensor is None else {name: tensor} | tensors, tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[" * 100_000, "damaged metadata: maximum recursion"),
        ("{}", "damaged metadata: 'format_version' is missing"),
        ({"format_version": 2}, "has format version 2; this release reads version 1"),
        ({"architecture": {"dim": 8, "depth": 3, "width": 8}}, "damaged metadata: .*'width'"),
        ({"architecture": CONFIG.to_dict() | {"depth": 10**18}}, "'blocks.3.0.fn.0.weight' is missing"),
    ],
)
def test_metadata_that_does_not_fit(ours, change, message):
    tensors = safetensors.torch.load_file(ours)
    with safetensors.safe_open(ours, "pt") as file:
        (text,) = file.metadata().values()
    text = change if isinstance(change, str) else json.dumps(json.loads(text) | change)
    save_file(tensors, ours, metadata={"convmixer": text})
    assert_refused(ours, message)
