"""`python -m serving` up to the start of Cog's server: its arguments, and the description of the API."""

import ast
import json
import os
import socket
import typing
from pathlib import Path

import pytest

import predict
from convmixer import zoo
from serving import __main__ as serving


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function that gives the exit status and the one line of a start that is refused."""
    monkeypatch.setattr(serving, "run_server", lambda *_: pytest.fail("the server would start"))
    monkeypatch.setattr(serving, "write_schema", lambda *_: None)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            serving.main([*arguments])
        code, error = stopped.value.code, capsys.readouterr().err
        code, error = (1, code + "\n") if isinstance(code, str) else (code, error)
        assert error.count("\n") == 1
        return code, error

    return call


@pytest.mark.parametrize(("option", "most"), [("--port", 65535), ("--slots", 256)])
@pytest.mark.parametrize("word", ["abc", "", "0", "1.5", "²", "65536"])
def test_a_number_that_is_none_gets_one_line(refusal, option, most, word):
    expected = f"python -m serving: argument {option}: {word!r} is not a number from 1 to {most}\n"
    assert refusal(f"{option}={word}") == (2, expected)


def test_a_server_that_could_not_work_is_not_started(refusal, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in refusal(f"--port={port}")[1]
    monkeypatch.setattr(os, "access", lambda *_: False)  # Cog's folder
    line = "cannot write there (it belongs to another user); give the server a /tmp of its own"
    assert line in refusal(f"--port={port}")[1]


# The description of the API; tests/test_container.py compares it with what Cog's command line makes.

SCHEMA = json.loads(serving.SCHEMA.read_text())
SOURCE = ast.parse(Path(predict.__file__).read_text())
KINDS = {"Path": "string", "str": "string", "int": "integer", "bool": "boolean"}


def resolved(schema: object) -> object:
    """A schema with what its references lead to in their place."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return resolved(SCHEMA["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in schema.items()}
    return [resolved(each) for each in schema] if isinstance(schema, list) else schema


def read_by_cog(node: ast.expr) -> object:
    """A value as Cog reads it off the text: a literal, or a constant that is one."""
    return predict.MODELS if isinstance(node, ast.Name) and node.id == "MODELS" else ast.literal_eval(node)


def test_the_description_fits_the_text_of_predict():
    (run,) = (node for node in ast.walk(SOURCE) if isinstance(node, ast.AsyncFunctionDef))
    inputs = SCHEMA["components"]["schemas"]["Input"]
    names = [argument.arg for argument in run.args.args[1:]]
    assert names == list(inputs["properties"]) == ["image", "model", "top_k", "heatmap"]
    for argument, call in zip(run.args.args[1:], run.args.defaults, strict=True):
        found = resolved(inputs["properties"][argument.arg])
        about = found | (found["allOf"][0] if "allOf" in found else {})
        field = {item.arg: read_by_cog(item.value) for item in call.keywords}
        assert (found["description"], found.get("default")) == (field["description"], field.get("default"))
        assert about["type"] == KINDS[ast.unparse(argument.annotation)]
        limits = [field.get(key) for key in ("choices", "ge", "le")]
        assert [about.get(key) for key in ("enum", "minimum", "maximum")] == limits
    assert inputs["required"] == ["image"] and inputs["properties"]["image"]["format"] == "uri"
    assert ["auto", *zoo.MODELS] == predict.MODELS
    assert [ast.unparse(decorator) for decorator in run.decorator_list] == [f"concurrent(max={serving.SLOTS})"]


def test_the_description_fits_the_output():
    output = SCHEMA["components"]["schemas"]["Output"]
    for kind, found in ((predict.Output, output), (predict.Prediction, output["properties"]["predictions"]["items"])):
        names = list(typing.get_type_hints(kind))
        assert list(found["properties"]) == names
        assert found["required"] == [name for name in names if name != "heatmap"]


def test_cog_hands_the_picture_over_as_the_text_that_came():
    """What it takes for a Path it would fetch and decode itself; see the end of predict.py."""
    assert typing.get_type_hints(predict.Predictor().run)["image"] is str
