"""The named models: which file a name means, and what happens where it is not here."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import hub_server
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
from convmixer.readers import infer_config
from convmixer.weights import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from convmixer.zoo import MODELS, DownloadError, ModelError

SMALL = ConvMixerConfig(dim=4, depth=2, kernel_size=3, patch_size=7, activation="relu")  # as 768/32, but small
REAL_MODELS = dict(MODELS)
*PUBLISHED, SHIPPED = MODELS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def server(tmp_path, monkeypatch):
    """The Hub and the authors' server, for small models under the published names; the shipped one is small, too."""
    with hub_server.HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path / "home")
        for name in PUBLISHED:
            small = replace(MODELS[name], config=SMALL, release=server.url(f"/{name}.pth.tar"))
            monkeypatch.setitem(MODELS, name, small)
        monkeypatch.setitem(MODELS, SHIPPED, replace(MODELS[SHIPPED], shipped=tmp_path / "shipped.safetensors"))
        save_own(tmp_path / "shipped.safetensors", "as trained", MODELS[SHIPPED].config)
        yield server


def save_own(path, name, config):
    labels = tuple(f"label {i}" for i in range(config.num_classes))
    accuracy = {"top1": 91.5, "data": "CIFAR-10 test", "images": 10_000}
    save_checkpoint(path, Checkpoint(name, config, model.ConvMixer(config).state_dict(), labels, CIFAR10, {}, accuracy))


def put_timms_file(path):
    tensors = TimmConvMixer(4, 2, kernel_size=3, patch_size=7).state_dict()
    torch.save(tensors, path) if path.name.endswith(".tar") else safetensors.torch.save_file(tensors, path)
    return path


def serve(server, name, tmp_path):
    """Both sources of a published model, in the formats that the real ones have; gives the first one's weights."""
    release = put_timms_file(tmp_path / "release.pth.tar").read_bytes()
    server.resources[f"/{name}.pth.tar"] = Resource(release, takes_if_range=False)
    return server.add(MODELS[name].repo, model=put_timms_file(tmp_path / "hub").read_bytes())["model"]


# The table


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_timms(name):
    entry, pretrained = REAL_MODELS[name], timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=10)
        ours = model.ConvMixer(entry.config)
    assert infer_config(network.state_dict()) == replace(entry.config, num_classes=10)
    assert isinstance(network.stem[1], type(ours.stem[1]))
    assert entry.preprocessing == IMAGENET and entry.repo == pretrained.hf_hub_id
    assert (IMAGENET.size, IMAGENET.crop_pct) == (pretrained.input_size[1], pretrained.crop_pct)
    assert (IMAGENET.mean, IMAGENET.std) == (pretrained.mean, pretrained.std)


def test_the_shipped_model_is_what_the_table_says():
    checkpoint = load_checkpoint(REAL_MODELS[SHIPPED].shipped)
    assert (checkpoint.name, checkpoint.config) == (SHIPPED, REAL_MODELS[SHIPPED].config)
    assert checkpoint.accuracy["top1"] > 94 and "automobile" in checkpoint.labels


def test_list_of_models(cache):
    path = put_timms_file(cache / "convmixer_768_32.safetensors")
    rows = {row["name"]: row for row in zoo.list_models()}
    assert list(rows) == list(MODELS)
    assert rows["convmixer_768_32"] == {
        "name": "convmixer_768_32",
        "parameters": count_parameters(SMALL),
        "input_size": 224,
        "top1": 80.158,
        "data": "ImageNet-1k validation",
        "path": str(path),
    }
    assert rows["convmixer_1536_20"]["path"] is None
    assert (rows[SHIPPED]["input_size"], rows[SHIPPED]["top1"], rows[SHIPPED]["data"]) == (32, 91.5, "CIFAR-10 test")


# By name


@pytest.mark.parametrize("suffix", [".safetensors", ".pth.tar"])
def test_a_file_in_the_cache_is_used(server, cache, suffix):
    """As downloaded from either source, put there by hand, or baked into a container."""
    path = put_timms_file(cache / f"convmixer_768_32{suffix}")
    checkpoint = zoo.load("convmixer_768_32")
    assert zoo.resolve("convmixer_768_32") == ("convmixer_768_32", path)
    assert (checkpoint.name, checkpoint.config) == ("convmixer_768_32", SMALL)  # ReLU, which only the table knows
    assert checkpoint.labels == imagenet_labels() and checkpoint.preprocessing == IMAGENET
    assert checkpoint.accuracy["top1"] == 80.158 and server.requests == []


@pytest.mark.parametrize("first_source", ["missing", "of another network", "cut"])
def test_second_source_has_its_own_format_and_name(server, cache, tmp_path, first_source):
    weights = serve(server, "convmixer_768_32", tmp_path)
    if first_source == "missing":
        server.resources = {path: it for path, it in server.resources.items() if it is not weights}
    elif first_source == "of another network":
        weights.body = safetensors.torch.save({"weight": torch.ones(3)})
    else:
        weights.takes_ranges, weights.cuts = False, [1000] * 20
    assert zoo.download("convmixer_768_32") == cache / "convmixer_768_32.pth.tar"
    assert zoo.load("convmixer_768_32").config == SMALL


