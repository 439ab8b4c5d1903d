"""The named models and the Hub's: which file a name means, and what happens where it is not here."""

import json
import os
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
import safetensors.torch
import timm
import torch
from file_server import Resource
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer import hub, model, zoo
from convmixer.config import ConvMixerConfig
from convmixer.download import DownloadError, progress_bar
from convmixer.labels import imagenet_labels
from convmixer.preprocessing import CIFAR10, IMAGENET
from convmixer.readers import infer_config
from convmixer.weights import Checkpoint, CheckpointError, save_checkpoint
from convmixer.zoo import MODELS, ModelError

SMALL = ConvMixerConfig(dim=4, depth=2, kernel_size=3, patch_size=7, activation="relu")  # as 768/32, but small
REAL_MODELS = dict(MODELS)
*PUBLISHED, SHIPPED = MODELS
NAME, NAMED = "convmixer_768_32", "timm/convmixer_768_32.in1k"
REPO = "ada/flowers"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COG_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def server(tmp_path, monkeypatch):
    """The Hub and the authors' server, for small models under the published names."""
    with hub_server.HubServer() as server:
        hub_server.use(monkeypatch, server, tmp_path / "home")
        for name in PUBLISHED:
            release = server.url(f"/{name}.pth.tar")
            monkeypatch.setitem(MODELS, name, replace(MODELS[name], config=SMALL, release=release))
        yield server


def save_own(path, name, config):
    labels = tuple(f"label {i}" for i in range(config.num_classes))
    save_checkpoint(path, Checkpoint(name, config, model.ConvMixer(config).state_dict(), labels, CIFAR10, {}, {}))


def put_timms_file(path):
    tensors = TimmConvMixer(4, 2, kernel_size=3, patch_size=7).state_dict()
    torch.save(tensors, path) if path.name.endswith(".tar") else safetensors.torch.save_file(tensors, path)
    return path


def serve(server, name, tmp_path):
    """Both sources of a published model, in the formats that the real ones have; gives the first one's weights."""
    release = put_timms_file(tmp_path / "release.pth.tar").read_bytes()
    server.resources[f"/{name}.pth.tar"] = Resource(release)
    return server.add(MODELS[name].repo, model=put_timms_file(tmp_path / "hub").read_bytes())["model"]


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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth.tar"])
def test_a_file_in_the_cache_is_used(server, cache, suffix):
    """As downloaded from either source, put there by hand, or baked into a container."""
    path = put_timms_file(cache / f"{NAME}{suffix}")
    checkpoint = zoo.load(NAME)
    assert zoo.resolve(NAME) == (NAME, path) and zoo.download(NAME) == path and server.requests == []
    assert [row["path"] for row in zoo.list_models()][:2] == [None, str(path)]
    assert (checkpoint.name, checkpoint.config) == (NAME, SMALL)  # ReLU, which only the table knows
    assert checkpoint.labels == imagenet_labels() and checkpoint.preprocessing == IMAGENET
    assert checkpoint.accuracy["top1"] == 80.158


def test_second_source_has_its_own_format_and_name(server, cache, tmp_path):
    weights = serve(server, NAME, tmp_path)
    weights.takes_ranges, weights.cuts = False, [1000] * 20
    assert zoo.download(NAME) == cache / f"{NAME}.pth.tar"
    assert zoo.load(NAME).config == SMALL


def test_no_source_works(cache):
    with pytest.raises(DownloadError) as caught:
        zoo.load(NAME)
    text = str(caught.value)
    assert text.startswith(f"could not download {NAME}: hf:{NAMED}: there is none, or it is private")
    assert f"{MODELS[NAME].release}: HTTP 404 Not Found; or put model.safetensors of https://" in text
    assert text.endswith(f"at {cache}/{NAME}.safetensors by hand") and "\n" not in text


