"""train/publish.py: the repository folder as timm and this project open it, and the requests of the upload."""

import base64
import hashlib
import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from convmixer import Checkpoint, Classifier, Preprocessing, build, load_checkpoint, save_checkpoint
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
    (folder / "metrics.csv").write_text("epoch,lr\n1,0.1\n")
    (folder / "recipe.json").write_text('{"epochs": 1}\n')
    (folder / "last.pt").write_bytes(b"not to be published")
    for name in ("curves.png", "confusion.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    card = "---\nlicense: mit\ntags: [flowers]\nlibrary_name: other\n---\n# Flowers\n\nWritten by the run: größer.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


@pytest.fixture
def command(call_main):
    """A function that runs train/publish.py in this process; gives (code, stdout, stderr)."""

    def call(*arguments: object):
        return call_main(publish.main, *arguments)

    return call


class Hub(ThreadingHTTPServer):
    """The requests of an upload as the Hub answers them; ``requests`` has (method, path, JSON body or bytes) of each.

    refusals: status codes by path, in place of an answer. lfs: large files are sent by themselves, not in the commit.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.refusals, self.tokens = [], {}, set()
        self.lfs, self.repo_is_private = False, True

    def bodies(self, path: str) -> list:
        return [body for _, requested, body in self.requests if requested == path]


class HubHandler(BaseHTTPRequestHandler):
    def answer(self):
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Type", "").startswith("application/x-ndjson"):
            body = [json.loads(line) for line in body.splitlines()]
        elif body and not path.startswith("/lfs/"):
            body = json.loads(body)
        hub.requests.append((self.command, path, body))
        if path in hub.refusals:
            return self.send(hub.refusals[path], {"error": "no", "url": f"{hub.url}/{REPO}"})
        answers = {
            "/api/repos/create": lambda: {"url": f"{hub.url}/{REPO}"},
            "/api/validate-yaml": lambda: {"errors": [], "warnings": []},
            f"/api/models/{REPO}": lambda: {"id": REPO, "private": hub.repo_is_private},
            f"/api/models/{REPO}/preupload/main": lambda: {"files": [self.upload_mode(file) for file in body["files"]]},
            f"/{REPO}.git/info/lfs/objects/batch": lambda: {"objects": [self.lfs_upload(o) for o in body["objects"]]},
            f"/api/models/{REPO}/commit/main": lambda: {
                "commitUrl": f"{hub.url}/{REPO}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
            },
        }
        if path.startswith("/lfs/"):
            return self.send(200, {})
        if path not in answers:
            return self.send(404, {"error": path})
        hub.tokens.add(self.headers["Authorization"])
        return self.send(200, answers[path]())

    do_GET = do_POST = do_PUT = answer

    def upload_mode(self, file: dict) -> dict:
        large = self.server.lfs and file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def lfs_upload(self, wanted: dict) -> dict:
        return wanted | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}

    def send(self, status: int, content: dict):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def upload(python, tmp_path):
    """A function that publishes in a process of its own, to the Hub at ``endpoint``; gives the finished process."""

    def call(endpoint: str, *arguments: object, **variables: str):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"} | variables
        return python("train/publish.py", *arguments, env=env)

    return call


def test_the_repository_of_a_run(command, run_folder, picture):
    code, out, err = command(run_folder)
    names = ["model.safetensors", "config.json", "README.md", "metrics.csv", "recipe.json"]
    names += ["confusion.png", "curves.png"]
    folder = run_folder / "hub"
    assert (code, out, err) == (0, f"{folder}: {', '.join(names)}\n", "")
    assert {path.name for path in folder.iterdir()} == set(names)
    for name in set(names) - {"config.json", "README.md"}:
        assert (folder / name).read_bytes() == (run_folder / name).read_bytes()

    config = json.loads((folder / "config.json").read_text())
    checkpoint = load_checkpoint(folder / "model.safetensors")
    assert config["architecture"] == checkpoint.config.to_dict()
    assert config["labels"] == ["label 0", "label 1", "label 2"]
    assert Preprocessing.from_dict(config["preprocessing"]) == checkpoint.preprocessing
    assert Classifier(str(folder / "model.safetensors")).classify(picture())[0].label in config["labels"]


def test_the_card_joins_what_was_measured_with_the_runs_own_text(command, run_folder):
    assert command(run_folder)[0] == 0
    card = ModelCard.load(run_folder / "hub" / "README.md")
    assert (card.data.library_name, card.data.license, card.data.model_name) == ("convmixer", "mit", "flowers")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.tags == ["image-classification", "convmixer", "flowers"]
    results = [(r.task_type, r.dataset_name, r.metric_name, r.metric_value) for r in card.data.eval_results]
    assert results == [
        ("image-classification", ACCURACY["data"], "top-1 (%)", 91.4),
        ("image-classification", ACCURACY["data"], "top-5 (%)", 99.72),
    ]
    assert card.text.strip().startswith("# Flowers\n\nWritten by the run: größer.\n")
    assert card.text.count("---") == 0
    assert "python -m convmixer classify IMAGE --model model.safetensors\n" in card.text
    assert "hf:" not in card.text  # it has no name yet


def test_the_best_epoch_is_offered_and_published(command, run_folder, random_checkpoint):
    training = {"epochs": 3, "recipe": {"epochs": 5}, "best": True}
    best = replace(load_checkpoint(random_checkpoint(seed=1, classes=3)), name="flowers", training=training)
    best = replace(best, accuracy=ACCURACY | {"top1": 93.2})
    save_checkpoint(run_folder / "best.safetensors", best)
    (run_folder / "metrics.csv").write_text("epoch,held_out_top1\n3,93.2\n5,91.4\n")
    code, out, err = command(run_folder)
    assert (code, err) == (0, "")
    assert "the last epoch's, 91.40 %; --best takes the best epoch's, 93.20 %" in out
    code, out, err = command(run_folder, "--best")
    assert (code, err) == (0, "")
    assert "--best" not in out and "confusion.png" not in out
    published = load_checkpoint(run_folder / "hub")
    assert (published.state_dict["head.weight"] == best.state_dict["head.weight"]).all()
    card = (run_folder / "hub" / "README.md").read_text()
    assert "The weights after epoch 3 of 5, the best one on the held-out pictures." in card
    assert "Written by the run" not in card and "(curves.png)" in card


def test_a_file_alone_gets_a_short_card(command, random_checkpoint, tmp_path):
    model = random_checkpoint(classes=25)
    training = {"data": "pictures of letters", "epochs": 3, "finished": False}
    save_checkpoint(model, replace(load_checkpoint(model), training=training, accuracy={"top1": 50.0}))
    (tmp_path / "private.png").write_bytes(b"of somebody else")
    code, _, err = command(model, "--folder", tmp_path / "deep" / "folder")
    assert (code, err) == (0, "")
    folder = tmp_path / "deep" / "folder"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None  # nobody knows what the 50 % were measured on
    for part in (
        "# random",
        "ConvMixer-16/2",
        "| 25: label 0,",
        "label 19, and 5 more",
        "| data | pictures of letters |",
        "not finished",
    ):
        assert part in card.text
    assert ".png" not in card.text  # there are none
    assert "How to use it" not in card.text  # of a run folder


def test_timm_opens_the_folder_of_an_imagenet_shape(command, picture, tmp_path):
    torch.manual_seed(0)
    config = replace(MODELS["convmixer_768_32"].config, num_classes=5)
    network = build(config).eval()
    preprocessing = Preprocessing(70, 0.9, "bilinear", (0.5, 0.45, 0.4), (0.25, 0.2, 0.3))
    labels = ("daisy", "poppy", "rose", "tulip", "violet")
    checkpoint = Checkpoint("flowers", config, network.state_dict(), labels, preprocessing, {}, ACCURACY)
    save_checkpoint(tmp_path / "model.safetensors", checkpoint)
    assert command(tmp_path / "model.safetensors")[0] == 0

    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    data_config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data_config)
    assert data_config["input_size"] == [3, 70, 70]
    image = picture(120, 90)
    expected = torch.from_numpy(preprocess(image, preprocessing)[None])
    prepared = transform(image)[None]
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(model(expected), network(expected))
    assert model.pretrained_cfg["label_names"] == list(labels)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.library_name == "timm"
    assert 'timm.create_model("local-dir:.", pretrained=True)' in card.text


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if not entry.shipped])
def test_the_shapes_that_timm_knows(name):
    config = MODELS[name].config
    assert publish.timm_architecture(config) == name
    assert publish.timm_architecture(replace(config, num_classes=2)) == name
    assert publish.timm_architecture(replace(config, depth=3)) is None
    other = "gelu" if config.activation == "relu" else "relu"
    assert publish.timm_architecture(replace(config, activation=other)) is None


def test_the_upload_creates_the_repository_and_commits_every_file(upload, hub, run_folder):
    (run_folder / "hub").mkdir()
    (run_folder / "hub" / "notes.txt").write_text("of somebody else")
    result = upload(hub.url, run_folder, "--to", f"hf:{REPO}", "--private")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1] == f"{hub.url}/{REPO}"
    assert hub.tokens == {"Bearer hf_test"}
    (created,) = hub.bodies("/api/repos/create")
    assert (created["organization"], created["name"], created["visibility"]) == ("ada", "flowers", "private")
    names = {path.name for path in (run_folder / "hub").iterdir()} - {"notes.txt"}
    (asked,) = hub.bodies(f"/api/models/{REPO}/preupload/main")
    assert {file["path"] for file in asked["files"]} == names
    (commit,) = hub.bodies(f"/api/models/{REPO}/commit/main")
    files = {line["value"]["path"]: line["value"]["content"] for line in commit if line["key"] == "file"}
    assert files.keys() == names
    for name, content in files.items():
        assert base64.b64decode(content) == (run_folder / "hub" / name).read_bytes()
    card = base64.b64decode(files["README.md"]).decode()
    assert f"python -m convmixer classify IMAGE --model hf:{REPO}\n" in card


def test_large_files_go_ahead_of_the_commit(upload, hub, run_folder):
    hub.lfs = True
    result = upload(hub.url, run_folder, "--to", f"hf:{REPO}", HF_HUB_DISABLE_XET="1")
    assert result.returncode == 0, result.stderr
    model = (run_folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(model).hexdigest()
    assert hub.bodies(f"/lfs/{digest}") == [model]
    (commit,) = hub.bodies(f"/api/models/{REPO}/commit/main")
    (pointer,) = (line["value"] for line in commit if line["key"] == "lfsFile")
    assert (pointer["path"], pointer["oid"], pointer["size"]) == ("model.safetensors", digest, len(model))
    (created,) = hub.bodies("/api/repos/create")
    assert "visibility" not in created  # it is the account's own default


def assert_failed_with_the_folder_written(result, run_folder, *parts: str) -> None:
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{run_folder / 'hub'} is written but not uploaded: " in result.stderr
    assert all(part in result.stderr for part in parts), result.stderr
    assert load_checkpoint(run_folder / "hub" / "model.safetensors").name == "flowers"


@pytest.mark.parametrize(
    ("path", "status", "parts"),
    [
        ("/api/repos/create", 401, ["refused the token (401)", REPO]),
        (f"/api/models/{REPO}/commit/main", 403, ["refused the token (403)", REPO]),
    ],
)
def test_a_refusal_is_one_line(upload, hub, run_folder, path, status, parts):
    hub.refusals = {path: status, f"/api/models/{REPO}": 404}
    result = upload(hub.url, run_folder, "--to", f"hf:{REPO}")
    assert_failed_with_the_folder_written(result, run_folder, hub.url, *parts)


def test_a_public_repository_does_not_take_a_private_upload(upload, hub, run_folder):
    hub.repo_is_private = False
    hub.refusals = {"/api/repos/create": 409}  # it exists
    result = upload(hub.url, run_folder, "--to", f"hf:{REPO}", "--private")
    assert_failed_with_the_folder_written(result, run_folder, f"{REPO} exists and is public")
    assert not hub.bodies(f"/api/models/{REPO}/commit/main")


def test_no_network_is_one_line(upload, hub, run_folder):
    hub.shutdown()
    hub.server_close()  # nobody listens there any more
    result = upload(hub.url, run_folder, "--to", f"hf:{REPO}")
    assert_failed_with_the_folder_written(result, run_folder, hub.url, "onnect")


def test_no_token_is_one_line(upload, hub, run_folder):
    result = upload(hub.url, run_folder, "--to", f"hf:{REPO}", HF_TOKEN="")
    assert_failed_with_the_folder_written(result, run_folder, "hf auth login", "HF_TOKEN")
    assert not hub.requests


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["RUN", "--to", "flowers"], ["--to flowers", "hf:USER/NAME"]),
        (["RUN", "--to", "hf:flowers"], ["hf:flowers", "hf:USER/NAME"]),
        (["RUN", "--to", "hf:ada/a--b"], ["ada/a--b"]),
        (["RUN", "--to", "hf:ada/größe"], ["ada/größe"]),
        (["RUN", "--folder", "RUN"], ["the run itself"]),
        (["nowhere"], ["no nowhere"]),
        (["EMPTY"], ["holds no model.safetensors"]),
        (["RUN/metrics.csv"], ["metrics.csv", "safetensors"]),
        (["BARE"], ["bare.safetensors", "tensors alone"]),
        (["NAN"], ["nan.safetensors", "head.bias"]),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(command, run_folder, tmp_path, arguments, parts):
    places = {"RUN": run_folder, "RUN/metrics.csv": run_folder / "metrics.csv", "EMPTY": tmp_path / "empty"}
    places |= {"BARE": tmp_path / "bare.safetensors", "NAN": tmp_path / "nan.safetensors"}
    places["EMPTY"].mkdir()
    with safe_open(run_folder / "model.safetensors", framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, places["BARE"])
    save_file(tensors | {"head.bias": torch.full((3,), torch.nan)}, places["NAN"], metadata)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(*(places.get(word, word) for word in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert "Traceback" not in err
    assert all(part in err for part in parts), err
    assert sorted(tmp_path.rglob("*")) == before


def test_front_matter_that_is_no_yaml_is_named(command, run_folder):
    for broken in ("---\nlicense: [mit\n---\ntext\n", "---\njust words\n---\ntext\n"):
        (run_folder / "README.md").write_text(broken)
        code, _, err = command(run_folder)
        assert (code, err.count("\n")) == (2, 1)
        assert "front matter of README.md" in err


def test_cards_are_split_where_the_front_matter_ends():
    assert publish.split_card("# Title\n---\nnot: metadata\n---\n") == ({}, "# Title\n---\nnot: metadata\n---\n")
    assert publish.split_card("---\n---\ntext\n") == ({}, "text\n")
    assert publish.split_card("---\r\na: 1\r\n---\r\ntext\r\n---\r\nb\r\n") == ({"a": 1}, "text\n---\nb\n")
