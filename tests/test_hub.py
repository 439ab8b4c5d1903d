"""Models of the Hugging Face Hub: fetched from a server that speaks its protocol, and found in its cache."""

import json
import os

import hub_server
import pytest
import safetensors.torch
import torch
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

from convmixer import Classifier, hub, model, zoo
from convmixer.config import PUBLISHED
from convmixer.download import DownloadError, progress_bar
from convmixer.zoo import ModelError

REPO = "ada/flowers"
NAMED = "timm/convmixer_768_32.in1k"


@pytest.fixture
def server():
    with hub_server.HubServer() as server:
        yield server


@pytest.fixture
def home(server, tmp_path, monkeypatch):
    """An empty HF_HOME of this process, which takes ``server`` for the Hub."""
    hub_server.use(monkeypatch, server, tmp_path / "home")
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "own"))
    return tmp_path / "home"


@pytest.fixture
def weights(random_checkpoint):
    return random_checkpoint(classes=3).read_bytes()


@pytest.fixture(scope="module")
def published():
    """The 768/32 network at its full size, as timm has it."""
    with torch.device("meta"):
        tensors = model.ConvMixer(PUBLISHED["convmixer_768_32"]).state_dict()
    return safetensors.torch.save({name: torch.zeros_like(tensor, device="cpu") for name, tensor in tensors.items()})


# As users have it: processes of their own


def test_the_command_downloads_from_the_hub_once(server, published, python, tmp_path):
    server.add(NAMED, model=published)
    command, environment = ("-m", "convmixer", "download", "convmixer_768_32"), server.environment(tmp_path)
    first = python(*command, env=environment)
    assert first.returncode == 0, first
    (path,) = tmp_path.glob("hub/models--timm--convmixer_768_32.in1k/snapshots/*/model.safetensors")
    assert first.stdout == f"{path}\n" and path.read_bytes() == published
    total = f"{len(published) / 1e6:.1f}"
    assert first.stderr == f"convmixer_768_32: 0.0 of {total} MB,   0%\nconvmixer_768_32: {total} of {total} MB, 100%\n"
    before = [*server.requests]
    second = python(*command, env=environment)
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert server.requests == before
    listed = python("-m", "convmixer", "models", "--json", env=environment).stdout.splitlines()
    assert str(path) in [json.loads(line)["path"] for line in listed]


def test_what_timm_has_fetched_is_used_offline(server, published, python, tmp_path, picture):
    server.add(NAMED, model=published)
    environment = server.environment(tmp_path / "home")
    code = "import timm; timm.create_model('convmixer_768_32', pretrained=True)"
    fetched = python("-c", code, env=environment)
    assert fetched.returncode == 0, fetched
    server.resources.clear()
    server.requests.clear()
    server.heads.clear()
    picture().save(tmp_path / "a.png")
    for named in ((), ("--model", "convmixer_768_32")):  # it is also the best one that is here: "auto"
        command = ("-m", "convmixer", "classify", tmp_path / "a.png", "--json", "--engine", "numpy", *named)
        answered = python(*command, env=environment | {"HF_HUB_OFFLINE": "1"})
        assert answered.returncode == 0, answered
        assert (json.loads(answered.stdout)["model"], answered.stderr) == ("convmixer_768_32", "")
    assert server.requests == [] and server.heads == []


def test_looking_for_models_imports_no_huggingface_hub(python):
    code = "import sys; from convmixer import Classifier, zoo; zoo.list_models(); Classifier(engine='numpy')"
    code += "; print({'huggingface_hub', 'httpx2', 'tqdm', 'urllib.request'} & set(sys.modules))"
    assert python("-c", code).stdout == "set()\n"


# hf:USER/NAME


def test_a_repository_by_its_name(server, home, weights, picture):
    server.add(REPO, model=weights, config=b'{"architecture": {}}')
    reports = []
    classifier = Classifier(f"hf:{REPO}", engine="numpy", progress=lambda *report: reports.append(report))
    assert classifier.name == f"hf:{REPO}" and classifier.classify(picture())[0].label.startswith("label ")
    assert reports[0] == (0, len(weights)) and reports[-1] == (len(weights), len(weights))
    server.requests.clear()
    server.heads.clear()
    name, path = zoo.resolve(f"hf:{REPO}")
    assert name == f"hf:{REPO}" and path == hub.cached(REPO, hub.WEIGHTS) and path.with_name("config.json").is_file()
    assert server.requests == [] and server.heads == []  # it is here, and nobody asked for a newer one
    assert zoo.load(path.parent).name == "random"  # the folder, which is one that timm's files lie in