def test_damaged_files_are_told_and_fetched_anew(server, cache, tmp_path):
    weights = serve(server, NAME, tmp_path)
    (cache / f"{NAME}.safetensors").write_bytes(b"<html>please log in</html>")
    save_own(cache / f"{NAME}.pth.tar", "another network", replace(SMALL, depth=1))
    with pytest.raises(CheckpointError) as caught:
        zoo.load(NAME)
    assert str(caught.value).startswith(f"{cache}/{NAME}.safetensors: is ") and server.requests == []
    assert str(caught.value).endswith(f"to download it again, run: python -m convmixer download {NAME}")
    path = zoo.download(NAME)
    assert path == hub.cached(NAMED, hub.WEIGHTS) and os.listdir(cache) == []
    path.write_bytes(weights.body[:1000])
    assert zoo.download(NAME) == path and path.read_bytes() == weights.body


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ConvMixer_768", r"there is no model 'ConvMixer_768'; did you mean convmixer_768_32\? There are auto, "),
        ("?!", r"there is no model '\?!'. There are auto, convmixer_1536_20, "),
        ("hf:flowers", r"it must be hf:USER/NAME\[@REVISION\]"),
        ("hf:ada/x@../../y", r"it must be hf:USER/NAME\[@REVISION\]"),
        ("hf:ada/größe", r"it must be hf:USER/NAME\[@REVISION\]"),
    ],
)
def test_unknown_name(name, line):
    for ask in (zoo.load, zoo.download):
        with pytest.raises(ModelError, match=line):
            ask(name)


def test_file_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_own(tmp_path / "weights", "my own", SMALL)
    shutil.copy("weights", "convmixer_1536_20.safetensors")  # called as a named model, which is not what was asked for
    for file in (tmp_path / "weights", "./weights", "weights", "convmixer_1536_20.safetensors"):
        assert zoo.load(file).name == "my own" and zoo.resolve(file) == (Path(file).name, Path(file))
    with pytest.raises(CheckpointError, match="there is no such file"):
        zoo.load("none.pth.tar")


def test_auto_is_the_best_model_that_is_here_and_downloads_none(server, cache, tmp_path):
    for name in PUBLISHED:
        serve(server, name, tmp_path)
    assert zoo.resolve() == (SHIPPED, MODELS[SHIPPED].shipped)
    for name in ("convmixer_1024_20_ks9_p14", NAME):
        put_timms_file(cache / f"{name}.safetensors")
        assert zoo.load("auto").name == name
    assert server.requests == server.heads == []
    path = zoo.download("convmixer_1536_20")
    assert zoo.resolve() == ("convmixer_1536_20", path)
    put_timms_file(cache / "convmixer_1536_20.safetensors")  # by hand: it comes before what was fetched
    assert zoo.resolve() == ("convmixer_1536_20", cache / "convmixer_1536_20.safetensors")


def test_auto_is_the_file_that_cog_weights_names(tmp_path, monkeypatch):
    save_own(tmp_path / "mine", "my own", SMALL)
    monkeypatch.setenv("COG_WEIGHTS", str(tmp_path / "mine"))
    assert zoo.load().name == "my own"
    monkeypatch.setenv("COG_WEIGHTS", "/no/such/file")
    with pytest.raises(CheckpointError, match=r"^the file that COG_WEIGHTS names is not there: /no/such/file$"):
        zoo.load()


