import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import hub_server
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from file_server import Resource
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer import hub, model, zoo
from convmixer.config import ConvMixerConfig, count_parameters
from convmixer.labels import imagenet_labels
from convmixer.preprocessing import CIFAR10, IMAGENET
from convmixer.weights import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from convmixer.zoo import MODELS, DownloadError, ModelError

SMALL = ConvMixerConfig(dim=4, depth=2, kernel_size=3, patch_size=7, activation="relu")  # as 768/32, but small
REAL_MODELS = dict(MODELS)
PUBLISHED = ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def small_models(tmp_path, monkeypatch):
    """The published models and the shipped one, under their names, with a small architecture."""
    for name in PUBLISHED:
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], config=SMALL))
    shipped = tmp_path / "shipped.safetensors"
    entry = replace(MODELS["convmixer_256_8_cifar10"], shipped=shipped)
    monkeypatch.setitem(MODELS, entry.name, entry)
    save_own(shipped, "as trained", entry.config)


@pytest.fixture(autouse=True)
def server(tmp_path, monkeypatch):
    """The Hub and the authors' server."""
    with hub_server.HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path / "home")
        for name in PUBLISHED:
            monkeypatch.setitem(MODELS, name, replace(MODELS[name], release=server.url(f"/{name}.pth.tar")))
        yield server


def save_own(path, name, config):
    labels = tuple(f"label {i}" for i in range(config.num_classes))
    state_dict = model.ConvMixer(config).state_dict()
    accuracy = {"top1": 91.5, "data": "CIFAR-10 test", "images": 10_000}
    save_checkpoint(path, Checkpoint(name, config, state_dict, labels, CIFAR10, {"seed": 1}, accuracy))


def timm_state_dict(seed=0):
    torch.manual_seed(seed)
    return TimmConvMixer(4, 2, kernel_size=3, patch_size=7).state_dict()


def put_raw_timm_file(path, seed=0):
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(timm_state_dict(seed), path)


def serve(server, name, tmp_path):
    """Both sources of a published model, in the formats that the real ones have; gives the first one's weights."""
    put_raw_timm_file(tmp_path / "hub")
    torch.save(timm_state_dict(), tmp_path / "release")
    server.resources[f"/{name}.pth.tar"] = Resource((tmp_path / "release").read_bytes(), takes_if_range=False)
    return server.add(MODELS[name].repo, model=(tmp_path / "hub").read_bytes())["model"]


# The table


def test_published_models_are_timms():
    for name in PUBLISHED:
        entry = REAL_MODELS[name]
        with torch.device("meta"):
            network = timm.create_model(name)
        assert count_parameters(entry.config) == sum(p.numel() for p in network.parameters())
        assert isinstance(network.stem[1], model.ACTIVATIONS[entry.config.activation])
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        with torch.device("meta"):
            ours = model.ConvMixer(entry.config).state_dict()
        assert {key: tensor.shape for key, tensor in ours.items()} == shapes
        pretrained = timm.get_pretrained_cfg(name)
        assert entry.preprocessing == IMAGENET
        assert IMAGENET.size == pretrained.input_size[1] and IMAGENET.crop_pct == pretrained.crop_pct
        assert entry.repo == pretrained.hf_hub_id
        assert entry.release.startswith("https://github.com/tmp-iclr/convmixer/releases/download/v1.0/convmixer_")


def test_table_is_complete():
    assert list(REAL_MODELS) == [*PUBLISHED, "convmixer_256_8_cifar10"]
    assert all(entry.name == name for name, entry in REAL_MODELS.items())
    assert [REAL_MODELS[name].accuracy["top1"] for name in PUBLISHED] == [81.382, 80.158, 76.944]


def test_shipped_model_if_trained():
    entry = REAL_MODELS["convmixer_256_8_cifar10"]
    if not entry.shipped.exists():
        pytest.skip("the shipped model is not trained yet")
    checkpoint = load_checkpoint(entry.shipped)
    assert (checkpoint.name, checkpoint.config) == (entry.name, entry.config)
    assert checkpoint.preprocessing.size == 32
    assert checkpoint.accuracy["top1"] > 94 and checkpoint.accuracy["data"]
    assert "automobile" in checkpoint.labels


# By name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth.tar"])
def test_raw_file_in_the_cache_is_used(cache, suffix):
    """As downloaded from either source, put there by hand, or baked into a container."""
    path = cache / f"convmixer_768_32{suffix}"
    cache.mkdir()
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(timm_state_dict(), path)
    checkpoint = zoo.load("convmixer_768_32")
    assert zoo.resolve("convmixer_768_32") == ("convmixer_768_32", path)
    assert (checkpoint.name, checkpoint.config) == ("convmixer_768_32", SMALL)  # ReLU, which only the table knows
    assert checkpoint.labels == imagenet_labels() and checkpoint.preprocessing == IMAGENET
    assert checkpoint.accuracy["top1"] == 80.158
    assert np.array_equal(checkpoint.state_dict["head.weight"], timm_state_dict()["head.weight"])


