"""What programs ask the demo: its named end points, its snippets, camera frames, previews of links, and tools (MCP)."""

import asyncio
import base64
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import demo_client
import numpy as np
import pytest
from conftest import ROOT
from demo_client import HAS_MCP, SECOND, SHIPPED, Client, draw, encode, png, value
from PIL import Image

from convmixer import Classifier
from demo import api, guard, live

served, client = demo_client.FIXTURES


@pytest.fixture(scope="module")
def dog(tmp_path_factory) -> Path:
    """Some picture, called dog.jpg as in the snippets."""
    path = tmp_path_factory.mktemp("pictures") / "dog.jpg"
    draw(1, 160, 120).save(path)
    return path


def ask(client: Client, end_point: str, path: Path | None, *inputs):
    """The answer, or the text of the error."""
    image = path and {"path": client.upload(path.name, path.read_bytes())}
    return value(client.ask(end_point, image, *inputs, route="call"))


def test_the_end_points_give_the_classifiers_answers(client, dog):
    classifier = Classifier(SHIPPED)
    answer, expected = ask(client, "classify", dog, "auto", 3), classifier.classify(dog, 3)
    assert answer["model"] == SHIPPED and answer["seconds"] > 0
    assert [(p["label"], p["index"]) for p in answer["predictions"]] == [(p.label, p.index) for p in expected]
    assert [p["score"] for p in answer["predictions"]] == pytest.approx([p.score for p in expected], abs=1e-6)
    for label, index in (("ship", classifier.labels.index("ship")), ("", None)):
        drawn = client.file(ask(client, "heatmap", dog, "auto", label)["path"]).content
        overlay = classifier.heatmap(dog, index).overlay()
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")), np.asarray(overlay))
    assert value(client.ask("models")) == [SHIPPED, SECOND]


@pytest.mark.parametrize(
    ("end_point", "inputs", "sentence"),
    [
        ("classify", ("convmixer_768_32", 5), "is not on this machine; choose one of convmixer_256_8_cifar10"),
        ("classify", ("auto", 0), "top_k is 0; it must be a whole number from 1 to 1000"),
        ("classify", ("auto", 1001), "top_k is 1001; it must be"),
        ("classify", (), "This does not fit; the inputs are image, model, top_k, in this order"),
        ("heatmap", ("auto", "unicorn"), f"{SHIPPED} has no class 'unicorn'; it has airplane, automobile, .*truck$"),
    ],
)
def test_wrong_inputs_get_one_sentence(client, dog, end_point, inputs, sentence, capfd):
    assert re.search(sentence, ask(client, end_point, dog, *inputs))
    assert capfd.readouterr() == ("", "")  # of the server, which runs in this process


