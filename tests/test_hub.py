"""Models of the Hugging Face Hub: fetched from a server that speaks its protocol, and found in its cache."""

import json
import runpy

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


def test_the_command_downloads_once_and_then_works_offline(server, published, python, tmp_path):
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
    fetch_as_timm = "import timm; timm.create_model('convmixer_768_32', pretrained=True)"
    assert python("-c", fetch_as_timm, env=environment).returncode == 0
    assert [path for path, _ in server.requests[len(before) :] if path.endswith(".safetensors")] == []  # one cache
    command = ("-m", "convmixer", "classify", "--sample", "--json", "--engine", "numpy")
    answered = python(*command, env=environment | {"HF_HUB_OFFLINE": "1"})
    assert (json.loads(answered.stdout)["model"], answered.stderr) == ("convmixer_768_32", "")


def test_offline_says_so_and_looking_for_models_imports_nothing(server, python, tmp_path):
    code = "import sys; from convmixer import zoo, __main__; zoo.list_models(); zoo.load()"
    code += "; print({'huggingface_hub', 'httpx2', 'tqdm', 'urllib.request'} & set(sys.modules)); __main__.main()"
    environment = server.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    refused = python("-c", code, "classify", "--sample", "--model", f"hf:{REPO}", env=environment)
    assert refused.stdout == "set()\n" and "offline mode is enabled" in refused.stderr
    assert refused.stderr.count("\n") == 1 and "into a folder by hand" in refused.stderr


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
    assert server.requests == server.heads == []  # it is here, and nobody asked for a newer one
    path.with_name("config.json").unlink()
    assert zoo.resolve(f"hf:{REPO}")[1].with_name("config.json").is_file()


def test_download_asks_for_the_newest_and_a_revision_is_a_branch_a_tag_or_a_commit(server, home, random_checkpoint):
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


def test_a_connection_that_was_cut_is_no_end_and_timms_config_comes_along(server, home, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    bare = safetensors.torch.save(safetensors.torch.load(weights))
    config = {"architecture": "mine", "label_names": ["a", "b", "c"], "pretrained_cfg": {"input_size": [3, 48, 48]}}
    server.add(REPO, model=bare, config=json.dumps(config).encode())["model"].cuts = [1000, 2000]
    checkpoint = zoo.load(f"hf:{REPO}")
    assert (checkpoint.labels, checkpoint.preprocessing.size) == (("a", "b", "c"), 48)


def test_a_private_repository_needs_a_token(server, home, weights, monkeypatch):
    server.add(REPO, model=weights)
    server.private.add(REPO)
    with pytest.raises(DownloadError, match=r"there is none, or it is private: run `hf auth login`, or set HF_TOKEN"):
        zoo.load(f"hf:{REPO}")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    assert zoo.load(f"hf:{REPO}").name == f"hf:{REPO}"


def test_a_repository_without_weights(server, home):
    server.add(REPO, config=b"{}")
    line = r"^could not download hf:ada/flowers: it holds no model.safetensors; or put"
    with pytest.raises(DownloadError, match=line):
        zoo.load(f"hf:{REPO}")


@pytest.mark.parametrize("name", ["hf:flowers", "hf:ada/flowers@", "hf:a/b/c", "hf:ada/x@../../y", "hf:ada/größe"])
def test_names_that_are_none(name):
    for ask in (zoo.load, zoo.download):
        with pytest.raises(ModelError, match=r"it must be hf:USER/NAME\[@REVISION\]"):
            ask(name)


def test_a_damaged_file_in_the_cache_is_fetched_anew(server, home, published):
    server.add(NAMED, model=published)
    path = zoo.download("convmixer_768_32")
    path.write_bytes(published[:1000])
    assert zoo.download("convmixer_768_32") == path and path.read_bytes() == published


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
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
def test_the_cache_is_where_huggingface_hub_has_it(monkeypatch, variables, folder):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"HOME": "/me"}).items():
        monkeypatch.setenv(name, value)
    assert str(hub.cache_dir()) == runpy.run_module("huggingface_hub.constants")["HF_HUB_CACHE"] == folder


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
