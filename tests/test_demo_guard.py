"""demo/guard.py in a real gradio server: whatever a request says, only uploads are opened and no host is called."""

import contextlib
import io
import json
import logging
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import demo_guard_app
import gradio as gr
import httpx
import pytest
from conftest import ROOT
from demo_guard_app import FILE_ENDPOINTS, META, OTHER_ENDPOINTS, Client, Witness
from file_server import FileServer, Resource
from PIL import Image

from demo import guard

SECRET = b"canary-5041 of the server"
SIZE = (1237, 1409)  # of the secret picture
ROUTES = ("run", "api", "predict", "call", "queue")
SEVERAL = ("files", "folder")
DATA_URL = "data:image/png;base64,iVBORw0KGgo="


@dataclass
class Place:
    """The running app, and what it must not touch."""

    client: Client
    witness: Witness
    web: FileServer
    blocks: gr.Blocks
    folder: Path  # gradio's, for uploads
    outside: Path  # with the secrets
    example: Path

    def uploaded(self) -> set[Path]:
        return {path for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    parent = tmp_path_factory.mktemp("guard")
    outside, example = parent / "outside", parent / "example.png"
    outside.mkdir()
    (outside / "secret.txt").write_bytes(SECRET)
    Image.new("RGB", SIZE).save(outside / "secret.png")
    Image.new("RGB", (9, 9), "red").save(example)
    witness = Witness()
    with pytest.MonkeyPatch.context() as patch, FileServer() as web:
        web.resources["/secret.png"] = Resource((outside / "secret.png").read_bytes())
        patch.setenv("GRADIO_TEMP_DIR", str(parent / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.setenv("CANARY", SECRET.decode())
        blocks = demo_guard_app.build(example)
        guard.guard(blocks)
        _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, **guard.launch_options())
        witness.own_port = blocks.server_port
        yield Place(Client(url), witness, web, blocks, parent / "uploads", outside, example)
        blocks.close(verbose=False)
    witness.close()


@pytest.fixture
def client(place) -> Client:
    return place.client


@pytest.fixture
def untouched(place) -> Iterator[None]:
    """During the test no secret is opened or looked for, no file appears among the uploads, and no host is called."""
    before = place.uploaded()
    with place.witness as witness:
        yield
    seen = [Path(os.path.normpath(path)) for path in witness.files if re.search(r"outside|secret\b", path)]
    assert [path for path in seen if place.folder not in path.parents] == []
    assert witness.calls == []
    assert place.web.requests == []
    assert place.uploaded() == before


def expect_nothing(answer, message: bool = True) -> None:
    assert answer.status == 500 or "event: error" in answer.text or '"success":false' in answer.text, answer
    assert (guard.REFUSAL in answer.text) is message, answer
    assert not re.search(r"canary|\b(1237|1409)\b|Traceback|site-packages", answer.text), answer


def picture(size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "PNG")
    return stream.getvalue()


# The witness itself: what it does not see would prove nothing.


def test_the_witness_sees_opens_looks_and_calls(place):
    secret = place.outside / "secret.png"
    with place.witness as witness:
        Image.open(secret).load()
    assert str(secret) in witness.files
    with place.witness as witness:
        assert not os.path.exists(place.outside / "nothing")
    assert str(place.outside / "nothing") in witness.files
    with place.witness as witness, pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:1/", trust_env=False)
    assert ("127.0.0.1", 1) in witness.calls
    with place.witness as witness, pytest.raises(httpx.ConnectError):
        httpx.get("http://nothing.invalid/", trust_env=False)
    assert [call[0] for call in witness.calls] in (["nothing.invalid"], [b"nothing.invalid"])


# Good requests.


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("endpoint", FILE_ENDPOINTS)
def test_an_upload_reaches_the_function(client, endpoint, route):
    path = client.upload("a cat (1).png", picture())
    payload = {"path": path, "orig_name": "A cat #1 ümlaut.png", "meta": META}
    answer = client.ask(endpoint, [payload] if endpoint in SEVERAL else payload, route=route)
    assert answer.status == 200
    assert "A cat #1 " in answer.text
    assert "IHDR" in answer.text


def test_a_file_that_is_no_picture_reaches_the_function_too(client):
    payload = {"path": client.upload("notes.heic", b"no picture"), "meta": META}
    assert client.ask("image", payload).value == "notes.heic: b'no picture'"


@pytest.mark.parametrize("endpoint", SEVERAL)
def test_several_files_reach_the_function_in_their_order(client, endpoint):
    paths = [client.upload(f"{number}.bin", bytes([number])) for number in (3, 1, 2)]
    answer = client.ask(endpoint, [{"path": path, "meta": META} for path in paths])
    assert json.loads(answer.value) == [f"{number}.bin: {bytes([number])!r}" for number in (3, 1, 2)]


@pytest.mark.parametrize("endpoint", FILE_ENDPOINTS)
def test_nothing_stays_nothing(client, endpoint):
    assert client.ask(endpoint, None).value == "None"


def test_no_files_are_an_empty_list(client):
    assert client.ask("files", []).value == "[]"


def test_two_inputs_of_one_event(client):
    one, two = ({"path": client.upload(name, name.encode()), "meta": META} for name in ("one", "two"))
    assert client.ask("two", one, [two, one]).value == """one: b'one' and ["two: b'two'", "one: b'one'"]"""


def test_every_step_of_a_generator_has_the_upload(client):
    payload = {"path": client.upload("steps.bin", b"x"), "meta": META}
    answer = client.ask("steps", payload, route="call")
    assert "2 steps.bin: b'x'" in answer.text
    assert "event: complete" in answer.text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (None, "stored.png"),
        (7, "stored.png"),
        ("", "stored.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\cat.png", "cat.png"),
        ("a\nb\tc\0d.png", "a?b?c?d.png"),
        ("cat\u202egnp.exe", "cat?gnp.exe"),
        ("猫.png", "猫.png"),
        ("\ud800.png", "?.png"),
        ("x" * 500 + ".png", "…" + "x" * 95 + ".png"),
    ],
    ids=ascii,
)
def test_a_name_is_kept_but_fit_to_be_shown(client, given, shown):
    payload = {"path": client.upload("stored.png", b"x"), "orig_name": given, "meta": META}
    assert client.ask("file", payload).value == f"{shown}: b'x'"


