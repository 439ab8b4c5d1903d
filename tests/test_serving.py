"""`python -m serving` up to the start of Cog's server, the description of the API, and what `cog build` takes."""

import inspect
import json
import os
import shutil
import socket
import subprocess
import typing

import pytest
import yaml
from conftest import ROOT

import predict
from convmixer import zoo
from serving import __main__ as serving
from serving.watcher import check_folder

SCHEMA = json.loads(serving.SCHEMA.read_text())["components"]["schemas"]
KINDS = {str: "string", int: "integer", bool: "boolean"}


@pytest.fixture
def refused(monkeypatch, call_main):
    """A function that gives the one line of a start that is refused."""
    monkeypatch.setattr(serving, "run_server", lambda *_: pytest.fail("the server would start"))
    monkeypatch.setattr(serving, "write_schema", lambda *_: None)

    def call(argument: str) -> str:
        code, _, error = call_main(serving.main, argument)
        return error.strip() if code == 2 else code

    return call


@pytest.mark.parametrize(("option", "most"), [("--port", 65535), ("--slots", 256)])
@pytest.mark.parametrize("word", ["abc", "", "0", "1.5", "²", "65536"])
def test_a_number_that_is_none_gets_one_line(refused, option, most, word):
    expected = f"python -m serving: argument {option}: {word!r} is not a number from 1 to {most}"
    assert refused(f"{option}={word}") == expected


def test_a_server_that_could_not_work_is_not_started(refused, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in refused(f"--port={port}")
    monkeypatch.setattr(os, "access", lambda *_: False)  # Cog's folder
    line = "cannot write there (it belongs to another user); give the server a /tmp of its own"
    assert line in refused(f"--port={port}")
    (tmp_path / "file").touch()  # as in a container with --read-only and no --tmpfs
    with pytest.raises(OSError, match=r"^Cog needs the folder .* --tmpfs /tmp$"):
        check_folder(str(tmp_path / "file" / "predictions"))


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
        names = list(typing.get_type_hints(kind))
        assert list(found["properties"]) == names
        assert found["required"] == [name for name in names if name != "heatmap"]


def test_cog_hands_the_picture_over_as_the_text_that_came_to_as_many_slots_as_elsewhere():
    """What it takes for a Path it would fetch and decode itself; see the end of predict.py."""
    assert typing.get_type_hints(predict.Predictor().run)["image"] is str
    assert f"@concurrent(max={serving.SLOTS})" in inspect.getsource(predict)


# What `cog build` takes; tests/test_container.py builds with it.

GPU, CPU = (yaml.safe_load((ROOT / name).read_text()) for name in ("cog.yaml", "cog.cpu.yaml"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_containers_have_what_is_tested_here_and_differ_in_the_gpu_alone():
    (command,) = GPU["build"]["run"]
    ours = {"gpu": False, "python_requirements": "requirements/core.txt", "run": [command.removesuffix(" gpu")]}
    assert GPU | {"build": GPU["build"] | ours, "environment": GPU["environment"][:1]} == CPU
    assert GPU["run"] == f"predict.py:{predict.Predictor.__name__}"
    assert GPU["build"]["python_version"] == "3.12"  # a text: 3.10 as a number would be 3.1
    assert GPU["build"]["sdk_version"] == pins("serve")["cog"]
    assert GPU["build"]["python_requirements"] == "requirements/gpu.txt"
    assert pins("gpu") == pins("core") | {"torch": "2.11.0"}  # the last one that Cog's table of CUDA versions knows


def test_the_container_gets_what_it_runs_and_nothing_else():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    needed = {".cog", "LICENSE", "cog.yaml", "cog.cpu.yaml", "convmixer", "predict.py", "serving"}
    assert lines[0] == "*" and {line[1:] for line in lines if line.startswith("!")} == needed
    assert lines[-3:] == ["**/__pycache__", "**/*.pyc", "convmixer/cpu/ahead"]  # compiled for this machine


# serving/prepare.sh, with stand-ins for all that it runs.

STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>log
case "$*" in
-c*) echo site-packages ;;
*download*) echo "$WEIGHTS"; test -n "$WEIGHTS" ;;
esac
"""


@pytest.mark.parametrize(
    ("weights", "tools", "words"), [("model.safetensors", [], []), ("any.pth.tar", ["g++"], ["gpu"]), ("", [], [])]
)
def test_the_build_leaves_kernels_and_weights_and_no_compiler(tmp_path, monkeypatch, weights, tools, words):
    for folder in ("bin", "serving"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "serving" / "prepare.sh", tmp_path / "serving")
    for name in ("sh", "basename", "dirname", "cp", "mkdir"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for name in ("apt-get", "python", "chmod", "rm", *tools):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    if weights:
        (tmp_path / weights).write_text("the weights")
    names = {"PATH": str(tmp_path / "bin"), "CONVMIXER_CACHE": str(tmp_path / "cache"), "WEIGHTS": weights}
    output = subprocess.check_output(["sh", "serving/prepare.sh", *words], cwd=tmp_path, env=names, text=True)
    ran = (tmp_path / "log").read_text().splitlines()
    compiled = ran.index(f"python -m convmixer.cpu.compiler {tmp_path / 'cache' / 'kernels'}")
    assert ("apt-get install -qqy --no-install-recommends g++" in ran[:compiled]) == (not tools)
    assert f"apt-get purge -qqy --auto-remove {'' if tools else 'g++ '}curl git wget xz-utils" in ran[compiled:]
    assert ("python -m convmixer.gpu.ahead" in ran) == bool(words)
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    wanted = weights and tmp_path / "cache" / f"convmixer_768_32{weights[weights.index('.') :]}"
    assert zoo.local_path("convmixer_768_32") == (wanted or None)
    told = "convmixer_768_32 could not be downloaded: the image has the shipped model alone.\n"
    assert output == ("" if weights else told)