def test_download_asks_for_the_newest(server, home, weights, random_checkpoint):
    server.add(REPO, model=weights)
    old = zoo.download(f"hf:{REPO}")
    newer = random_checkpoint(seed=1, classes=3).read_bytes()
    server.add(REPO, model=newer)
    assert zoo.download(f"hf:{REPO}").read_bytes() == newer and zoo.resolve(f"hf:{REPO}")[1].read_bytes() == newer
    assert zoo.resolve(f"hf:{REPO}@{old.parent.name}")[1] == old


def test_a_connection_that_was_cut_is_no_end(server, home, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server.add(REPO, model=weights)["model"].cuts = [1000, 2000]
    assert zoo.download(f"hf:{REPO}").read_bytes() == weights


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, home, weights, random_checkpoint):
    other = random_checkpoint(seed=1, classes=3).read_bytes()
    server.add(REPO, model=weights)
    server.add(REPO, "v2", model=other)
    assert zoo.resolve(f"hf:{REPO}@v2")[1].read_bytes() == other
    commit = hub.cached(REPO, hub.WEIGHTS, "v2").parent.name
    assert zoo.resolve(f"hf:{REPO}@{commit}")[1] == hub.cached(REPO, hub.WEIGHTS, "v2")
    with pytest.raises(DownloadError, match=r"hf:ada/flowers: it has no revision 'v3'; or put its config.json and"):
        zoo.load(f"hf:{REPO}@v3")


def test_timms_config_comes_with_the_weights(server, home, tmp_path, weights):
    tensors = safetensors.torch.load(weights)
    config = {"architecture": "mine", "label_names": ["a", "b", "c"], "pretrained_cfg": {"input_size": [3, 48, 48]}}
    server.add(REPO, model=safetensors.torch.save(tensors), config=json.dumps(config).encode())
    checkpoint = zoo.load(f"hf:{REPO}")
    assert (checkpoint.labels, checkpoint.preprocessing.size) == (("a", "b", "c"), 48)


def test_weights_that_came_without_their_config_are_completed(server, home, weights):
    server.add(REPO, model=weights, config=b"{}")
    path = zoo.download(f"hf:{REPO}")
    os.unlink(path.with_name("config.json"))
    assert zoo.resolve(f"hf:{REPO}")[1].with_name("config.json").is_file()


def test_a_private_repository_needs_a_token(server, home, weights, monkeypatch):
    server.add(REPO, model=weights)
    server.private.add(REPO)
    with pytest.raises(DownloadError, match=r"there is none, or it is private: run `hf auth login`, or set HF_TOKEN"):
        zoo.load(f"hf:{REPO}")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert zoo.load(f"hf:{REPO}").name == f"hf:{REPO}"


def test_offline_says_so_and_what_is_here_is_used(server, home, weights, python):
    server.add(REPO, model=weights)
    environment = server.environment(home) | {"HF_HUB_OFFLINE": "1"}
    command = ("-m", "convmixer", "classify", "--sample", "--engine", "numpy", "--model", f"hf:{REPO}")
    refused = python(*command, env=environment)
    assert refused.returncode == 2 and "offline mode is enabled" in refused.stderr, refused
    assert refused.stderr.count("\n") == 1 and "into a folder by hand" in refused.stderr
    zoo.download(f"hf:{REPO}")
    answered = python(*command, env=environment)
    assert (answered.returncode, answered.stderr) == (0, ""), answered
    assert f"(hf:{REPO})" in answered.stdout


@pytest.mark.parametrize(
    "name", ["hf:", "hf:flowers", "hf:ada/flowers@", "hf:a/b/c", "hf:ada/x@../../y", "hf:ada/größe"]
)
def test_names_that_are_none(name):
    for ask in (zoo.load, zoo.download):
        with pytest.raises(ModelError, match=r"it must be hf:USER/NAME\[@REVISION\]"):
            ask(name)


def test_a_repository_without_weights(server, home):
    server.add(REPO, config=b"{}")
    with pytest.raises(
        DownloadError, match=r"^could not download hf:ada/flowers: it holds no model.safetensors; or put"
    ):
        zoo.load(f"hf:{REPO}")


# The cache's layout


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/me/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf"}, "/me/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "$HOME/old"}, "/me/old"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}, "/new"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, python, variables, folder):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/me"}).items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_dir()) == folder
    assert python("-c", "from huggingface_hub.constants import *; print(HF_HUB_CACHE)").stdout == f"{folder}\n"


def test_a_damaged_file_in_the_cache_is_fetched_anew(server, home, published):
    server.add(NAMED, model=published)
    path = zoo.download("convmixer_768_32")
    path.write_bytes(published[:1000])
    assert zoo.download("convmixer_768_32") == path and path.read_bytes() == published


# Progress


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