@pytest.mark.parametrize("name", ["../../../evil.txt", "/etc/evil", "..\\..\\evil", "a\0b", "%2e%2e%2fevil", "x" * 400])
def test_an_upload_cannot_leave_its_folder(place, client, name):
    path = Path(client.upload(name, b"x"))
    assert path.parent.parent == place.folder
    assert path.resolve() == path
    assert client.ask("file", {"path": str(path)}).value.endswith(": b'x'")


def test_what_an_upload_claims_besides_is_ignored(place, client, request):
    path = client.upload("cat.png", picture())
    request.getfixturevalue("untouched")
    lies = {
        "url": place.web.url("/secret.png"),
        "is_stream": True,
        "size": -1,
        "mime_type": ["x"],
        "orig_name": "cat.png",
    }
    for meta in ({}, {"meta": META}, {"meta": "x"}, {"meta": {"_type": "x"}}, {"meta": None}):
        for route in ("run", "queue"):
            answer = client.ask("image", {"path": path} | lies | meta, route=route)
            assert "cat.png: b" in answer.text and "IHDR" in answer.text


# Bad requests.


def foreign_paths(place: Place) -> list[object]:
    secret, picture = str(place.outside / "secret.txt"), str(place.outside / "secret.png")
    digest = "0" * 64
    return [
        secret,
        picture,
        os.path.relpath(picture, os.getcwd()),
        f"{place.folder}/../outside/secret.png",
        f"{place.folder}/{digest}/../../../outside/secret.png",
        f"{place.folder}/{digest}/secret.png",  # not there
        f"{place.folder}/{digest}/{'secret' * 100}",  # cannot be there
        f"{place.folder}/{digest}/secret\0.png",
        f"{place.folder}/{digest}/secret\ud800.png",
        f"{place.folder}/{digest}/..",
        str(place.folder),
        f"{place.folder}{picture}",
        urllib.parse.quote(picture),
        urllib.parse.quote(picture, safe=""),
        f"/gradio_api/file={picture}",
        f"file://{picture}",
        f"file:{picture}",
        f"{picture}\0",
        f"{picture}\0.png",
        f"{picture}/",
        "//127.0.0.1/outside/secret.png",
        "\\\\127.0.0.1\\outside\\secret.png",
        "outside/" * 2000,
        "",
        ".",
        "/",
        "~",
        "/proc/self/environ",
        DATA_URL,
        place.web.url("/secret.png"),
        place.web.url("/secret.png").replace("http:", "HTTP:"),
        "http://127.0.0.1:1/secret.png",
        "https://secret.invalid/secret.png",
        "https://huggingface.co/secret.png",  # gradio trusts this host more than others
        None,
        7,
        [secret],
        {"path": secret, "meta": META},
    ]


