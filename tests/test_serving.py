"""`python -m serving` up to the start of Cog's server: its arguments, and the description of the API."""

import inspect
import json
import os
import socket
import typing

import pytest

import predict
from convmixer import zoo
from serving import __main__ as serving

SCHEMA = json.loads(serving.SCHEMA.read_text())["components"]["schemas"]
KINDS = {str: "string", int: "integer", bool: "boolean"}


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that gives the one line of a start that is refused."""
    monkeypatch.setattr(serving, "run_server", lambda *_: pytest.fail("the server would start"))
    monkeypatch.setattr(serving, "write_schema", lambda *_: None)

    def call(argument: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            serving.main([argument])
        line = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err.strip()
        assert "\n" not in line and stopped.value.code
        return line

    return call


@pytest.mark.parametrize(("option", "most"), [("--port", 65535), ("--slots", 256)])
@pytest.mark.parametrize("word", ["abc", "", "0", "1.5", "²", "65536"])
def test_a_number_that_is_none_gets_one_line(refused, option, most, word):
    expected = f"python -m serving: argument {option}: {word!r} is not a number from 1 to {most}"
    assert refused(f"{option}={word}") == expected


def test_a_server_that_could_not_work_is_not_started(refused, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in refused(f"--port={port}")
    monkeypatch.setattr(os, "access", lambda *_: False)  # Cog's folder
    line = "cannot write there (it belongs to another user); give the server a /tmp of its own"
    assert line in refused(f"--port={port}")


def test_the_description_fits_the_inputs_and_the_output():
    """tests/test_container.py compares it with what Cog's command line makes of the text of predict.py."""
    _, *parameters = inspect.signature(predict.Predictor.run).parameters.values()
    assert list(SCHEMA["Input"]["properties"]) == [parameter.name for parameter in parameters]
    assert SCHEMA["Input"]["required"] == ["image"] and SCHEMA["Input"]["properties"]["image"]["format"] == "uri"
    for parameter in parameters:
        field, found = parameter.default, SCHEMA["Input"]["properties"][parameter.name]
        about = found if "type" in found else SCHEMA[parameter.name]
        assert (found["description"], found.get("default")) == (field.description, field.default)
        assert about["type"] == KINDS[parameter.annotation]
        assert [about.get(key) for key in ("enum", "minimum", "maximum")] == [field.choices, field.ge, field.le]
    assert ["auto", *zoo.MODELS] == predict.MODELS == SCHEMA["model"]["enum"]
    output = SCHEMA["Output"]
    for kind, found in ((predict.Output, output), (predict.Prediction, output["properties"]["predictions"]["items"])):
        found = SCHEMA[found["$ref"].rpartition("/")[2]] if "$ref" in found else found
        names = list(typing.get_type_hints(kind))
        assert list(found["properties"]) == names
        assert found["required"] == [name for name in names if name != "heatmap"]


def test_cog_hands_the_picture_over_as_the_text_that_came_to_as_many_slots_as_elsewhere():
    """What it takes for a Path it would fetch and decode itself; see the end of predict.py."""
    assert typing.get_type_hints(predict.Predictor().run)["image"] is str
    assert f"@concurrent(max={serving.SLOTS})" in inspect.getsource(predict)
