"""demo/app.py as a process of its own: its command line, in the container, as a Space, and as tools (MCP)."""

import asyncio
import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import ROOT
from demo_guard_app import Witness
from PIL import Image

from convmixer import Classifier
from demo import app, guard, uploads

MODEL = "convmixer_256_8_cifar10"
SECONDS = 120  # a start takes 8 on two cores that have nothing else to do
NOT_IN_THE_CONTAINER = ["timm", "torchvision", "cog", "matplotlib", "tyro", "datasets", "mcp", "train", "predict"]


class Demo:
    """demo/app.py under way. It ends with the with block."""

    def __init__(
        self, *arguments: object, folder: Path, script: Path = ROOT / "demo" / "app.py", wrapper=(), **environment
    ):
        self.folder = folder  # for all that it writes
        (folder / "tmp").mkdir(exist_ok=True)
        environment = clean_environment() | {"TMPDIR": str(folder / "tmp"), "HOME": str(folder)} | environment
        self.files = [(folder / name).open("w+") for name in ("stdout", "stderr")]
        command = [*wrapper, sys.executable, str(script), *map(str, arguments)]
        pipes = dict(zip(("stdout", "stderr"), self.files, strict=True))
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def wait_for(self, pattern: str, where: str = "stdout") -> re.Match:
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.output(where))):
            assert self.process.poll() is None and time.monotonic() < end, (
                self.output("stdout"),
                self.output("stderr"),
            )
            time.sleep(0.02)
        return found

    def output(self, where: str) -> str:
        return (self.folder / where).read_text()

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        self.process.wait(30)

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(30)
        for file in self.files:
            file.close()


def clean_environment() -> dict[str, str]:
    """This one without what would change the demo: a user's own models, Gradio's variables, proxies."""
    theirs = re.compile(r"GRADIO_|COG_|CONVMIXER_|PYTHON|SPACE|SYSTEM$|(https?|no|all)_proxy$", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not theirs.match(name)}
    return kept | {"OMP_NUM_THREADS": "1"}


def without(packages: list[str], folder: Path) -> dict[str, str]:
    """The environment of a Python in which some packages are not installed."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    return {"PYTHONPATH": str(folder)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def jpeg(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95)
    return stream.getvalue()


def ask(url: str, content: bytes) -> dict:
    """The demo's answer about a picture, over raw HTTP."""
    with httpx.Client(base_url=url + "/gradio_api", trust_env=False, timeout=60) as http:
        (path,) = http.post("/upload", files={"files": ("some.jpg", content)}).raise_for_status().json()
        event = http.post("/call/classify", json={"data": [{"path": path}, "auto", 3]}).raise_for_status().json()
        answer = http.get(f"/call/classify/{event['event_id']}").text
    assert "event: complete" in answer, answer
    return json.loads(re.search("data: (.*)", answer)[1])[0]


def expect_right_answer(answer: dict, content: bytes) -> None:
    assert answer["model"] == MODEL
    rows = [(row["label"], pytest.approx(row["score"], abs=1e-5)) for row in answer["predictions"]]
    assert [(p.label, p.score) for p in Classifier(MODEL).classify(content, 3)] == rows


# Wrong use: one line, at once.


@pytest.fixture
def wrong_use(tmp_path):
    """A function that starts the demo with something wrong, and gives the line that it says."""

    def run(*arguments: object, **environment: str) -> str:
        with Demo(*arguments, folder=tmp_path, **environment) as demo:
            assert demo.process.wait(SECONDS) == 2
            text = demo.output("stderr")
            assert demo.output("stdout") == ""
            assert text.startswith("demo/app.py: ") and text.count("\n") == 1, text
            assert [*(tmp_path / "tmp").iterdir()] == []
            return text

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modle", "x"], "unrecognized arguments: --modle"),
        (["--port", "70000"], "'70000' is not a port; give a number from 1 to 65535"),
        (["--host", "203.0.113.7"], "203.0.113.7 cannot be used (Cannot assign requested address); choose another"),
        (["--host", "nowhere.invalid"], "there is no host 'nowhere.invalid'; give an address of this machine"),
        (["--model", "convmixer_7"], "There are auto, convmixer_1536_20, "),
        (["--model", ROOT / "pyproject.toml"], "is not a checkpoint"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line(wrong_use, arguments, words):
    assert words in wrong_use(*arguments)


def test_a_wrong_variable_is_one_line(wrong_use):
    assert "GRADIO_SERVER_PORT: 'seven' is not a port" in wrong_use(GRADIO_SERVER_PORT="seven")


def test_a_damaged_checkpoint_is_one_line(wrong_use, random_checkpoint):
    path = random_checkpoint()
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path}: " in wrong_use("--model", MODEL, path)