@pytest.mark.parametrize("endpoint", ["image", "file", "files", "folder", "json", "state"])
def test_a_foreign_path_is_refused(place, client, untouched, endpoint):
    for path in foreign_paths(place):
        payload = {"path": path, "meta": META}
        expect_nothing(client.ask(endpoint, [payload] if endpoint in SEVERAL else payload))


@pytest.mark.parametrize("endpoint", FILE_ENDPOINTS + OTHER_ENDPOINTS)
def test_a_foreign_path_is_refused_in_any_form(place, client, untouched, endpoint):
    secret, address = str(place.outside / "secret.png"), place.web.url("/secret.png")
    forms = [
        {"path": secret},
        {"path": secret, "url": None, "orig_name": "cat.png", "is_stream": True, "meta": META},
        {"path": secret, "meta": "gradio.FileData"},
        {"path": secret, "url": address, "meta": META},
        {"path": address, "url": address, "meta": META},
        {"path": address, "is_stream": True, "meta": META},
        {"path": "", "url": DATA_URL},
        {"path": None, "url": DATA_URL, "meta": META},
    ]
    for form in forms:
        for payload in (form, [form], {"a": [{"b": {"c": [None, form]}}]}):
            expect_nothing(client.ask(endpoint, payload))


@pytest.mark.parametrize("endpoint", FILE_ENDPOINTS)
def test_what_has_not_the_form_of_a_file_is_refused(place, client, untouched, endpoint):
    secret, address = str(place.outside / "secret.png"), place.web.url("/secret.png")
    for payload in (secret, address, DATA_URL, 7, True, {}, {"url": address}, {"meta": META}, [secret], [7], [None]):
        answer = client.ask(endpoint, payload)
        expect_nothing(answer, message=guard.REFUSAL in answer.text)


def test_a_data_url_is_refused_with_a_sentence(client, untouched):
    for payload in ({"url": DATA_URL}, {"url": DATA_URL, "meta": META}, {"path": DATA_URL}):
        expect_nothing(client.ask("image", payload))


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_guarded(place, client, untouched, route):
    for path in (str(place.outside / "secret.png"), place.web.url("/secret.png"), "https://secret.invalid/"):
        for endpoint in ("image", "json", "steps"):
            expect_nothing(client.ask(endpoint, {"path": path, "meta": META}, route=route))


@pytest.mark.parametrize("route", ["run", "predict", "queue"])
def test_the_data_of_an_event_is_guarded(place, client, untouched, route):
    for path in (str(place.outside / "secret.txt"), "/root/secret", "x" * 9000, place.web.url("/secret.png"), None):
        for data in ({"path": path}, [{"value": {"path": path, "meta": META}}]):
            expect_nothing(client.ask("event", route=route, event_data=data))
    answer = client.ask("event", route=route, event_data={"index": 1})
    assert "'index': 1" in answer.text