def test_the_command_downloads_once_into_timms_cache_and_then_works_offline(server, python, tmp_path):
    with torch.device("meta"):
        tensors = model.ConvMixer(REAL_MODELS[NAME].config).state_dict()
    tensors = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in tensors.items()}
    published = safetensors.torch.save(tensors)
    server.add(NAMED, model=published)
    environment = server.environment(tmp_path)
    first = python("-m", "convmixer", "download", NAME, env=environment)
    (path,) = tmp_path.glob("hub/models--timm--convmixer_768_32.in1k/snapshots/*/model.safetensors")
    assert first.stdout == f"{path}\n" and path.read_bytes() == published
    total = f"{len(published) / 1e6:.1f}"
    assert first.stderr == f"{NAME}: 0.0 of {total} MB,   0%\n{NAME}: {total} of {total} MB, 100%\n"
    server.requests.clear()
    fetch_as_timm = f"import timm; timm.create_model('{NAME}', pretrained=True)"
    assert python("-c", fetch_as_timm, env=environment).returncode == 0
    assert [path for path, _ in server.requests if path.endswith(".safetensors")] == []
    # Looking for models imports nothing that takes long, and asks nobody.
    code = "import sys; from convmixer import zoo, __main__; zoo.list_models(); print(zoo.load().name)"
    code += (
        "; print({'huggingface_hub', 'httpx2', 'tqdm', 'urllib.request'} & set(sys.modules)); sys.exit(__main__.main())"
    )
    arguments = ("classify", "--sample", "--model", f"hf:{REPO}")
    offline = python("-c", code, *arguments, env=environment | {"HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, offline.stdout, offline.stderr.count("\n")) == (2, f"{NAME}\nset()\n", 1)
    assert "offline mode is enabled" in offline.stderr and "into a folder by hand" in offline.stderr


def test_a_repository_by_its_name_over_a_connection_that_is_cut(server, random_checkpoint):
    bare, reports = safetensors.torch.save(safetensors.torch.load_file(random_checkpoint(classes=3))), []
    config = {"architecture": "mine", "label_names": ["a", "b", "c"], "pretrained_cfg": {"input_size": [3, 48, 48]}}
    server.add(REPO, model=bare, config=json.dumps(config).encode())["model"].cuts = [1000, 2000]
    checkpoint = zoo.load(f"hf:{REPO}", progress=lambda *report: reports.append(report))
    assert (checkpoint.name, checkpoint.labels) == (f"hf:{REPO}", ("a", "b", "c"))
    assert checkpoint.preprocessing.size == 48  # timm's config comes along
    assert reports[0] == (0, len(bare)) and reports[-1] == (len(bare), len(bare))
    before = len(server.requests), len(server.heads)
    name, path = zoo.resolve(f"hf:{REPO}")
    assert (name, path) == (f"hf:{REPO}", hub.cached(REPO, hub.WEIGHTS))
    assert (len(server.requests), len(server.heads)) == before  # it is here, and nobody asked for a newer one
    path.with_name("config.json").unlink()
    assert zoo.resolve(f"hf:{REPO}")[1].with_name("config.json").is_file()


def test_download_asks_for_the_newest_and_a_revision_is_a_branch_a_tag_or_a_commit(server, random_checkpoint):
    one, two, other = (random_checkpoint(seed, classes=3).read_bytes() for seed in range(3))
    server.add(REPO, model=one)
    server.add(REPO, "v2", model=other)
    first = zoo.download(f"hf:{REPO}")
    server.add(REPO, model=two)
    assert zoo.download(f"hf:{REPO}").read_bytes() == zoo.resolve(f"hf:{REPO}")[1].read_bytes() == two
    assert zoo.resolve(f"hf:{REPO}@{first.parent.name}")[1].read_bytes() == one
    assert zoo.resolve(f"hf:{REPO}@v2")[1].read_bytes() == other
    with pytest.raises(DownloadError, match=r"hf:ada/flowers: it has no revision 'v3'; or put its config.json and"):
        zoo.load(f"hf:{REPO}@v3")


def test_repositories_that_cannot_be_had(server, random_checkpoint, monkeypatch):
    server.add("ada/empty", config=b"{}")
    with pytest.raises(DownloadError, match=r"^could not download hf:ada/empty: it holds no model.safetensors; or put"):
        zoo.load("hf:ada/empty")
    server.add(REPO, model=random_checkpoint(classes=3).read_bytes())
    server.private.add(REPO)
    with pytest.raises(DownloadError, match=r"there is none, or it is private: run `hf auth login`, or set HF_TOKEN"):
        zoo.load(f"hf:{REPO}")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert zoo.load(f"hf:{REPO}").name == f"hf:{REPO}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("variables", "folder", "own"),
    [
        ({}, "/me/.cache/huggingface/hub", "/me/.cache/convmixer"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub", "/xdg/convmixer"),
        ({"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf", "CONVMIXER_CACHE": "~/own"}, "/me/hf/hub", "/me/own"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}, "/new", "/me/.cache/convmixer"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, variables, folder, own):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE", "CONVMIXER_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/me"}).items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_dir()) == runpy.run_module("huggingface_hub.constants")["HF_HUB_CACHE"] == folder
    assert str(zoo.cache_dir()) == own


def test_xet_reports_the_bytes_of_the_file_once():
    """Large files of the Hub come through hf_xet, which reports what it has written and what came over the network."""
    reports = []
    bar = progress_bar(lambda *report: reports.append(report))
    with XetDownloadProgressReporter(reconstruction_desc="", total=100, log_level=30, tqdm_class=bar) as reporter:
        for written, transferred in ((0, 30), (60, 50), (100, 70)):
            fields = {"total_bytes_completed": written, "total_transfer_bytes_completed": transferred}
            rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": 1.0}
            reporter.update_progress(type("Report", (), fields | rates | {"total_bytes": 100}))
    assert reports == [(0, 100), (60, 100), (100, 100)]