def test_a_broken_picture_and_none_get_one_sentence(client, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for end_point, last in (("classify", 5), ("heatmap", "")):
        sentence = ask(client, end_point, broken, "auto", last)
        assert sentence.startswith("broken.png begins like PNG but is damaged") and "/" not in sentence
        assert ask(client, end_point, None, "auto", last) == "there is no image; upload one first"


def test_only_the_named_end_points_are_described(client):
    described = client.http.get("/gradio_api/info").json()
    assert set(described["named_endpoints"]) == {"/classify", "/heatmap", "/models"}


@pytest.mark.parametrize("language", ["Python", "shell", "Node"])
def test_a_snippet_runs_as_it_stands(client, dog, language):
    """CONVMIXER_NODE_MODULES names a folder in which npm has installed @gradio/client."""
    modules = Path(os.environ.get("CONVMIXER_NODE_MODULES", ROOT / "node_modules"))
    if language == "Node":
        if not shutil.which("node") or not (modules / "@gradio" / "client").is_dir():
            pytest.skip("there is no Node with @gradio/client (CONVMIXER_NODE_MODULES names its node_modules)")
        (dog.parent / "node_modules").symlink_to(modules)
        (dog.parent / "ask.mjs").write_text(api.JAVASCRIPT.replace(api.PLACE, client.url))
    command = {
        "Python": [sys.executable, "-c", api.PYTHON.replace(api.PLACE, client.url)],
        "shell": ["bash", "-c", api.CURL.replace(api.PLACE, client.url)],
        "Node": ["node", "ask.mjs"],
    }[language]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"}
    run = subprocess.run(command, cwd=dog.parent, capture_output=True, text=True, timeout=200, env=environment)
    assert run.returncode == 0, run.stderr
    assert Classifier(SHIPPED).classify(dog, 1)[0].label in run.stdout


# The camera's frames, and links.


def test_a_frame_is_answered_or_told_why_not(client):
    best = Classifier(SHIPPED).classify(png(1), 1)[0].label
    assert f'<span class="label">{best}</span>' in client.http.post("/live", content=png(1)).json()["bars"]
    wrong = (("auto", b"", "is empty"), ("nonsense", png(1), "is not on this machine"))
    for model, frame, words in (*wrong, ("auto", bytes(live.MAX_BYTES + 1), "too large")):
        answer = client.http.post("/live", params={"model": model}, content=frame).json()
        assert words in answer["problem"] and answer.keys() == {"problem"}
    assert client.http.get("/live").status_code == 405


def test_a_link_shows_this_page_and_not_gradios(client):
    html = client.http.get("/").text
    head = dict(re.findall(r'<meta (?:property|name)="([a-z:]+)" content="([^"]*)"', html))
    assert head["og:title"].startswith("ConvMixer") and head["twitter:card"] == "summary_large_image"
    assert "gradio" not in "".join(re.findall('<meta (?:property|name)="(?:og|twitter)[^>]*>', html)).lower()
    assert head["og:image"] == f"{client.url}/preview.jpg"
    assert client.http.get(head["og:image"]).headers["content-type"] == "image/jpeg"
    assert client.http.get("/favicon.ico").text.startswith("<svg")
    assert client.http.head("/").status_code == 200


# Tools for language models. Without the extra the function that checks their arguments is called as Gradio calls it.


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_a_tools_arguments_are_uploads_only(served, client):
    path = client.upload("a b.png", png(1))
    for text in (path, f"https://any.host/gradio_api/file={path.replace(' ', '%20')}"):
        given = guard._tool_arguments({"image": text, "model": "auto"}, [["image"]])
        assert given["image"]["path"] == path and given["model"] == "auto"
    written = Path(guard._tool_arguments({"image": data_url(png(2))}, [["image"]])["image"]["path"])
    assert written.read_bytes() == png(2) and served.uploads in written.parents


FOREIGN = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": "/etc/hostname"},
        {"image": "http://127.0.0.1:9/a.png"},
        {"image": "http://127.0.0.1:9/gradio_api/file=/etc/hostname"},
        {"image": "data:image/png;base64,A"},
        {"image": "data:image/png;base64," + "A" * (4 * guard.MAX_FILE // 3 + 100)},
        {"image": FOREIGN},
        {"model": [{"deep": FOREIGN}]},
    ],
    ids=lambda arguments: str(arguments)[:60],
)
def test_a_tools_arguments_name_nothing_else(served, arguments):
    before = served.uploaded()
    with served.witness as witness, pytest.raises(ValueError, match="A picture must be a data:image"):
        guard._tool_arguments(arguments, [["image"]])
    assert (served.uploaded(), witness.calls) == (before, []) and "/etc/hostname" not in witness.files


@pytest.mark.skipif(not HAS_MCP, reason="the extra is not installed: pip install 'gradio[mcp]==6.31.0'")
def test_tools_answer_about_uploads_and_open_nothing_else(served, client):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def talk(conversation, query: str = ""):
        stream = streamablehttp_client(f"{client.url}/gradio_api/mcp/{query}")
        async with stream as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await conversation(session)

    def call(tool: str, query: str = "", **arguments: object):
        return asyncio.run(talk(lambda session: session.call_tool(tool, arguments), query))

    found = {tool.name: tool.inputSchema for tool in asyncio.run(talk(lambda session: session.list_tools())).tools}
    assert set(found) == {"classify", "heatmap", "models"} and found["classify"]["required"] == ["image"]
    path, best = client.upload("a.png", png(1)), Classifier(SHIPPED).classify(png(1), 1)[0].label
    for image in (path, f"{client.url}/gradio_api/file={path}", data_url(png(1))):
        answer = call("classify", image=image, top_k=3)
        assert f"[{{'label': '{best}'" in answer.content[0].text, answer
    secret = served.outside / "secret.png"
    secret.write_bytes(encode(draw(3)))
    with served.witness as witness:
        for image in (str(secret), f"http://127.0.0.1:9{secret}", f"{client.url}/gradio_api/file={secret}", FOREIGN):
            assert call("classify", image=image).isError
            # A list of tools without this one, by which nothing is checked.
            assert call("classify", "?tools=models#", image=image).isError
    assert not [path for path in witness.files if "secret" in path or "hostname" in path] and witness.calls == []
