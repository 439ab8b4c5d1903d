"""demo/guard.py before the real page: whatever a request says, only uploads are opened, and no host is called."""

import os
import re
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import demo_client
import gradio as gr
import pytest
from conftest import ROOT
from demo_client import SECOND, SHIPPED, Served, png, value
from file_server import FileServer, Resource

from convmixer import Classifier
from demo import guard

served, client = demo_client.FIXTURES
META = {"_type": "gradio.FileData"}
DATA_URL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(scope="module")
def web(served) -> Iterator[FileServer]:
    """Another server, which must not be asked for its picture; the same lies outside the uploads, with links to it."""
    picture, folder = served.outside / "secret.png", served.uploads / ("0" * 64)
    picture.write_bytes(png(9))
    (folder / "folder").mkdir(parents=True)
    (folder / "link.png").symlink_to(picture)
    (served.uploads / ("1" * 64)).symlink_to(served.outside)
    with FileServer() as server:
        server.resources["/secret.png"] = Resource(picture.read_bytes())
        yield server


@pytest.fixture
def untouched(served, web) -> Iterator[None]:
    """During the test no secret is opened, no file appears among the uploads, and no host is called."""
    before = served.uploaded()
    with served.witness as witness:
        yield
    assert not [path for path in witness.files if re.search(r"\boutside\b|/etc/passwd", path)]
    assert (witness.calls, web.requests) == ([], [])
    assert served.uploaded() == before


def expect_refusal(answer) -> None:
    assert answer.status_code == 500 or "event: error" in answer.text or '"success":false' in answer.text, answer
    assert guard.REFUSAL in answer.text, answer
    assert not re.search(r"Traceback|site-packages", answer.text), answer


# Uploads.


@pytest.mark.parametrize("route", ["run", "api", "call", "queue"])
def test_over_every_route_uploads_are_answered_and_nothing_else_is(served, client, web, route):
    secret = str(served.outside / "secret.png")
    lies = {"url": web.url("/secret.png"), "is_stream": True, "size": -1, "orig_name": 7, "meta": "x"}
    path, best = client.upload("a cat (1).png", png(1)), Classifier(SHIPPED).classify(png(1), 1)[0].label
    with served.witness as witness:
        for payload in ({"path": path}, {"path": path, "meta": META}, {"path": path} | lies):
            answer = client.ask("classify", payload, "auto", 1, route=route)
            assert re.search(f'"label": ?"{best}"', answer.text), answer.text
        for wrong in (secret, web.url("/secret.png"), "https://secret.invalid/"):
            expect_refusal(client.ask("classify", {"path": wrong, "meta": META}, "auto", 5, route=route))
    assert (witness.calls, web.requests) == ([], []) and secret not in witness.files


NAMES = {
    "../../etc/passwd": "passwd",
    "cat\n\u202egnp.exe": "cat??gnp.exe",
    "猫 \ud800.png": "猫 ?.png",
    "x" * 500 + ".png": "…" + "x" * 95 + ".png",
}


def test_a_name_is_kept_but_fit_to_be_shown(client):
    path = client.upload("stored.png", b"x")
    for given, shown in NAMES.items():
        answer = client.ask("classify", {"path": path, "orig_name": given}, "auto", 5)
        assert f'"{shown} cannot be read as a picture' in answer.text


@pytest.mark.parametrize("name", ["../../../evil.txt", "/etc/evil", "a\0b", "%2e%2e%2fevil", "x" * 400])
def test_an_upload_cannot_leave_its_folder(served, client, name):
    path = Path(client.upload(name, png(1)))
    assert path.parent.parent == served.uploads and path.resolve() == path
    assert client.file(str(path)).content == png(1)
    same = f"{path.parent}/../{path.parent.name}//./{path.name}"
    assert value(client.ask("classify", {"path": same}, "auto", 5))["model"] == SHIPPED


def test_a_file_over_the_limit_is_refused(served, client):
    before = served.uploaded()
    response = client.http.post("/gradio_api/upload", files={"files": ("a.png", bytes(20 * 2**20 + 1))})
    assert response.status_code == 413 and served.uploaded() == before


# Anything else.


def foreign_paths(served: Served, web: FileServer) -> list[object]:
    secret, folder = str(served.outside / "secret.png"), served.uploads / ("0" * 64)
    inside = (folder, folder / "folder", folder / "link.png", folder / "gone.png", folder / ("x" * 600), served.uploads)
    return [
        *map(str, inside),
        str(served.uploads / ("1" * 64) / "secret.png"),
        secret,
        os.path.relpath(secret, os.getcwd()),
        f"{folder}/../../outside/{served.outside.name}/secret.png",
        f"{folder}/link\0.png",
        f"{folder}/link\ud800.png",
        urllib.parse.quote(secret, safe=""),
        f"file://{secret}",
        "/proc/self/environ",
        DATA_URL,
        web.url("/secret.png"),
        "https://huggingface.co/secret.png",  # gradio trusts this host more than others
        None,
        7,
        [secret],
        {"path": secret, "meta": META},
    ]


def test_a_foreign_path_is_refused_in_any_form(served, client, web, untouched):
    for path in foreign_paths(served, web):
        expect_refusal(client.ask("classify", {"path": path, "meta": META}, "auto", 5))
    secret, address = str(served.outside / "secret.png"), web.url("/secret.png")
    for form in (
        {"path": secret, "url": address, "orig_name": "cat.png", "is_stream": True, "meta": META},
        {"path": address, "is_stream": True},
        {"path": None, "url": DATA_URL, "meta": META},
        {"url": address},
    ):
        expect_refusal(client.ask("classify", form, "auto", 5))
        expect_refusal(client.ask("classify", None, {"a": [{"b": [None, form | {"path": secret}]}]}, 5))


