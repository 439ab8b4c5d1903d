"""What `cog build` takes, by the rules of Cog 0.23: cog.yaml and cog.cpu.yaml, .dockerignore, serving/prepare.sh.

tests/test_container.py builds with it.
"""

import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

import predict
from convmixer import zoo

GPU, CPU = (yaml.safe_load((ROOT / name).read_text()) for name in ("cog.yaml", "cog.cpu.yaml"))


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_containers_have_what_is_tested_here_and_differ_in_the_gpu_alone():
    (command,) = GPU["build"]["run"]
    assert "\n" not in command and command.endswith(" gpu")
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


@pytest.fixture
def prepare(tmp_path):
    """A function that runs prepare.sh with some commands there. Gives its output and what it ran."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "serving").mkdir()
    shutil.copy(ROOT / "serving" / "prepare.sh", tmp_path / "serving")
    for name in ("sh", "basename", "dirname", "cp", "mkdir"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))

    def run(*words: str, tools=(), weights: str = "") -> tuple[str, list[str]]:
        for name in ("apt-get", "python", "chmod", "rm", *tools):
            (tmp_path / "bin" / name).write_text(STAND_IN)
            (tmp_path / "bin" / name).chmod(0o755)
        names = {"PATH": str(tmp_path / "bin"), "CONVMIXER_CACHE": str(tmp_path / "cache"), "WEIGHTS": weights}
        output = subprocess.check_output(["sh", "serving/prepare.sh", *words], cwd=tmp_path, env=names, text=True)
        return output, (tmp_path / "log").read_text().splitlines()

    return run


@pytest.mark.parametrize("name", ["model.safetensors", "any.pth.tar"])
def test_a_compiler_goes_again_and_the_weights_are_where_the_zoo_looks(prepare, name, tmp_path, monkeypatch):
    (tmp_path / name).write_text("the weights")
    output, ran = prepare(weights=name)
    compiled = ran.index(f"python -m convmixer.cpu.compiler {tmp_path / 'cache' / 'kernels'}")
    assert ran.index("apt-get install -qqy --no-install-recommends g++") < compiled
    assert ran.index("apt-get purge -qqy --auto-remove g++ curl git wget xz-utils") > compiled
    assert output == "" and not [line for line in ran if "gpu" in line]
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    suffix = name[name.index(".") :]
    assert zoo.local_path("convmixer_768_32") == tmp_path / "cache" / f"convmixer_768_32{suffix}"


def test_a_compiler_that_was_there_stays_and_without_a_download_the_shipped_model(prepare, tmp_path):
    output, ran = prepare("gpu", tools=["g++"])
    assert not [line for line in ran if line.startswith("apt-get") and "g++" in line]
    assert "python -m convmixer.gpu.ahead" in ran
    assert output == "convmixer_768_32 could not be downloaded: the image has the shipped model alone.\n"