def test_no_source_works(cache):
    with pytest.raises(DownloadError) as caught:
        zoo.load("convmixer_768_32")
    text = str(caught.value)
    assert text.startswith("could not download convmixer_768_32: hf:timm/convmixer_768_32.in1k: there is none, or")
    assert f"{MODELS['convmixer_768_32'].release}: HTTP 404 Not Found; or put model.safetensors of https://" in text
    assert text.endswith(f"at {cache}/convmixer_768_32.safetensors by hand") and "\n" not in text


def test_folders_that_cannot_be_written_are_told(server, tmp_path, monkeypatch):
    serve(server, "convmixer_768_32", tmp_path)
    for name in ("CONVMIXER_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "hub" / name))
    with pytest.raises(DownloadError, match=r": cannot write to .*/hub: Not a directory; .*/hub: Not a"):
        zoo.download("convmixer_768_32")


def test_damaged_file_in_the_cache(server, cache, tmp_path):
    serve(server, "convmixer_768_32", tmp_path)
    for suffix in (".safetensors", ".pth.tar"):
        (cache / f"convmixer_768_32{suffix}").write_bytes(b"<html>please log in</html>")
    with pytest.raises(CheckpointError) as caught:
        zoo.load("convmixer_768_32")
    assert str(caught.value).startswith(f"{cache}/convmixer_768_32.safetensors: is ")
    assert str(caught.value).endswith("to download it again, run: python -m convmixer download convmixer_768_32")
    assert server.requests == []
    assert zoo.download("convmixer_768_32") == hub.cached("timm/convmixer_768_32.in1k", hub.WEIGHTS)
    assert zoo.load("convmixer_768_32").config == SMALL and os.listdir(cache) == []


def test_shipped_model_that_is_missing():
    MODELS[SHIPPED].shipped.unlink()
    for ask in (zoo.load, zoo.download):
        with pytest.raises(ModelError, match="convmixer_256_8_cifar10 is missing from this installation"):
            ask(SHIPPED)
    assert zoo.list_models()[-1]["path"] is None


@pytest.mark.parametrize(
    ("name", "hint"), [("ConvMixer_768", "; did you mean convmixer_768_32?"), ("?!", "'?!'. There"), ("n" * 300, "")]
)
def test_unknown_name(name, hint):
    for ask in (zoo.load, zoo.download):
        with pytest.raises(ModelError) as caught:
            ask(name)
        assert str(caught.value).startswith(f"there is no model {name!r:.80}") and hint in str(caught.value)
        assert all(known in str(caught.value) for known in ["auto", *MODELS]) and "\n" not in str(caught.value)


# By file


def test_file_by_path(tmp_path, monkeypatch):
    save_own(tmp_path / "weights", "my own", SMALL)
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "weights", "./weights", "weights"):
        assert zoo.load(file).name == "my own"
    assert zoo.resolve("weights") == ("weights", Path("weights"))
    shutil.copy("weights", "convmixer_1536_20.safetensors")  # called as a named model, which is not what was asked for
    assert zoo.load("convmixer_1536_20.safetensors").name == "my own"
    for missing in ("none.pth.tar", "./none"):
        with pytest.raises(CheckpointError, match="there is no such file"):
            zoo.load(missing)


# auto


def test_auto_is_the_best_model_that_is_here_and_downloads_none(server, cache, tmp_path):
    for name in PUBLISHED:
        serve(server, name, tmp_path)
    assert zoo.resolve() == (SHIPPED, MODELS[SHIPPED].shipped)
    for name in ("convmixer_1024_20_ks9_p14", "convmixer_768_32"):
        put_timms_file(cache / f"{name}.safetensors")
        assert zoo.load("auto").name == name
    assert server.requests == server.heads == []
    path = zoo.download("convmixer_1536_20")
    assert zoo.resolve() == ("convmixer_1536_20", path)
    put_timms_file(cache / "convmixer_1536_20.safetensors")  # by hand: it comes before what was fetched
    assert zoo.resolve() == ("convmixer_1536_20", cache / "convmixer_1536_20.safetensors")


def test_auto_is_the_file_that_cog_weights_names(cache, tmp_path, monkeypatch):
    put_timms_file(cache / "convmixer_1536_20.safetensors")
    save_own(tmp_path / "mine", "my own", SMALL)
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "mine"))
    assert zoo.load().name == "my own"
    assert zoo.load("convmixer_1536_20").name == "convmixer_1536_20"
    monkeypatch.setenv("COG_WEIGHTS", "/no/such/file")
    with pytest.raises(CheckpointError, match=r"^the file that COG_WEIGHTS names is not there: /no/such/file$"):
        zoo.load()


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