def test_an_updated_component_is_guarded(place, client, request):
    session = {"session_hash": "updated"}
    upload = {"path": client.upload("cat.png", picture()), "meta": META}
    assert "another" in client.ask("update", **session).text
    request.getfixturevalue("untouched")
    assert client.ask("image", upload, **session).value.startswith("cat.png: b")
    expect_nothing(client.ask("image", {"path": str(place.outside / "secret.png")}, **session))
    expect_nothing(client.ask("image", {"url": DATA_URL}, **session))


def test_the_echo_of_a_file_copies_none(place, client, untouched):
    for path in (ROOT / "pyproject.toml", place.outside / "secret.txt", place.folder.with_name("table.csv")):
        expect_nothing(client.ask("echo", {"a": {"path": str(path), "meta": META}}))
    value = {"a": [1, {"url": place.web.url("/secret.png"), "name": str(place.outside)}]}
    assert client.ask("echo", value).value == value


def test_only_a_files_own_place_will_do(place, client):
    path = Path(client.upload("cat.png", picture()))
    inner = path.with_name("folder")
    link = path.with_name("link.png")
    parent_link = place.folder / ("1" * 64)
    inner.mkdir()
    link.symlink_to(place.outside / "secret.png")
    parent_link.symlink_to(place.outside)
    for wrong in (path.parent, inner, link, parent_link / "secret.png", place.folder / "cat.png", path / "x"):
        expect_nothing(client.ask("image", {"path": str(wrong), "meta": META}))
    inner.rmdir()
    link.unlink()
    parent_link.unlink()
    same = f"{path.parent}/../{path.parent.name}//./cat.png"
    assert client.ask("image", {"path": same}).value.startswith("cat.png: b")
    path.unlink()
    expect_nothing(client.ask("image", {"path": str(path), "meta": META}))


def test_a_very_deep_payload_harms_nobody(client, untouched):
    text = '{"data": [' + '{"a": [' * 5000 + "1" + "]}" * 5000 + "]}"
    response = client.http.post("/gradio_api/run/json", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422, 500)
    assert not re.search("Traceback|site-packages", response.text)
    assert client.ask("json", {"a": 1}).value == "{'a': 1}"


# Other routes.


def test_what_the_app_made_is_served(place, client):
    table = json.loads(client.ask("table").text)["data"][0]
    assert client.file(table["path"]).text == "name,share\r\ncat,0.5\r\n"
    drawn = json.loads(client.ask("draw").text)["data"][0]
    assert Image.open(io.BytesIO(client.file(drawn["path"]).content)).size == (8, 8)
    assert client.file(client.upload("späßchen &c.txt", b"mine")).content == b"mine"
    (example,) = {path for path in place.uploaded() if path.name == "example.png"}
    assert client.file(str(example)).content == place.example.read_bytes()


def test_no_file_of_the_server_is_served(place, client, untouched):
    for path in foreign_paths(place):
        if isinstance(path, str) and "\0" not in path and "\ud800" not in path:
            for address in (urllib.parse.quote(path), urllib.parse.quote(path, safe="")):
                for route in ("file=", "file/", "proxy="):
                    for method in ("GET", "HEAD"):
                        response = client.http.request(method, f"/gradio_api/{route}{address}")
                        assert response.status_code in (403, 404), path
                        assert SECRET not in response.content