def test_first_use_downloads_and_second_does_not(server, cache, tmp_path):
    weights = serve(server, "convmixer_768_32", tmp_path)
    assert zoo.local_path("convmixer_768_32") is None
    reports = []
    first = zoo.load("convmixer_768_32", progress=lambda *report: reports.append(report))
    fetched = [path for path, _ in server.requests if "/resolve/" in path]  # huggingface_hub has questions of its own
    assert fetched == ["/timm/convmixer_768_32.in1k/resolve/main/model.safetensors"]
    assert reports[-1] == (len(weights.body), len(weights.body))
    requests = len(server.requests), len(server.heads)
    second = zoo.load("convmixer_768_32")
    assert zoo.download("convmixer_768_32") == hub.cached("timm/convmixer_768_32.in1k", hub.WEIGHTS)
    assert (len(server.requests), len(server.heads)) == requests
    assert np.array_equal(first.state_dict["head.bias"], second.state_dict["head.bias"])
    assert not cache.exists()  # it is the second source's


@pytest.mark.parametrize("first_source", ["missing", "of another network", "cut"])
def test_second_source_has_its_own_format_and_name(server, cache, tmp_path, first_source):
    weights = serve(server, "convmixer_768_32", tmp_path)
    if first_source == "missing":
        server.resources = {path: it for path, it in server.resources.items() if it is not weights}
    elif first_source == "of another network":
        safetensors.torch.save_file({"weight": torch.ones(3)}, tmp_path / "other")
        weights.body = (tmp_path / "other").read_bytes()
    else:
        weights.takes_ranges, weights.cuts = False, [1000] * 20
    assert zoo.download("convmixer_768_32") == cache / "convmixer_768_32.pth.tar"
    assert zoo.load("convmixer_768_32").config == SMALL


def test_no_source_works(server, cache):
    with pytest.raises(DownloadError) as caught:
        zoo.load("convmixer_768_32")
    text = str(caught.value)
    assert text.startswith(
        "could not download convmixer_768_32: hf:timm/convmixer_768_32.in1k: there is none, or it is"
    )
    assert f"{MODELS['convmixer_768_32'].release}: HTTP 404 Not Found; or put model.safetensors of https://" in text
    assert text.endswith(f"at {cache}/convmixer_768_32.safetensors by hand") and "\n" not in text


def test_folders_that_cannot_be_written_are_told(server, tmp_path, monkeypatch):
    serve(server, "convmixer_768_32", tmp_path)
    for name in ("CONVMIXER_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "release" / name))  # inside what is a file
    with pytest.raises(DownloadError, match=r": cannot write to .*/release: Not a directory; .*/release: Not a"):
        zoo.download("convmixer_768_32")
    assert server.requests == []


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>", b"PK\x03\x04" + bytes(100)])
def test_damaged_file_in_the_cache(server, cache, tmp_path, content):
    serve(server, "convmixer_768_32", tmp_path)
    cache.mkdir()
    for suffix in (".safetensors", ".pth.tar"):
        (cache / f"convmixer_768_32{suffix}").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        zoo.load("convmixer_768_32")
    assert str(caught.value).startswith(f"{cache}/convmixer_768_32.safetensors: is ")
    assert str(caught.value).endswith("to download it again, run: python -m convmixer download convmixer_768_32")
    assert server.requests == []
    assert zoo.download("convmixer_768_32") == hub.cached("timm/convmixer_768_32.in1k", hub.WEIGHTS)
    assert zoo.load("convmixer_768_32").config == SMALL and os.listdir(cache) == []


def test_shipped_model_needs_no_network():
    checkpoint = zoo.load("convmixer_256_8_cifar10")
    assert checkpoint.name == "convmixer_256_8_cifar10"
    assert checkpoint.labels[3] == "label 3" and checkpoint.accuracy["top1"] == 91.5  # what its file says
    assert zoo.download("convmixer_256_8_cifar10") == MODELS["convmixer_256_8_cifar10"].shipped


def test_shipped_model_that_is_missing():
    MODELS["convmixer_256_8_cifar10"].shipped.unlink()
    for ask in (zoo.load, zoo.resolve, lambda: zoo.download("convmixer_256_8_cifar10")):
        with pytest.raises(ModelError, match="convmixer_256_8_cifar10 is missing from this installation"):
            ask()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("convmixer_768", "; did you mean convmixer_768_32?"),
        ("ConvMixer_1536_20", "convmixer_1536_20?"),
        ("?!", "'?!'. There"),
        ("n" * 300, ""),
    ],
)
def test_unknown_name(name, hint):
    for ask in (zoo.load, zoo.resolve, zoo.download, zoo.local_path):
        with pytest.raises(ModelError) as caught:
            ask(name)
        assert str(caught.value).startswith(f"there is no model {name!r:.80}") and hint in str(caught.value)
        assert all(known in str(caught.value) for known in ["auto", *MODELS]) and "\n" not in str(caught.value)


