"""demo/app.py as a process of its own: wrong use, where it listens, how it ends, and as a Hugging Face Space."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import ROOT
from demo_client import HAS_MCP, SHIPPED, Client, png, value

from convmixer import Classifier
from demo import uploads

SECONDS = 240  # a start takes 5 on two cores that have nothing else to do
NOT_IN_A_SPACE = ["torch", "timm", "torchvision", "cog", "matplotlib", "tyro", "datasets", "mcp", "train", "predict"]


class Demo:
    """demo/app.py under way. It ends with the with block."""

    def __init__(self, *arguments: object, folder: Path, script=ROOT / "demo" / "app.py", wrapper=(), **environment):
        self.folder = folder  # for all that it writes
        (folder / "tmp").mkdir(exist_ok=True)
        environment = clean_environment() | {"TMPDIR": str(folder / "tmp"), "HOME": str(folder)} | environment
        self.files = [(folder / name).open("w+") for name in ("stdout", "stderr")]
        command = [*wrapper, sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": self.files[0], "stderr": self.files[1]}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def wait_for(self, pattern: str, where: str = "stdout") -> re.Match:
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.output(where))):
            assert self.process.poll() is None and time.monotonic() < end, self.output("stderr")
            time.sleep(0.02)
        return found

    def output(self, where: str) -> str:
        return (self.folder / where).read_text()

    def left(self) -> list[Path]:
        return [*(self.folder / "tmp").glob("convmixer-*")]

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait(60)
        for file in self.files:
            file.close()


def clean_environment() -> dict[str, str]:
    """This one without what would change the demo: a user's own models, Gradio's variables, proxies."""
    theirs = re.compile(r"GRADIO_|COG_|CONVMIXER_|PYTHON|SPACE|SYSTEM$|(https?|no|all)_proxy$", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not theirs.match(name)} | {"OMP_NUM_THREADS": "1"}


def without(packages: list[str], folder: Path) -> dict[str, str]:
    """The environment of a Python in which some packages are not installed."""
    for name in packages:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\")")
    return {"PYTHONPATH": str(folder)}


def expect_right_answer(url: str) -> None:
    client = Client(url)
    answer = value(client.ask("classify", {"path": client.upload("some.png", png(1))}, "auto", 3, route="call"))
    expected = [(each.label, pytest.approx(each.score, abs=1e-5)) for each in Classifier(SHIPPED).classify(png(1), 3)]
    assert answer["model"] == SHIPPED
    assert [(row["label"], row["score"]) for row in answer["predictions"]] == expected


# A Hugging Face Space: the demo with nothing else of this repository, and no packages but its own.


def run_space(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "demo" / "space.py", "--to", folder]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "space"
    result = run_space(folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"hf upload --repo-type space USER/NAME {folder} ." in result.stdout
    return folder


@pytest.fixture(scope="module")
def hosted(space, tmp_path_factory) -> Iterator[Demo]:
    """The Space, started as Hugging Face does."""
    folder = tmp_path_factory.mktemp("hosted")
    there = {"SYSTEM": "spaces", "SPACE_ID": "someone/convmixer", "GRADIO_SERVER_NAME": "0.0.0.0"}
    there |= without(NOT_IN_A_SPACE, folder)
    with Demo(folder=folder, script=space / "demo" / "app.py", **there) as demo:
        demo.url = demo.wait_for(r"The demo is at (\S+) and at this machine's other addresses")[1]
        yield demo


def test_a_space_is_complete_and_has_no_more(space):
    said = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (said["sdk"], said["app_file"], said["license"]) == ("gradio", "demo/app.py", "mit")
    pins = dict(line.split("==") for line in (space / "requirements.txt").read_text().splitlines())
    assert set(pins) == {"numpy", "pillow", "pillow-heif", "safetensors", "huggingface_hub", "gradio"}
    assert pins["gradio"] == said["sdk_version"] == version("gradio")  # whose insides the guard and the looks lean on
    assert {path.name for path in space.iterdir()} == {"README.md", "LICENSE", "requirements.txt", "convmixer", "demo"}
    assert not [path for path in space.rglob("*") if path.name in ("__pycache__", "space.py")]
    again = run_space(space)  # a folder with something in it is left alone
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (2, "", 1)


def test_a_space_answers_through_the_addresses_used_there(hosted):
    expect_right_answer(hosted.url)
    proxy = {"x-forwarded-host": "someone-convmixer.hf.space", "x-forwarded-proto": "https"}
    with httpx.Client(base_url=hosted.url, headers=proxy, trust_env=False, timeout=60) as http:
        page = http.get("/?__theme=light&__sign=token")
        assert page.status_code == 200 and "x-frame-options" not in page.headers
        config = http.get("/config?__sign=token").json()
        assert (config["space_id"], config["root"]) == ("someone/convmixer", "https://someone-convmixer.hf.space")
        for address in ["/manifest.json", *re.findall(r'(?:src|href)="\.?(/assets/[^"]+)"', page.text)]:
            assert http.get(address).status_code == 200, address


# Wrong use: one line, at once.


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--modle x", "unrecognized arguments: --modle"),
        ("--port 70000", "'70000' is not a port; give a number from 1 to 65535"),
        ("--port BUSY", "of 127.0.0.1 cannot be used (Address already in use); choose another"),
        ("--host nowhere.invalid", "there is no host 'nowhere.invalid'; give an address of this machine"),
        (f"--model {SHIPPED} pyproject.toml", "is not a checkpoint"),
        ("GRADIO_SERVER_PORT=seven", "GRADIO_SERVER_PORT: 'seven' is not a port"),
        ("WITHOUT=gradio", "'gradio'; install what is missing with: pip install -r requirements/demo.txt\n"),
        pytest.param("--mcp", "'gradio[mcp]'", marks=pytest.mark.skipif(HAS_MCP, reason="the extra is installed")),
    ],
)
def test_wrong_use_is_one_line(tmp_path, command, words):
    given = dict(each.split("=") for each in command.split() if "=" in each)
    environment = given | without([given.get("WITHOUT", "nothing")], tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        arguments = command.replace("BUSY", str(busy.getsockname()[1])).split() if not given else []
        with Demo(*arguments, folder=tmp_path, **environment) as demo:
            assert demo.process.wait(SECONDS) == 2
            text = demo.output("stderr")
            assert (demo.output("stdout"), demo.left()) == ("", [])
            assert text.startswith("demo/app.py: ") and text.count("\n") == 1 and words in text


# The end.


def test_ctrl_c_ends_it_and_nothing_is_left(hosted):
    """Nor does a visitor leave a traceback who goes in the middle of an upload."""
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    head += 'Content-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
    address = ("127.0.0.1", int(hosted.url.rpartition(":")[2]))
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + bytes(50_000))
    expect_right_answer(hosted.url)
    (folder,) = hosted.left()
    assert [*folder.rglob("some.png")]
    assert hosted.end(signal.SIGINT) == 0
    assert (hosted.output("stdout").count("\n"), hosted.left()) == (1, [])
    assert "isconnect" not in hosted.output("stderr")  # but what Gradio itself says of a Space without its packages
    socket.create_server(address).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_can_be_ended_while_it_starts(tmp_path, number):
    with Demo(folder=tmp_path) as demo:
        while not demo.left():  # the first thing that it does
            time.sleep(0.01)
        time.sleep(0.5)
        assert (demo.end(number), demo.output("stdout"), demo.output("stderr"), demo.left()) == (0, "", "", [])


def test_odd_surroundings_are_no_trouble(request, tmp_path):
    """A port in use, nohup, proxies that answer nobody, nowhere to write but TMPDIR, a path, no public address."""
    with contextlib.suppress(OSError):  # somebody else's demo
        request.addfinalizer(socket.create_server(("127.0.0.1", 7860)).close)
    odd = dict.fromkeys(("all_proxy", "ALL_PROXY"), "socks5://127.0.0.1:9")
    odd |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    odd |= {"HOME": "/proc/nowhere", "GRADIO_ROOT_PATH": "https://example.org/demo"}
    arguments = ["--model", SHIPPED, "--share", *(["--mcp"] if HAS_MCP else [])]
    with Demo(*arguments, folder=tmp_path, wrapper=["nohup"], **odd) as demo:
        url = demo.wait_for(r"The demo is at (http://127.0.0.1:(?!7860)78\d\d) \(Ctrl-C ends it\)\n")[1]
        demo.wait_for("no public address could be had .*; the demo goes on without\n", "stderr")
        if HAS_MCP:
            demo.wait_for(r"Its tools for language models \(MCP\) are at \S+/gradio_api/mcp/\n")
        demo.process.send_signal(signal.SIGHUP)
        expect_right_answer(url)
        config = httpx.get(url + "/config", trust_env=False, timeout=60).json()
        assert config["root"] == "https://example.org/demo"
        assert demo.end(signal.SIGTERM) == 0
        assert (demo.output("stderr").count("\n"), demo.left()) == (1, [])


def test_what_a_killed_demo_left_goes_at_the_next_start_and_a_running_ones_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running, killed = Path(uploads.make_folder()), tmp_path / "convmixer-demo-killed"
    killed.mkdir()
    (killed / "photo.jpg").write_bytes(b"x")
    (tmp_path / "convmixer-demo-link").symlink_to(ROOT)
    uploads.make_folder()
    assert running.exists() and not killed.exists() and (ROOT / "README.md").exists()