OPEN = """
/ /config /config/ /theme.css /favicon.ico /manifest.json /robots.txt /assets/{path:path} /static/{path:path}
/svelte/{path:path} /gradio_api/theme.css /gradio_api/info /gradio_api/openapi.json
/gradio_api/app_id /gradio_api/startup-events /gradio_api/login_check /gradio_api/login_check/ /gradio_api/upload
/gradio_api/upload_progress /gradio_api/reset /gradio_api/reset/ /gradio_api/cancel /gradio_api/queue/join
/gradio_api/queue/data /gradio_api/queue/status /gradio_api/heartbeat/{session_hash} /gradio_api/run/{api_name}
/gradio_api/run/{api_name}/ /gradio_api/api/{api_name} /gradio_api/api/{api_name}/ /gradio_api/call/{api_name}
/gradio_api/call/{api_name}/ /gradio_api/call/{api_name}/{event_id} /gradio_api/call/v2/{api_name}
/gradio_api/call/v2/{api_name}/ /gradio_api/call/v2/{api_name}/{event_id}
"""


def test_all_other_routes_are_closed(place, client, untouched):
    routes = []
    for route in place.blocks.app.routes:
        inner = getattr(route, "original_router", None)  # FastAPI keeps an included router whole
        routes += inner.routes if inner else [route]
    assert len(routes) > 70
    closed = {(route.path, method) for route in routes for method in route.methods if route.path not in OPEN.split()}
    assert {path for path, _ in closed} > {"/gradio_api/proxy={url_path:path}", "/gradio_api/process_recording"}
    for path, method in closed:
        address = re.sub(r"\{.*?\}", "1", path)
        for each in (address, "/" + address, address.replace("=", "%3D"), address.upper()):
            response = client.http.request(method, f"{client.url}{each}")
            assert response.status_code == 404, (method, each)


def test_what_the_page_needs_is_open(place, client):
    for path in OPEN.split():
        if "{" not in path and not re.search("reset|cancel|join|data|upload", path):
            assert client.http.get(path).status_code == 200, path
    page = client.http.get("/").text
    assets = set(re.findall(r"""(?:src|href)="\./(assets/[^"]+|static/[^"]+)""", page))
    assert assets
    for asset in assets:
        assert client.http.get("/" + asset).status_code == 200, asset


def test_errors_and_descriptions_tell_nothing_of_the_server(place, client):
    post, get = client.http.post, client.http.get
    broken = {"Content-Type": "application/json"}
    answers = [get(path) for path in ("/", "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/nothing")]
    answers += [
        post("/gradio_api/run/image", content=body, headers=broken) for body in ("{", "[]", '{"data": 7}', "\0")
    ]
    answers += [
        post(f"/gradio_api/{path}", json={"data": []}) for path in ("run/image", "run/no", "call/image", "call/no")
    ]
    answers += [post("/gradio_api/queue/join", json={"data": [], "fn_index": index}) for index in (None, 0, -1, 999)]
    answers += [post("/gradio_api/upload", content=b"x"), post("/gradio_api/upload", files={"files": ("..", b"x")})]
    texts = [answer.text for answer in answers]
    with (
        client.http.stream("GET", "/gradio_api/call/image/no") as answer,
        contextlib.suppress(httpx.RemoteProtocolError),
    ):
        texts.extend(answer.iter_text())  # gradio breaks it off
    for text in texts:
        for secret in ("Traceback", "site-packages", str(ROOT), str(place.folder.parent), "canary-5041"):
            assert secret not in text.replace(str(place.folder), "UPLOADS")


def test_no_visitor_chooses_the_address_that_others_are_shown(place, client):
    place.blocks.app.api_info = None  # as before the first request
    for headers in ({"X-Forwarded-Host": "canary.invalid"}, {"Host": "canary.invalid"}):
        for path in ("/gradio_api/info", "/gradio_api/openapi.json", "/config", "/"):
            client.http.get(path, headers=headers)
            assert "canary.invalid" not in client.http.get(path).text


def test_a_file_over_the_limit_is_refused(place, client):
    before = place.uploaded()
    response = client.http.post("/gradio_api/upload", files={"files": ("a.png", bytes(20 * 2**20 + 1))})
    assert (response.status_code, response.text) == (413, "File size exceeded maximum allowed size of 20971520 bytes.")
    assert place.uploaded() == before


