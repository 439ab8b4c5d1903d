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
from demo_client import SECOND, SHIPPED, Client, Served, png
from file_server import FileServer, Resource
from PIL import Image

from convmixer import Classifier
from demo import guard

served = demo_client.served
META = {"_type": "gradio.FileData"}
SIZE = (1237, 1409)  # of the server's own picture
DATA_URL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def client(served) -> Client:
    return served.client


@pytest.fixture(scope="module")
def web(served) -> Iterator[FileServer]:
    """Another server, which must not be asked for its picture; the same lies outside the uploads, with links to it."""
    picture, folder = served.outside / "secret.png", served.uploads / ("0" * 64)
    Image.new("RGB", SIZE).save(picture)
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
    assert answer.status == 500 or "event: error" in answer.text or '"success":false' in answer.text, answer
    assert guard.REFUSAL in answer.text, answer
    assert not re.search(r"\b(1237|1409)\b|Traceback|site-packages", answer.text), answer


# Uploads.


@pytest.mark.parametrize("route", ["run", "api", "call", "queue"])
def test_an_upload_is_answered_whatever_else_is_said_of_it(served, client, web, route):
    path = client.upload("a cat (1).png", png(1))
    lies = {
        "url": web.url("/secret.png"),
        "is_stream": True,
        "size": -1,
        "mime_type": ["x"],
        "orig_name": 7,
        "meta": "x",
    }
    with served.witness as witness:
        for payload in ({"path": path}, {"path": path, "meta": META}, {"path": path} | lies):
            answer = client.ask("classify", payload, "auto", 1, route=route)
            assert f'"label":"{Classifier(SHIPPED).classify(png(1), 1)[0].label}"' in answer.text.replace(": ", ":")
            if route == "queue":
                assert '"success":true' in answer.text
    assert (witness.calls, web.requests) == ([], [])


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (None, "stored.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\cat.png", "cat.png"),
        ("cat\n\u202egnp.exe", "cat??gnp.exe"),
        ("猫 \ud800.png", "猫 ?.png"),
        ("x" * 500 + ".png", "…" + "x" * 95 + ".png"),
    ],
    ids=ascii,
)
def test_a_name_is_kept_but_fit_to_be_shown(client, given, shown):
    answer = client.ask("classify", {"path": client.upload("stored.png", b"x"), "orig_name": given}, "auto", 5)
    assert f'"{shown} cannot be read as a picture' in answer.text


@pytest.mark.parametrize("name", ["../../../evil.txt", "/etc/evil", "a\0b", "%2e%2e%2fevil", "x" * 400])
def test_an_upload_cannot_leave_its_folder(served, client, name):
    path = Path(client.upload(name, png(1)))
    assert path.parent.parent == served.uploads and path.resolve() == path
    assert client.file(str(path)).content == png(1)
    assert client.ask("classify", {"path": f"{path.parent}/../{path.parent.name}//./{path.name}"}, "auto", 5).value


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
        f"{folder}/../../outside/secret.png",
        f"{folder}/link\0.png",
        f"{folder}/link\ud800.png",
        urllib.parse.quote(secret, safe=""),
        f"/gradio_api/file={secret}",
        f"file://{secret}",
        f"{secret}\0.png",
        "\\\\127.0.0.1\\outside\\secret.png",
        "",
        "~",
        "/proc/self/environ",
        DATA_URL,
        web.url("/secret.png"),
        web.url("/secret.png").replace("http:", "HTTP:"),
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
    forms = [
        {"path": secret, "url": address, "orig_name": "cat.png", "is_stream": True, "meta": META},
        {"path": address, "is_stream": True},
        {"path": None, "url": DATA_URL, "meta": META},
        {"url": DATA_URL, "meta": META},
        {"url": address},
    ]
    for form in forms:
        for inputs in ((form, "auto", 5), (None, {"a": [{"b": [None, form | {"path": secret}]}]}, 5)):
            expect_refusal(client.ask("classify", *inputs))


