"""The demo's named end points, asked as its developers' tab says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
from conftest import ROOT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from convmixer import Classifier
from demo import api
from demo.guard import launch_options
from demo.models import Models
from demo.page import LOOKS, build

MODEL = "convmixer_256_8_cifar10"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of the real app."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("CONVMIXER_CACHE", str(tmp_path_factory.mktemp("cache")))
        page = build(Models([MODEL]), {"plain": Image.new("RGB", (40, 30), "teal")}).queue(max_size=20)
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **launch_options() | LOOKS)
        yield url.rstrip("/")
        page.close(verbose=False)


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> Client:
    return Client(server, verbose=False, download_files=str(tmp_path_factory.mktemp("answers")))


@pytest.fixture(scope="module")
def dog(tmp_path_factory) -> Path:
    """Some picture, called dog.jpg as in the snippets."""
    path = tmp_path_factory.mktemp("pictures") / "dog.jpg"
    coarse = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(path)
    return path


def test_classify_gives_the_classifiers_answer(client, dog):
    answer = client.predict(handle_file(dog), "auto", 3, api_name="/classify")
    expected = Classifier(MODEL).classify(dog, 3)
    assert answer["model"] == MODEL and answer["seconds"] > 0
    assert [(p["label"], p["index"]) for p in answer["predictions"]] == [(p.label, p.index) for p in expected]
    assert [p["score"] for p in answer["predictions"]] == pytest.approx([p.score for p in expected], abs=1e-6)


def test_defaults_are_the_default_model_and_five_classes(client, dog):
    answer = client.predict(handle_file(dog), api_name="/classify")
    assert answer["model"] == MODEL and len(answer["predictions"]) == 5


def test_heatmap_is_the_picture_with_the_evidence_over_it(client, dog):
    path = client.predict(handle_file(dog), label="ship", api_name="/heatmap")
    classifier = Classifier(MODEL)
    expected = classifier.heatmap(dog, classifier.labels.index("ship")).overlay()
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(expected))
    best = client.predict(handle_file(dog), api_name="/heatmap")
    assert np.array_equal(np.asarray(Image.open(best).convert("RGB")), np.asarray(classifier.heatmap(dog).overlay()))


def test_models_are_those_on_this_machine(client):
    assert client.predict(api_name="/models") == [MODEL]


@pytest.mark.parametrize(
    "end_point, inputs, sentence",
    [
        ("/classify", {"model": "convmixer_768_32"}, "is not on this machine; choose one of convmixer_256_8_cifar10"),
        ("/classify", {"top_k": 0}, "top_k is 0; it must be a whole number from 1 to 1000"),
        ("/classify", {"top_k": 10**6}, "top_k is 1000000; it must be"),
        ("/classify", {"top_k": 2.5}, "top_k is 2.5; it must be"),
        ("/classify", {"top_k": "many"}, "top_k is 'many'; it must be"),
        ("/classify", {"top_k": [1]}, r"top_k is \[1\]; it must be"),
        ("/classify", {"model": None}, "None is not on this machine; choose one of"),
        ("/heatmap", {"label": "unicorn"}, f"{MODEL} has no class 'unicorn'; it has airplane, automobile, .*truck$"),
    ],
)
def test_wrong_inputs_get_one_sentence(client, dog, end_point, inputs, sentence, capfd):
    with pytest.raises(AppError, match=sentence):
        client.predict(handle_file(dog), api_name=end_point, **inputs)
    assert capfd.readouterr() == ("", "")  # of the server, which runs in this process


@pytest.mark.parametrize("data", [[], ["x", "auto", 5]], ids=["too few", "no file"])
def test_what_does_not_fit_gets_one_sentence(server, data, capfd):
    event = httpx.post(f"{server}/gradio_api/call/classify", json={"data": data}).json()["event_id"]
    answer = httpx.get(f"{server}/gradio_api/call/classify/{event}").text
    assert "This does not fit; the inputs are image, model, top_k, in this order." in answer
    assert capfd.readouterr() == ("", "")


def test_a_broken_picture_and_none_get_one_sentence(client, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for end_point in ("/classify", "/heatmap"):
        with pytest.raises(AppError, match=r"broken\.png begins like PNG but is damaged") as caught:
            client.predict(handle_file(broken), api_name=end_point)
        assert "/" not in str(caught.value)
        with pytest.raises(AppError, match="there is no image; upload one first"):
            client.predict(None, api_name=end_point)


def test_only_the_named_end_points_are_described(server):
    described = httpx.get(f"{server}/gradio_api/info").json()
    assert set(described["named_endpoints"]) == {"/classify", "/heatmap", "/models"}
    assert described["unnamed_endpoints"] == {}
    names = [p["parameter_name"] for p in described["named_endpoints"]["/classify"]["parameters"]]
    assert names == ["image", "model", "top_k"]


def test_the_pages_own_functions_keep_problems_from_raw_requests(server):
    """A made-up event names no example and no model: a sentence in the page's place for problems, and no crash."""
    config = httpx.get(f"{server}/config").json()
    choose = next(each for each in config["dependencies"] if each["targets"] and each["targets"][0][1] == "choose")
    data = [None] * len(choose["inputs"])
    request = {"data": data, "fn_index": choose["id"], "session_hash": "x", "event_data": {"name": "/etc/passwd"}}
    assert httpx.post(f"{server}/gradio_api/queue/join", json=request).status_code == 200
    with httpx.stream("GET", f"{server}/gradio_api/queue/data?session_hash=x", timeout=20) as stream:
        messages = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    (done,) = [message for message in messages if message["msg"] == "process_completed"]
    assert "passwd" not in json.dumps(done) and "Traceback" not in json.dumps(done)


def test_the_python_snippet_runs_as_it_stands(server, dog):
    code = api.PYTHON.replace(api.PLACE, server)
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=dog.parent, capture_output=True, text=True, timeout=100, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert Classifier(MODEL).classify(dog, 1)[0].label in run.stdout and MODEL in run.stdout


def test_the_shell_snippet_runs_as_it_stands(server, dog):
    code = api.CURL.replace(api.PLACE, server)
    run = subprocess.run(["bash", "-c", code], cwd=dog.parent, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    answer = json.loads(next(line for line in run.stdout.splitlines() if line.startswith("data:"))[5:])[0]
    assert answer["predictions"][0]["label"] == Classifier(MODEL).classify(dog, 1)[0].label


def test_the_javascript_snippet_runs_as_it_stands(server, dog):
    """CONVMIXER_NODE_MODULES names a folder in which npm has installed @gradio/client."""
    folder = Path(os.environ.get("CONVMIXER_NODE_MODULES", ROOT / "node_modules"))
    if not shutil.which("node") or not (folder / "@gradio" / "client").is_dir():
        pytest.skip("there is no Node with @gradio/client (CONVMIXER_NODE_MODULES names its node_modules)")
    (dog.parent / "node_modules").symlink_to(folder)
    (dog.parent / "ask.mjs").write_text(api.JAVASCRIPT.replace(api.PLACE, server))
    run = subprocess.run(["node", "ask.mjs"], cwd=dog.parent, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"label: '{Classifier(MODEL).classify(dog, 1)[0].label}'" in run.stdout.splitlines()[1]


def test_the_version_of_gradio_is_the_pinned_one():
    """The guard and the page's looks lean on how this version works inside."""
    pins = (Path(api.__file__).parents[1] / "requirements/demo.txt").read_text()
    assert f"gradio=={gr.__version__}\n" in pins
