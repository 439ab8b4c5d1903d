"""train/publish.py: the repository folder as timm and this project open it, and the requests of the upload."""

import base64
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from networks import network
from PIL import Image
from safetensors.torch import load_file, save_file

from convmixer import Checkpoint, Classifier, Preprocessing, load_checkpoint, save_checkpoint
from convmixer.preprocessing import preprocess
from convmixer.zoo import MODELS
from train import publish

REPO = "ada/flowers"
ACCURACY = {"top1": 91.4, "top5": 99.72, "data": "Flowers, hold-out (80 pictures)", "images": 80}


@pytest.fixture
def run_folder(tmp_path, random_checkpoint):
    """A finished run: the model with what it measured, its records, two pictures and a card of its own."""
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint = replace(load_checkpoint(random_checkpoint(classes=3)), name="flowers", accuracy=ACCURACY)
    save_checkpoint(folder / "model.safetensors", checkpoint)
    (folder / "metrics.csv").write_text("epoch,held_out_top1\n3,93.2\n5,91.4\n")
    (folder / "recipe.json").write_text('{"epochs": 1}\n')
    (folder / "last.pt").write_bytes(b"not to be published")
    for name in ("curves.png", "confusion.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    card = "---\nlicense: mit\ntags: [flowers]\nlibrary_name: other\n---\n# Flowers\n\nWritten by the run: größer.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


class HubHandler(BaseHTTPRequestHandler):
    """The requests of an upload as the Hub answers them, or with the server's ``refusals``, status codes by path."""

    def do_POST(self):
        hub, path = self.server, self.path.split("?")[0]
        lines = self.rfile.read(int(self.headers.get("Content-Length", 0))).splitlines()
        body = [json.loads(line) for line in lines]
        hub.requests[path] = (self.headers["Authorization"], body)
        answer = {"url": f"{hub.url}/{REPO}", "errors": [], "warnings": [], "id": REPO, "private": hub.is_private}
        answer |= {"commitUrl": f"{hub.url}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40}
        if path.endswith("/preupload/main"):
            answer["files"] = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in body[0]["files"]]
        content = json.dumps(answer).encode()
        self.send_response(hub.refusals.get(path, 200))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, which this process takes for the Hub; ``requests`` has (token, JSON lines) by path."""
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.requests, server.refusals, server.is_private = {}, {}, True
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_repository_of_a_run(call_main, run_folder, picture):
    code, out, err = call_main(publish.main, run_folder)
    names = "model.safetensors, config.json, README.md, metrics.csv, recipe.json, confusion.png, curves.png"
    folder = run_folder / "hub"
    assert (code, out, err) == (0, f"{folder}: {names}\n", "")
    assert {path.name for path in folder.iterdir()} == set(names.split(", "))
    assert (folder / "model.safetensors").read_bytes() == (run_folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    checkpoint = load_checkpoint(folder / "model.safetensors")
    assert config["architecture"] == checkpoint.config.to_dict()
    assert config["labels"] == ["label 0", "label 1", "label 2"]
    assert Preprocessing.from_dict(config["preprocessing"]) == checkpoint.preprocessing
    assert Classifier(str(folder / "model.safetensors")).classify(picture())[0].label in config["labels"]

    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license, card.data.model_name) == ("convmixer", "mit", "flowers")
    assert card.data.tags == ["image-classification", "convmixer", "flowers"]
    results = [(r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results]
    assert results == [(ACCURACY["data"], "top-1 (%)", 91.4), (ACCURACY["data"], "top-5 (%)", 99.72)]
    assert card.text.strip().startswith("# Flowers\n\nWritten by the run: größer.\n") and "---" not in card.text
    assert "python -m convmixer classify IMAGE --model model.safetensors\n" in card.text


def test_the_best_epoch_is_offered_and_published(call_main, runs, run_folder, random_checkpoint):
    training = {"epochs": 3, "recipe": {"epochs": 5}, "best": True}
    best = replace(load_checkpoint(random_checkpoint(seed=1, classes=3)), name="flowers", training=training)
    save_checkpoint(run_folder / "best.safetensors", replace(best, accuracy=ACCURACY | {"top1": 93.2}))
    hint = "the last epoch's, 91.40 %; --best takes the best epoch's, 93.20 %"
    assert hint in runs.start(run_folder, script="train/publish.py").wait().output
    code, out, err = call_main(publish.main, run_folder, "--best")
    assert (code, err) == (0, "")
    assert "--best" not in out and "confusion.png" not in out
    assert (load_checkpoint(run_folder / "hub").state_dict["head.weight"] == best.state_dict["head.weight"]).all()
    card = (run_folder / "hub" / "README.md").read_text()
    assert "The weights after epoch 3 of 5, the best one on the held-out pictures." in card
    assert "Written by the run" not in card and "(curves.png)" in card


def test_timm_opens_the_folder_of_an_imagenet_shape(call_main, picture, tmp_path):
    config = replace(MODELS["convmixer_768_32"].config, num_classes=5)
    ours, labels = network(**config.to_dict()), ("daisy", "poppy", "rose", "tulip", "violet")
    preprocessing = Preprocessing(70, 0.9, "bilinear", (0.5, 0.45, 0.4), (0.25, 0.2, 0.3))
    checkpoint = Checkpoint("flowers", config, ours.state_dict(), labels, preprocessing, {}, {"top1": 50.0})
    save_checkpoint(tmp_path / "model.safetensors", checkpoint)
    (tmp_path / "private.png").write_bytes(b"of somebody else")
    hub = tmp_path / "deep" / "hub"
    assert call_main(publish.main, tmp_path / "model.safetensors", "--folder", hub)[0] == 0
    assert {path.name for path in hub.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    model = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    prepared = transform(picture(120, 90))[None]
    torch.testing.assert_close(prepared[0].numpy(), preprocess(picture(120, 90), preprocessing), rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(model(prepared), ours(prepared))
    assert model.pretrained_cfg["label_names"] == list(labels)
    card = ModelCard.load(hub / "README.md")
    assert (card.data.library_name, card.data.eval_results) == ("timm", None)  # nobody knows 50 % of what
    assert 'timm.create_model("local-dir:.", pretrained=True)' in card.text and ".png" not in card.text


def test_the_upload_creates_the_repository_and_commits_every_file(call_main, hub, run_folder):
    (run_folder / "hub").mkdir()
    (run_folder / "hub" / "notes.txt").write_text("of somebody else")
    code, out, err = call_main(publish.main, run_folder, "--to", f"hf:{REPO}", "--private")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"{hub.url}/{REPO}"
    paths = ("/api/repos/create", f"/api/models/{REPO}/commit/main")
    (token, (created,)), (_, (_, *commit)) = (hub.requests[path] for path in paths)
    assert token == "Bearer hf_test"
    assert (created["organization"], created["name"], created["visibility"]) == ("ada", "flowers", "private")
    files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in commit}
    assert files == {path.name: path.read_bytes() for path in (run_folder / "hub").iterdir() if path.suffix != ".txt"}
    assert f"python -m convmixer classify IMAGE --model hf:{REPO}\n" in files["README.md"].decode()


@pytest.mark.parametrize(
    ("refusals", "token", "part"),
    [
        ({"/api/repos/create": 401, f"/api/models/{REPO}": 404}, "hf_test", "refused the token (401); it needs"),
        ({"/api/repos/create": 409}, "hf_test", f"{REPO} exists and is public"),
        ({"/api/repos/create": 500}, "hf_test", "500"),
        ({}, "", "run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_an_upload_that_fails_is_one_line(call_main, hub, run_folder, monkeypatch, refusals, token, part):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.is_private, hub.refusals = False, refusals
    code, _, err = call_main(publish.main, run_folder, "--to", f"hf:{REPO}", "--private")
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{run_folder / 'hub'} is written but not uploaded: " in err and part in err
    assert load_checkpoint(run_folder / "hub" / "model.safetensors").name == "flowers"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "--to", "flowers"], "--to flowers: it must be hf:USER/NAME"),
        (["run", "--to", "hf:ada/größe"], "ada/größe"),
        (["run", "--folder", "run"], "the run itself"),
        (["nowhere"], "no nowhere"),
        (["empty"], "holds no model.safetensors"),
        (["run/model.safetensors", "--best"], "--best is for a run folder"),
        (["bare.safetensors"], "bare.safetensors: holds tensors alone"),
        (["run"], "the front matter of README.md is no YAML"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(call_main, run_folder, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_file(load_file(run_folder / "model.safetensors"), tmp_path / "bare.safetensors")
    (run_folder / "README.md").write_text("---\nlicense: [mit\n---\ntext\n")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call_main(publish.main, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert part in err
    assert sorted(tmp_path.rglob("*")) == before