def test_every_input_of_every_event_is_guarded(served, client, untouched):
    """And what an event says of itself, such as which example was pressed."""
    secret = {"path": str(served.outside / "secret.png"), "meta": META}
    events = {tuple(event["inputs"]): event["id"] for event in client.events}  # one for each list of inputs
    assert len(events) > 10
    for inputs, event in events.items():
        for place in range(len(inputs)):
            expect_refusal(client.ask(event, *(secret if number == place else None for number in range(len(inputs)))))
        expect_refusal(client.ask(event, *[None] * len(inputs), event_data={"name": [secret]}))


@pytest.mark.parametrize("route", ["run", "api", "call", "queue"])
def test_every_route_is_guarded(served, client, web, untouched, route):
    for path in (str(served.outside / "secret.png"), web.url("/secret.png"), "https://secret.invalid/"):
        expect_refusal(client.ask("classify", {"path": path, "meta": META}, "auto", 5, route=route))


def test_a_component_that_an_event_has_replaced_is_guarded(served, web):
    with gr.Blocks(analytics_enabled=False) as blocks:
        image, said, button = gr.Image(), gr.Textbox(), gr.Button()
        button.click(lambda: gr.Image(label="another"), None, image, api_name="update")
        button.click(lambda upload: upload.name, image, said, api_name="say")
    guard.guard(blocks)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **guard.launch_options())
    client, session = Client(url), {"session_hash": "updated"}
    assert "another" in client.ask("update", **session).text
    assert client.ask("say", {"path": client.upload("cat.png", png(1))}, **session).value == "cat.png"
    for wrong in ({"path": str(served.outside / "secret.png")}, {"url": web.url("/secret.png")}):
        expect_refusal(client.ask("say", wrong, **session))
    blocks.close(verbose=False)


def test_an_input_that_the_guard_does_not_know_is_an_error():
    with gr.Blocks(analytics_enabled=False) as blocks:
        gallery = gr.Gallery()
        gallery.change(lambda value: None, gallery)
    with pytest.raises(TypeError, match=r"gr\.Gallery can hold files"):
        guard.guard(blocks)


def test_what_does_not_fit_is_one_sentence_and_harms_nobody(client, untouched):
    for data in ([], ["x", "auto", 5], [7, "auto", 5]):
        answer = client.ask("classify", *data, route="call")
        assert "This does not fit; the inputs are image, model, top_k, in this order." in answer.text
    text = '{"data": [' + '{"a": [' * 5000 + "1" + "]}" * 5000 + "]}"
    response = client.http.post("/gradio_api/run/classify", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422, 500) and "Traceback" not in response.text
    assert client.ask("models").value == [SHIPPED, SECOND]


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
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "file").write_bytes(bytes(100))
        time.sleep(0.02)  # the clock of the file system is coarse
    keep = str(tmp_path / "0" / "file")
    for limit, left in ((400, ["0", "1", "2", "3"]), (250, ["0", "3"])):
        guard.delete_beyond(str(tmp_path), limit, {keep})
        assert sorted(path.parent.name for path in tmp_path.rglob("file")) == left


def test_old_uploads_and_empty_folders_go(served, client):
    """The last test: nothing is left of the others but what is younger than the limit."""
    old = Path(client.upload("old.png", png(1)))
    os.utime(old, (time.time() + 9999,) * 2)  # as a copy of something else
    (served.uploads / "broken-upload").write_bytes(b"x")
    guard.start_deleting(served.page, age=0.2, every=0.05)
    end = time.monotonic() + 60
    while any(served.uploads.iterdir()) and time.monotonic() < end:
        time.sleep(0.05)
    assert [*served.uploads.iterdir()] == [] and (served.outside / "secret.png").exists()
    guard.delete_old_files(str(served.uploads / "nothing"), 0)
    young = client.upload("young.png", png(1))
    guard.delete_old_files(str(served.uploads), 3600)
    assert Path(young).exists()