# Before and after.


def test_an_input_that_the_guard_does_not_know_is_an_error():
    with gr.Blocks(analytics_enabled=False) as blocks:
        gallery = gr.Gallery()
        gallery.change(lambda value: None, gallery)
    with pytest.raises(TypeError, match=r"gr\.Gallery can hold files"):
        guard.guard(blocks)


def test_as_outputs_they_are_fine():
    with gr.Blocks(analytics_enabled=False) as blocks:
        gallery, slider = gr.Gallery(), gr.ImageSlider()
        gr.Button().click(lambda: None, None, [gallery, slider])
    guard.guard(blocks)


def test_old_files_are_deleted(tmp_path):
    keep, old, inner = tmp_path / "keep.png", tmp_path / "old.png", tmp_path / "folder" / "inner.png"
    (tmp_path / "empty").mkdir()
    inner.parent.mkdir()
    for path in (keep, old, inner):
        path.write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path.parent)
    guard.delete_old_files(str(tmp_path), 10)
    assert len([*tmp_path.rglob("*")]) == 6  # all are younger
    time.sleep(0.1)
    new = tmp_path / "new.png"
    new.write_bytes(b"x")
    os.utime(new, (0, 0))  # as a copy of something old
    guard.delete_old_files(str(tmp_path), 0.1, {str(keep)})
    assert {path.name for path in tmp_path.iterdir()} == {"keep.png", "new.png", "folder"}
    assert tmp_path.parent.exists()
    time.sleep(0.15)
    guard.delete_old_files(str(tmp_path), 0.1, {str(keep)})
    assert {path.name for path in tmp_path.iterdir()} == {"keep.png"}
    guard.delete_old_files(str(tmp_path / "nothing"), 0)


def test_the_apps_uploads_are_deleted_but_not_its_examples(place, client):
    """The last test: nothing is left of the others."""
    client.ask("image", {"path": client.upload("used.png", picture())})
    client.upload("unused.png", picture())
    client.ask("table")
    (place.folder / "broken-upload").write_bytes(b"x")
    guard.start_deleting(place.blocks, age=0.2, every=0.1)
    end = time.monotonic() + 10
    while len(place.uploaded()) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert [path.name for path in place.uploaded()] == ["example.png"]
    expect_nothing(client.ask("image", {"path": str(place.folder / ("0" * 64) / "used.png")}))


def test_the_oldest_files_go_first_where_there_are_too_many(tmp_path):
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "file").write_bytes(bytes(100))
        time.sleep(0.02)  # the clock of the file system is coarse
    keep = str(tmp_path / "0" / "file")
    guard.delete_beyond(str(tmp_path), 400, {keep})
    assert len(list(tmp_path.rglob("file"))) == 4
    guard.delete_beyond(str(tmp_path), 250, {keep})
    assert sorted(path.parent.name for path in tmp_path.rglob("file")) == ["0", "3"]


def test_a_visitor_who_leaves_during_an_upload_leaves_no_traceback(place):
    complaints, handler = [], logging.Handler()
    handler.emit = complaints.append
    log = logging.getLogger("uvicorn.error")
    log.addHandler(handler)
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    head += b'Content-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
    try:
        with socket.create_connection(("127.0.0.1", place.blocks.server_port)) as connection:
            connection.sendall(head + bytes(50_000))
            time.sleep(0.2)  # until the server reads it
        assert place.client.upload("whole.png", b"content")  # another visitor, meanwhile
        time.sleep(0.3)
    finally:
        log.removeHandler(handler)
    assert [each.getMessage() for each in complaints] == []


def test_the_progress_of_an_upload_that_is_not_there_is_done(place):
    """Gradio answers 404 after three seconds, which browsers report as an error."""
    answer = httpx.get(f"{place.client.url}/gradio_api/upload_progress?upload_id=nothing", timeout=10)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/event-stream"
    assert answer.text == 'data: {"msg": "done"}\n\n'