def test_a_missing_package_is_one_line(wrong_use, tmp_path):
    text = wrong_use("--port", free_port(), **without(["gradio"], tmp_path))
    assert text.endswith(
        "No module named 'gradio'; install what is missing with: pip install -r requirements/demo.txt\n"
    )


@pytest.mark.skipif(find_spec("mcp") is not None, reason="the extra is installed")
def test_mcp_without_its_extra_is_one_line(wrong_use):
    assert "pip install 'gradio[mcp]'" in wrong_use("--mcp")


# Where it listens.


def listener(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_server((host, port))


def test_the_first_free_port_is_taken(monkeypatch):
    with listener(0) as first, listener(0) as other:
        start = first.getsockname()[1]
        monkeypatch.setattr(app, "FIRST_PORT", start)
        assert start < app.find_place("127.0.0.1", None)[1] < start + app.PORTS
        with pytest.raises(OSError, match=rf"port {start} of 127.0.0.1 .*in use\); choose another --port"):
            app.find_place("127.0.0.1", start)
        monkeypatch.setattr(app, "FIRST_PORT", other.getsockname()[1])
        monkeypatch.setattr(app, "PORTS", 1)
        with pytest.raises(OSError, match="are in use; choose another with --port"):
            app.find_place("127.0.0.1", None)


def test_hosts_become_addresses():
    port = free_port()
    assert app.find_place("localhost", port) == ("127.0.0.1", port)
    assert app.find_place("0.0.0.0", port) == ("0.0.0.0", port)


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_ipv6_is_written_as_in_an_address():
    port = free_port()
    assert app.find_place("::1", port) == ("[::1]", port)


# The running demo, with no other packages than there are in the container.


@pytest.fixture(scope="module")
def contained(tmp_path_factory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("contained")
    environment = without(NOT_IN_THE_CONTAINER, folder)
    with Demo("--model", MODEL, "--port", free_port(), folder=folder, **environment) as demo:
        demo.url = demo.wait_for(r"The demo is at (http://127.0.0.1:\d+) \(Ctrl-C ends it\)\n")[1]
        yield demo


def test_it_answers_in_the_container(contained, picture):
    content = jpeg(picture())
    expect_right_answer(ask(contained.url, content), content)


def test_a_port_in_use_is_one_line(contained, wrong_use):
    port = contained.url.rpartition(":")[2]
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in wrong_use("--port", port)
    assert "cannot be used" in wrong_use("--port", port, "--host", "0.0.0.0")
    assert f"port {port} " in wrong_use(GRADIO_SERVER_PORT=port)


def test_ctrl_c_ends_it(contained):
    contained.end(signal.SIGINT)
    assert contained.process.returncode == 0
    assert contained.output("stdout") == f"The demo is at {contained.url} (Ctrl-C ends it)\n"
    assert contained.output("stderr") == ""
    assert [*(contained.folder / "tmp").iterdir()] == []  # no upload stays behind
    listener(int(contained.url.rpartition(":")[2])).close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_can_be_ended_while_it_starts(tmp_path, number):
    with Demo(folder=tmp_path) as demo:
        while not [*(tmp_path / "tmp").iterdir()]:  # the first thing that it does
            time.sleep(0.01)
        time.sleep(0.5)
        demo.end(number)
        assert (demo.process.returncode, demo.output("stdout"), demo.output("stderr")) == (0, "", "")
        assert [*(tmp_path / "tmp").iterdir()] == []


def test_what_a_killed_demo_left_goes_at_the_next_start_and_a_running_ones_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = Path(uploads.make_folder())
    (mine / "photo.jpg").write_bytes(b"x")
    code = "from demo.uploads import make_folder; import time; print(make_folder(), flush=True); time.sleep(99)"
    command, options = (
        [sys.executable, "-c", code],
        {"cwd": ROOT, "env": clean_environment() | {"TMPDIR": str(tmp_path)}},
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as other:
        theirs = Path(other.stdout.readline().strip())
        (theirs / "photo.jpg").write_bytes(b"x")
        (tmp_path / "convmixer-demo-file").touch()
        (tmp_path / "convmixer-demo-link").symlink_to(ROOT)
        shutil.rmtree(uploads.make_folder())
        assert (mine / "photo.jpg").exists() and (theirs / "photo.jpg").exists()
        other.kill()
        other.wait(30)
    shutil.rmtree(uploads.make_folder())
    assert (mine / "photo.jpg").exists() and not theirs.exists()
    assert (tmp_path / "convmixer-demo-file").exists() and (ROOT / "README.md").exists()


def test_under_nohup_it_goes_on(tmp_path):
    with Demo("--model", MODEL, "--port", free_port(), folder=tmp_path, wrapper=["nohup"]) as demo:
        demo.wait_for("The demo is at ")
        demo.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert demo.process.poll() is None


def test_odd_surroundings_are_no_trouble(tmp_path, picture):
    """A SOCKS proxy that nothing here could use, nowhere to write but TMPDIR, and a path of another server's."""
    socks = dict.fromkeys(("all_proxy", "ALL_PROXY"), "socks5://127.0.0.1:9")
    odd = socks | {"HOME": "/proc/nowhere", "GRADIO_ROOT_PATH": "https://example.org/demo"}
    with Demo("--model", MODEL, "--port", free_port(), folder=tmp_path, **odd) as demo:
        url = demo.wait_for(r"The demo is at (\S+) ")[1]
        content = jpeg(picture())
        expect_right_answer(ask(url, content), content)
        assert httpx.get(url + "/config", trust_env=False).json()["root"] == "https://example.org/demo"
        demo.end(signal.SIGHUP)
        assert (demo.process.returncode, demo.output("stderr")) == (0, "")
        assert [*(tmp_path / "tmp").glob("convmixer-*")] == []


def test_without_a_public_address_it_goes_on(tmp_path, picture):
    """And no proxy is asked about this machine's own page."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    with Demo("--model", MODEL, "--port", free_port(), "--share", folder=tmp_path, **nowhere) as demo:
        url = demo.wait_for(r"The demo is at (\S+) ")[1]
        demo.wait_for("no public address could be had .*; the demo goes on without\n", "stderr")
        content = jpeg(picture())
        expect_right_answer(ask(url, content), content)
        demo.end(signal.SIGTERM)
        assert (demo.process.returncode, demo.output("stderr").count("\n")) == (0, 1)


# A Hugging Face Space.


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "space"
    command = [sys.executable, ROOT / "demo" / "space.py", "--to", folder]
    result = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"hf upload --repo-type space USER/NAME {folder} ." in result.stdout
    return folder


def front_matter(space: Path) -> dict:
    return yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_a_space_says_what_it_is(space):
    about = front_matter(space)
    assert about["sdk"] == "gradio" and about["license"] == "mit" and about["title"] == "ConvMixer"
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {about["colorFrom"], about["colorTo"]} <= colours
    assert len(about["short_description"]) <= 60
    assert about["python_version"] == yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["python_version"]
    pins = dict(line.split("==") for line in (space / "requirements.txt").read_text().splitlines())
    assert set(pins) == {"numpy", "pillow", "pillow-heif", "safetensors", "huggingface_hub", "gradio"}
    tested = (ROOT / "requirements/demo.txt").read_text().splitlines()
    assert f"gradio=={about['sdk_version']}" in tested and pins["gradio"] == about["sdk_version"]


def test_a_space_has_what_it_needs_and_no_more(space):
    assert {path.name for path in space.iterdir()} == {"README.md", "LICENSE", "requirements.txt", "convmixer", "demo"}
    assert not [path for path in space.rglob("*") if path.name == "__pycache__" or path.suffix == ".pyc"]
    for package in ("convmixer", "demo"):
        files = [
            path
            for path in (ROOT / package).rglob("*.*")
            if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts
        ]
        there = {str(path.relative_to(space)) for path in (space / package).rglob("*") if path.is_file()}
        assert there == {str(path.relative_to(ROOT)) for path in files} - {"demo/space.py"}


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        command = [sys.executable, ROOT / "demo" / "space.py", "--to", target]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_space_runs_by_itself(space, tmp_path, picture):
    """As Hugging Face starts it, and through the addresses that its page and its clients use there."""
    there = {"SYSTEM": "spaces", "SPACE_ID": "someone/convmixer", "GRADIO_SERVER_NAME": "0.0.0.0"}
    port = free_port()
    script = space / front_matter(space)["app_file"]
    with Demo(folder=tmp_path, script=script, **there, GRADIO_SERVER_PORT=str(port)) as demo:
        demo.wait_for(rf"The demo is at http://127.0.0.1:{port} and at this machine's other addresses")
        url = f"http://127.0.0.1:{port}"
        content = jpeg(picture())
        expect_right_answer(ask(url, content), content)
        loaded = Path(f"/proc/{demo.process.pid}/maps")
        assert not loaded.exists() or str(ROOT / "convmixer") not in loaded.read_text()
        proxy = {"x-forwarded-host": "someone-convmixer.hf.space", "x-forwarded-proto": "https"}
        with httpx.Client(base_url=url, headers=proxy, trust_env=False, timeout=20) as http:
            page = http.get("/?__theme=light&__sign=token")
            assert page.status_code == 200 and "x-frame-options" not in page.headers
            config = http.get("/config?__sign=token").json()
            assert config["space_id"] == "someone/convmixer"
            assert config["root"] == "https://someone-convmixer.hf.space"
            used = ["/theme.css?v=1", "/manifest.json", "/gradio_api/startup-events", "/gradio_api/info"]
            for address in [*used, *re.findall(r'(?:src|href)="\.?(/assets/[^"]+)"', page.text)]:
                assert http.get(address).status_code == 200, address
            with http.stream("GET", "/gradio_api/heartbeat/session") as heartbeat:
                assert heartbeat.status_code == 200


# Tools for language models.

needs_mcp = pytest.mark.skipif(
    find_spec("mcp") is None, reason="the extra is not installed: pip install 'gradio[mcp]==6.31.0'"
)
SECRET = (61, 47)  # the size of a picture of the server


def uploaded(folder: Path, name: str = "a.png") -> Path:
    path = folder / ("0" * 64) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    return path


def test_a_tools_arguments_are_uploads_only(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    path = uploaded(tmp_path, "a b.png")
    for text in (
        str(path),
        f"http://any.host/gradio_api/file={path}",
        f"https://x/gradio_api/file={path.parent}/a%20b.png",
    ):
        given = guard._tool_arguments({"image": text, "model": "auto"}, [["image"]])
        assert given["image"]["path"] == str(path) and given["model"] == "auto"
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    written = Path(guard._tool_arguments({"image": data}, [["image"]])["image"]["path"])
    assert written.read_bytes() == path.read_bytes() and tmp_path in written.parents
    assert guard._tool_arguments({"model": "http://any.host/x.png"}, [["image"]]) == {"model": "http://any.host/x.png"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": "/etc/hostname"},
        {"image": "file:///etc/hostname"},
        {"image": "http://127.0.0.1:9/a.png"},
        {"image": "http://127.0.0.1:9/gradio_api/file=/etc/hostname"},
        {"image": "http://127.0.0.1:9/gradio_api/file=http://127.0.0.1:9/a.png"},
        {"image": "UPLOADS/" + "0" * 64 + "/../../etc/hostname"},
        {"image": ""},
        {"image": "\0"},
        {"image": "data:image/png,plain"},
        {"image": "data:image/png;base64,A"},
        {"image": "data:image/png;base64," + "A" * (4 * guard.MAX_FILE // 3 + 100)},
        {"image": {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}},
        {"model": {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}},
        {"model": [{"deep": {"path": "http://127.0.0.1:9/a.png"}}]},
    ],
    ids=lambda arguments: str(arguments)[:60],
)
def test_a_tools_arguments_name_nothing_else(tmp_path, monkeypatch, arguments):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    uploaded(tmp_path)
    if isinstance(text := arguments.get("image"), str):
        arguments = {"image": text.replace("UPLOADS", str(tmp_path))}
    before = {*tmp_path.rglob("*.*")}
    with pytest.raises(ValueError, match="A picture must be a data:image"):
        guard._tool_arguments(arguments, [["image"]])
    assert {*tmp_path.rglob("*.*")} == before


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Iterator[tuple[str, Witness]]:
    """The address of the app with tools, and a witness of what it opens and whom it calls."""
    from demo.models import Models
    from demo.page import LOOKS, build

    witness = Witness()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setenv("CONVMIXER_CACHE", str(tmp_path_factory.mktemp("cache")))
        page = build(Models([MODEL]), {"plain": Image.new("RGB", (40, 30), "teal")}).queue(max_size=20)
        options = guard.launch_options(mcp=True) | LOOKS
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **options)
        witness.own_port = page.server_port
        yield url.rstrip("/"), witness
        page.close(verbose=False)
    witness.close()


def talk(url: str, conversation):
    """What the coroutine function ``conversation`` gives for a session of the public MCP client library."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def run():
        stream = streamablehttp_client(url + "/gradio_api/mcp/")
        async with stream as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await conversation(session)

    return asyncio.run(run())


def call(url: str, tool: str, **arguments: object):
    return talk(url, lambda session: session.call_tool(tool, arguments))


@needs_mcp
def test_the_tools_are_the_named_end_points(tools):
    found = {tool.name: tool for tool in talk(tools[0], lambda session: session.list_tools()).tools}
    assert set(found) == {"classify", "heatmap", "models"}
    assert found["classify"].description.startswith("Classify a picture with ConvMixer.")
    schema = found["classify"].inputSchema
    assert schema["required"] == ["image"] and set(schema["properties"]) == {"image", "model", "top_k"}
    assert all(each["description"] for each in schema["properties"].values())


@needs_mcp
@pytest.mark.parametrize("way", ["path", "address", "data"])
def test_a_tool_answers_about_an_upload(tools, picture, way):
    url, _ = tools
    content = jpeg(picture())
    (path,) = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.jpg", content)}, trust_env=False).json()
    data = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    image = {"path": path, "address": f"{url}/gradio_api/file={path}", "data": data}[way]
    answer = call(url, "classify", image=image, top_k=3)
    assert not answer.isError, answer
    best = Classifier(MODEL).classify(content, 1)[0].label
    assert f"[{{'label': '{best}'" in answer.content[0].text
    drawn = call(url, "heatmap", image=image)
    shown = Image.open(io.BytesIO(base64.b64decode(drawn.content[0].data)))
    assert shown.size == picture().size


@needs_mcp
@pytest.mark.parametrize("form", ["{}", "file://{}", "http://127.0.0.1:9{}", "URL{}", "URL/gradio_api/file={}", "dict"])
def test_a_tool_opens_and_fetches_nothing_else(tools, tmp_path, form):
    url, witness = tools
    secret = tmp_path / "secret.png"
    Image.new("RGB", SECRET).save(secret)
    image = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    if form != "dict":
        image = form.replace("URL", url).format(secret)
    with witness:
        answers = [call(url, "classify", image=image), call(url, "heatmap", image=image)]
        # A list of tools without this one, by which nothing is checked.
        answers.append(call(url + "/gradio_api/mcp/?tools=models#", "classify", image=image))
        answers.append(call(url, "classify", image="", model=image))
    assert [answer.isError for answer in answers] == [True] * 4
    assert not [text for text in witness.files if "secret" in text]
    assert witness.calls == []


@needs_mcp
def test_only_the_address_of_the_tools_is_open(tools):
    for path in ("sse", "messages/", "schema", "http", "x"):
        assert httpx.get(f"{tools[0]}/gradio_api/mcp/{path}", trust_env=False).status_code == 404


@needs_mcp
def test_the_demo_says_where_its_tools_are(tmp_path):
    with Demo("--model", MODEL, "--port", free_port(), "--mcp", folder=tmp_path) as demo:
        url = demo.wait_for(r"Its tools for language models \(MCP\) are at (\S+)/gradio_api/mcp/\n")[1]
        assert not call(url, "models").isError
        assert demo.output("stdout").count("\n") == 2 and demo.output("stderr") == ""
        demo.end(signal.SIGTERM)