# By file


def test_file_by_path(tmp_path, monkeypatch):
    save_own(tmp_path / "weights", "my own", SMALL)
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "weights", str(tmp_path / "weights"), "./weights", "weights"):
        assert zoo.load(file).name == "my own"
    assert zoo.resolve(tmp_path / "weights") == ("weights", tmp_path / "weights")
    shutil.copy("weights", "convmixer_1536_20.safetensors")  # called as a named model, which is not what was asked for
    assert zoo.load("convmixer_1536_20.safetensors").name == "my own"
    for missing in ("none.safetensors", "none.pth", "none.pth.tar", "./none", "folder/none"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            zoo.load(missing)


# auto


def test_auto_is_the_shipped_model_on_a_fresh_machine():
    entry = MODELS["convmixer_256_8_cifar10"]
    assert zoo.resolve() == zoo.resolve("auto") == (entry.name, entry.shipped)
    assert zoo.load().name == entry.name


def test_auto_is_the_most_accurate_model_that_is_here(cache):
    put_raw_timm_file(cache / "convmixer_1024_20_ks9_p14.safetensors")
    assert zoo.load().name == "convmixer_1024_20_ks9_p14"
    put_raw_timm_file(cache / "convmixer_768_32.pth.tar")
    assert zoo.load().name == "convmixer_768_32"
    put_raw_timm_file(cache / "convmixer_1536_20.safetensors")
    assert zoo.resolve() == ("convmixer_1536_20", cache / "convmixer_1536_20.safetensors")


def test_auto_looks_into_the_hubs_cache_too(server, cache, tmp_path):
    put_raw_timm_file(cache / "convmixer_1024_20_ks9_p14.safetensors")
    serve(server, "convmixer_768_32", tmp_path)
    path = zoo.download("convmixer_768_32")
    assert zoo.resolve() == ("convmixer_768_32", path)
    put_raw_timm_file(cache / "convmixer_768_32.safetensors")  # by hand: it comes first
    assert zoo.resolve() == ("convmixer_768_32", cache / "convmixer_768_32.safetensors")


def test_auto_downloads_nothing(server, tmp_path):
    for name in PUBLISHED:
        serve(server, name, tmp_path)
    zoo.load()
    zoo.list_models()
    assert server.requests == [] and server.heads == []


def test_auto_is_the_file_that_cog_weights_names(cache, tmp_path, monkeypatch):
    put_raw_timm_file(cache / "convmixer_1536_20.safetensors")
    save_own(tmp_path / "mine", "my own", SMALL)
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "mine"))
    assert zoo.load().name == "my own"
    assert zoo.load("convmixer_1536_20").name == "convmixer_1536_20"
    monkeypatch.setenv("COG_WEIGHTS", "/no/such/file")
    with pytest.raises(CheckpointError, match=r"^the file that COG_WEIGHTS names is not there: /no/such/file$"):
        zoo.load()
    monkeypatch.setenv("COG_WEIGHTS", "")
    assert zoo.load().name == "convmixer_1536_20"


# Listing and folders


def test_list_of_models(cache, monkeypatch):
    put_raw_timm_file(cache / "convmixer_768_32.safetensors")
    monkeypatch.setattr(zoo, "load_checkpoint", None)  # no weights are read
    rows = {row["name"]: row for row in zoo.list_models()}
    assert rows.keys() == MODELS.keys()
    assert rows["convmixer_768_32"] == {
        "name": "convmixer_768_32",
        "parameters": count_parameters(SMALL),
        "input_size": 224,
        "top1": 80.158,
        "data": "ImageNet-1k validation",
        "path": str(cache / "convmixer_768_32.safetensors"),
    }
    assert rows["convmixer_1536_20"]["path"] is None
    shipped = rows["convmixer_256_8_cifar10"]
    assert (shipped["parameters"], shipped["input_size"]) == (594_186, 32)
    assert (shipped["top1"], shipped["data"]) == (91.5, "CIFAR-10 test")
    MODELS["convmixer_256_8_cifar10"].shipped.unlink()
    shipped = zoo.list_models()[-1]
    assert (shipped["input_size"], shipped["top1"], shipped["path"]) == (32, None, None)


@pytest.mark.skipif(sys.platform != "linux", reason="the paths are Linux's")
def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CONVMIXER_CACHE", "~/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert zoo.cache_dir() == Path("/home/me/weights")
    monkeypatch.setenv("CONVMIXER_CACHE", "")
    assert zoo.cache_dir() == Path("/xdg/convmixer")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zoo.cache_dir() == Path("/home/me/.cache/convmixer")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert zoo.cache_dir().is_absolute()
