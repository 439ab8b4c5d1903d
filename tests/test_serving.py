"""`python -m serving` up to the start of Cog's server: its arguments, and the description of the API."""

import http.server
import json
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import typing
from pathlib import Path

import pytest

import predict
from serving import __main__ as serving


@pytest.fixture
def no_start(monkeypatch):
    """The process would become the server: a test that should have stopped it before must fail instead."""
    monkeypatch.setattr(serving, "run_server", lambda *_: pytest.fail("the server would start"))
    monkeypatch.setattr(serving, "write_schema", lambda *_: None)


@pytest.mark.parametrize("port", ["abc", "", "0", "-1", "65536", "5000.0", "²"])
def test_a_port_that_is_none_gets_one_line(no_start, port, capsys):
    with pytest.raises(SystemExit) as stopped:
        serving.main([f"--port={port}"])
    assert stopped.value.code == 2
    expected = f"python -m serving: argument --port: {port!r} is not a number from 1 to 65535\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("slots", ["0", "-1", "x", "1.5", "257", ""])
def test_a_number_of_slots_that_is_none_gets_one_line(no_start, slots, capsys):
    with pytest.raises(SystemExit) as stopped:
        serving.main([f"--slots={slots}"])
    assert stopped.value.code == 2
    expected = f"python -m serving: argument --slots: {slots!r} is not a number from 1 to 256\n"
    assert capsys.readouterr().err == expected


def test_a_port_in_use_gets_one_line(no_start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            serving.main(["--port", str(port)])
    line = f"python -m serving: port {port} of 127.0.0.1 cannot be used (Address already in use)"
    assert stopped.value.code.startswith(line)
    assert "\n" not in stopped.value.code


def test_a_folder_of_cogs_that_another_user_owns_gets_one_line(no_start, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SystemExit) as stopped:
        serving.main(["--port", str(port)])
    assert "cannot write there (it belongs to another user); give the server a /tmp of its own" in stopped.value.code
    assert "\n" not in stopped.value.code


# The description of the API.

SCHEMA = json.loads(serving.SCHEMA.read_text())


class Docker(http.server.BaseHTTPRequestHandler):
    """As much of Docker as Cog's command line asks before it has written the description."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def address_string(self) -> str:
        return "a socket"

    def log_message(self, *_):
        pass


def test_the_description_is_what_cogs_command_line_writes(tmp_path):
    cog = os.environ.get("COG", "") or shutil.which("cog") or ""
    if not os.access(cog, os.X_OK):
        pytest.skip("Cog's command line is not here (COG=/path/to/cog names it)")
    shutil.copy(predict.__file__, tmp_path)
    (tmp_path / "cog.yaml").write_text('build:\n  python_version: "3.12"\nrun: "predict.py:Predictor"\n')
    address = tmp_path / "docker"
    with socketserver.ThreadingUnixStreamServer(str(address), Docker) as docker:
        threading.Thread(target=docker.serve_forever, daemon=True).start()
        environment = os.environ | {"DOCKER_HOST": f"unix://{address}"}
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
        run = subprocess.run([cog, "build", "-t", "none"], **options, check=False)
        docker.shutdown()
    written = tmp_path / ".cog" / "openapi_schema.json"
    assert written.exists(), run.stderr
    assert json.loads(written.read_text()) == SCHEMA, f"cp {written} {serving.SCHEMA}"


def resolved(schema: object) -> object:
    """A schema with what its references lead to in their place."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return resolved(SCHEMA["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in schema.items()}
    return [resolved(each) for each in schema] if isinstance(schema, list) else schema


def test_the_description_fits_the_inputs_of_run():
    import inspect

    _, *parameters = inspect.signature(predict.Predictor.run).parameters.values()
    inputs = SCHEMA["components"]["schemas"]["Input"]
    kinds = {str: "string", int: "integer", bool: "boolean"}
    for order, parameter in enumerate(parameters):
        field, found = parameter.default, resolved(inputs["properties"][parameter.name])
        about = found | (found["allOf"][0] if "allOf" in found else {})
        assert (found["x-order"], found["description"], found.get("default")) == (
            order,
            field.description,
            field.default,
        )
        assert about["type"] == kinds[parameter.annotation]
        assert [about.get(key) for key in ("enum", "minimum", "maximum")] == [field.choices, field.ge, field.le]
    assert list(inputs["properties"]) == [parameter.name for parameter in parameters]
    assert inputs["required"] == ["image"]
    assert inputs["properties"]["image"]["format"] == "uri"


def test_the_description_fits_the_output():
    for kind in (predict.Output, predict.Prediction):
        found = SCHEMA["components"]["schemas"]["Output"]
        found = found if kind is predict.Output else found["properties"]["predictions"]["items"]
        hints = typing.get_type_hints(kind)
        assert list(found["properties"]) == list(hints)
        assert found["required"] == [name for name, hint in hints.items() if name != "heatmap"]


def test_every_choice_is_a_model():
    assert SCHEMA["components"]["schemas"]["model"]["enum"] == predict.MODELS


def test_the_description_is_put_where_cog_looks(tmp_path):
    path = tmp_path / ".cog" / "openapi_schema.json"
    serving.write_schema(path)
    assert json.loads(path.read_text()) == SCHEMA
    assert list(path.parent.iterdir()) == [path]


def test_the_makefile_starts_it():
    assert "python -m serving" in (Path(serving.ROOT) / "Makefile").read_text()