def test_every_input_of_every_event_is_guarded(served, client, untouched):
    """And what an event says of itself, such as which example was pressed."""
    secret = {"path": str(served.outside / "secret.png"), "meta": META}
    events = {tuple(event["inputs"]): event["id"] for event in client.events}  # one for each list of inputs
    assert len(events) > 10
    for inputs, event in events.items():
        for place in range(len(inputs)):
            expect_refusal(client.ask(event, *(secret if number == place else None for number in range(len(inputs)))))
        expect_refusal(client.ask(event, *[None] * len(inputs), event_data={"name": [secret]}))


def test_an_input_that_the_guard_would_not_hold_is_an_error():
    with gr.Blocks(analytics_enabled=False) as unknown:
        gallery = gr.Gallery()
        gallery.change(lambda value: None, gallery)
    with gr.Blocks(analytics_enabled=False) as replaced:
        image = gr.Image()
        image.change(lambda value: gr.Image(label="another"), image, image)
    for blocks, words in (
        (unknown, r"gr\.Gallery can hold files"),
        (replaced, "an event gives a visitor another gr.Image"),
    ):
        with pytest.raises(TypeError, match=words):
            guard.guard(blocks)


def test_a_very_deep_payload_harms_nobody(client, untouched):
    text = '{"data": [' + '{"a": [' * 5000 + "1" + "]}" * 5000 + "]}"
    response = client.http.post("/gradio_api/run/classify", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422, 500) and "Traceback" not in response.text
    assert value(client.ask("models")) == [SHIPPED, SECOND]


# Other routes.


def test_no_file_of_the_server_is_served(served, client, web, untouched):
    for path in foreign_paths(served, web):
        if isinstance(path, str) and path.isprintable():
            for route in ("file=", "file/", "proxy="):
                for method in ("GET", "HEAD"):
                    address = f"/gradio_api/{route}{urllib.parse.quote(path, safe='')}"
                    assert client.http.request(method, address).status_code in (403, 404), address


# They fetch any address, run ffmpeg, change the app, or show what others ask.
CLOSED = """
/gradio_api/proxy=https://huggingface.co/x /gradio_api/process_recording /gradio_api/stream/1 /gradio_api/deep_link
/gradio_api/component_server /gradio_api/custom_component/1/client/a/b.js /gradio_api/runs /gradio_api/dev/reload
/gradio_api/vibe-edit /gradio_api/vibe-code /gradio_api/user /gradio_api/token /gradio_api/file/x
/monitoring /monitoring/x /login /logout /pwa_icon
"""


def test_other_routes_of_gradio_are_closed(client, untouched):
    for address in CLOSED.split():
        for form in (address, "/" + address, address + "/", address.replace("=", "%3D"), address.upper()):
            for method in ("GET", "POST"):
                assert client.http.request(method, client.url + form).status_code == 404, (method, form)


def test_errors_and_descriptions_tell_nothing_of_the_server(served, client):
    post, get = client.http.post, client.http.get
    answers = [get(path) for path in ("/", "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/nothing")]
    json = {"Content-Type": "application/json"}
    answers += [post("/gradio_api/run/classify", content=body, headers=json) for body in ("{", "[]", '{"data": 7}')]
    answers += [post(f"/gradio_api/{path}", json={"data": []}) for path in ("run/no", "call/no", "call/classify")]
    answers += [post("/gradio_api/queue/join", json={"data": [], "fn_index": index}) for index in (None, -1, 999)]
    answers += [post("/gradio_api/upload", content=b"x"), post("/gradio_api/upload", files={"files": ("..", b"x")})]
    for answer in answers:
        for secret in ("Traceback", "site-packages", str(ROOT), str(served.outside.parent)):
            assert secret not in answer.text.replace(str(served.uploads), "UPLOADS")


def test_no_visitor_chooses_the_address_that_others_are_shown(served, client):
    served.page.app.api_info = None  # as before the first request
    for path in ("/gradio_api/info", "/gradio_api/openapi.json", "/config", "/"):
        client.http.get(path, headers={"X-Forwarded-Host": "canary.invalid"})
        assert "canary.invalid" not in client.http.get(path).text


def test_the_progress_of_an_upload_that_is_not_there_is_done(client):
    """Gradio answers 404 after three seconds, which browsers report as an error."""
    answer = client.http.get("/gradio_api/upload_progress?upload_id=nothing")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/event-stream"
    assert answer.text == 'data: {"msg": "done"}\n\n'


# Afterwards.


def test_the_oldest_files_go_first_where_there_are_too_many(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(bytes(100))
        time.sleep(0.02)  # the clock of the file system is coarse
    for limit, left in ((400, ["0.png", "1.png", "2.png", "3.png"]), (250, ["0.png", "2.png", "3.png"])):
        guard.delete_old_files(str(tmp_path), 3600, limit, {str(tmp_path / "0.png")})
        assert sorted(path.name for path in tmp_path.iterdir()) == left


def test_old_uploads_and_empty_folders_go(served, client):
    """The last test: nothing is left of the others."""
    old = Path(client.upload("old.png", png(1)))
    os.utime(old, (time.time() + 9999,) * 2)  # as a copy of something else
    (served.uploads / "broken-upload").write_bytes(b"x")
    guard.start_deleting(served.page, age=0.2, every=0.05)
    end = time.monotonic() + 60
    while any(served.uploads.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert [*served.uploads.iterdir()] == [] and (served.outside / "secret.png").exists()
