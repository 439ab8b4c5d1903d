"""What Cog's command line reads, by the rules of Cog 0.23: predict.py, cog.yaml and cog.cpu.yaml, .dockerignore.

tests/test_container.py builds with it.
"""

import ast
import fnmatch
import inspect
import io
import shutil
import subprocess
import tokenize
import typing
from pathlib import Path

import pytest
import yaml

import predict
from convmixer import zoo
from serving.__main__ import SLOTS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "predict.py").read_text()
CONFIGS = {name: yaml.safe_load((ROOT / name).read_text()) for name in ("cog.yaml", "cog.cpu.yaml")}


# predict.py, read as text.


def literal(node: ast.expr, constants: dict[str, object]) -> object:
    """What Cog makes of a value: a literal, or the name of a module's constant. Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    return ast.literal_eval(node)


def one_token(node: ast.expr) -> bool:
    """Whether a text is written as one plain literal: Cog does not join several, and knows no escapes."""
    segment = ast.get_source_segment(SOURCE, node)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(segment).readline) if token.string.strip()]
    return len(tokens) == 1 and segment[0] == '"' and "\\" not in segment


def parsed_inputs() -> dict[str, dict[str, ast.expr]]:
    """The annotation of each input of Predictor.run, and the keywords of its Input(...)."""
    (predictor,) = (node for node in ast.parse(SOURCE).body if getattr(node, "name", None) == "Predictor")
    (run,) = (node for node in predictor.body if getattr(node, "name", None) == "run")
    inputs = {}
    for argument, call in zip(run.args.args[1:], run.args.defaults, strict=True):
        assert isinstance(call, ast.Call) and call.func.id == "Input" and not call.args
        inputs[argument.arg] = {"annotation": argument.annotation} | {item.arg: item.value for item in call.keywords}
    return inputs


def parsed_constants() -> dict[str, object]:
    """The module's constants that are literals."""
    constants = {}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.List):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    return constants


def test_the_choices_are_the_zoos_models():
    assert ["auto", *zoo.MODELS] == predict.MODELS


def test_cog_reads_from_the_text_what_python_finds_when_it_runs():
    parameters = inspect.signature(predict.Predictor.run).parameters
    constants = parsed_constants()
    inputs = parsed_inputs()
    assert list(inputs) == list(parameters)[1:] == ["image", "model", "top_k", "heatmap"]
    for name, parsed in inputs.items():
        annotation = ast.unparse(parsed.pop("annotation"))
        assert annotation == ("Path" if name == "image" else parameters[name].annotation.__name__)
        field = parameters[name].default
        found = {key: literal(value, constants) for key, value in parsed.items()}
        assert found == {key: value for key, value in vars(field).items() if value is not None}


def test_every_input_has_a_description_that_cog_can_read():
    for name, parsed in parsed_inputs().items():
        assert one_token(parsed["description"]), name


def test_no_comment_stands_in_a_list_of_choices():
    (node,) = (
        node
        for node in ast.parse(SOURCE).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODELS"
    )
    assert "#" not in ast.get_source_segment(SOURCE, node)


def test_the_output_is_of_types_that_cog_knows():
    classes = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef)}
    fields = {
        name: {item.target.id: ast.unparse(item.annotation) for item in classes[name].body}
        for name in ("Prediction", "Output")
    }
    assert fields["Prediction"] == {"label": "str", "index": "int", "score": "float"}
    about = dict.fromkeys(("model", "engine", "precision"), "str")
    assert fields["Output"] == about | {"predictions": "list[Prediction]", "heatmap": "Optional[Path]"}


def test_the_container_gets_slots_from_a_number_in_the_text():
    (run,) = (node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.AsyncFunctionDef))
    assert [ast.unparse(decorator) for decorator in run.decorator_list] == [f"concurrent(max={SLOTS})"]


def test_cog_hands_the_picture_over_as_the_text_that_came():
    """What it takes for a Path it would fetch and decode itself; see the end of predict.py."""
    assert typing.get_type_hints(predict.Predictor().run)["image"] is str


# cog.yaml and the build.


@pytest.fixture(params=CONFIGS)
def config(request) -> dict:
    return CONFIGS[request.param]


def test_a_config_has_keys_that_cog_takes(config):
    build = {"python_version", "python_requirements", "gpu", "cuda", "cudnn", "system_packages", "run", "sdk_version"}
    assert set(config) <= {"build", "environment", "image", "run"}  # of the rest, each is deprecated
    assert set(config["build"]) <= build
    assert config["build"]["python_version"] == "3.12"  # a text: 3.10 as a number would be 3.1
    for command in config["build"]["run"]:
        assert isinstance(command, str) and "\n" not in command


def test_a_config_names_the_predictor_and_the_requirements(config):
    file, name = config["run"].split(":")
    assert (ROOT / file).is_file()
    assert hasattr(predict, name)
    assert (ROOT / config["build"]["python_requirements"]).is_file()


def test_the_two_containers_differ_in_the_gpu_alone():
    gpu, cpu = CONFIGS.values()
    (command,) = gpu["build"]["run"]
    ours = {"gpu": False, "python_requirements": "requirements/core.txt", "run": [command.removesuffix(" gpu")]}
    assert gpu["build"]["gpu"] is True and command.endswith(" gpu")
    assert cpu == gpu | {"build": gpu["build"] | ours, "environment": gpu["environment"][:1]}


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_versions_in_the_container_are_those_tested_here():
    gpu = pins("gpu")
    assert gpu == pins("core") | {"torch": "2.11.0"}  # the last one that Cog's table of CUDA versions knows
    assert {version["build"]["sdk_version"] for version in CONFIGS.values()} == {pins("serve")["cog"]}


def test_cog_takes_the_environment(config):
    refused = ["PATH", "LD_LIBRARY_PATH", "PYTHON*", "VIRTUAL_ENV", "R8_*", "REPLICATE_*", "LIBRARY_PATH", "CUDA_*"]
    refused += ["NVIDIA_*", "NV_*", "PGET_*", "HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER", "KUBERNETES_*"]
    names = [entry.split("=")[0] for entry in config["environment"]]
    assert names
    assert not [name for name in names for pattern in refused if fnmatch.fnmatchcase(name, pattern)]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the project out of the container: the last line that fits decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        anywhere = pattern.startswith("**/")
        names = [f"/{name}" if anywhere else name for name in (path, *map(str, Path(path).parents)) if name != "."]
        if any(fnmatch.fnmatchcase(name, pattern[1:] if anywhere else pattern) for name in names):
            verdict = not line.startswith("!")
    return verdict


def test_the_container_gets_what_it_needs():
    kinds = {".py", ".txt", ".cpp", ".h", ".safetensors"}
    rooms = [file for room in ("convmixer", "serving") for file in (ROOT / room).rglob("*") if file.suffix in kinds]
    assert len(rooms) > 20
    files = [str(file.relative_to(ROOT)) for file in rooms]
    for path in ("predict.py", *CONFIGS, "serving/prepare.sh", "LICENSE", ".cog/openapi_schema.json", *files):
        assert not ignored(path), path


UNWANTED = [".git/HEAD", ".venv/bin/python", "data/x.bin", "runs/x/last.pt", "convmixer/x.pyc", "demo/app.py", "docs/x"]
UNWANTED += ["convmixer/cpu/__pycache__/kernel.so", "convmixer/cpu/ahead/kernel.so", "serve.py", "tests/conftest.py"]


@pytest.mark.parametrize("path", UNWANTED)
def test_the_container_gets_nothing_large_or_private(path):
    assert ignored(path)


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
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("sh", "basename", "dirname", "cp", "mkdir"):
        (commands / name).symlink_to(shutil.which(name))
    (tmp_path / "serving").mkdir()
    shutil.copy(ROOT / "serving" / "prepare.sh", tmp_path / "serving")

    def run(*words: str, tools=(), weights: str = "") -> tuple[str, list[str]]:
        for name in ("apt-get", "python", "chmod", "rm", *tools):
            (commands / name).write_text(STAND_IN)
            (commands / name).chmod(0o755)
        environment = {"PATH": str(commands), "CONVMIXER_CACHE": str(tmp_path / "cache"), "WEIGHTS": weights}
        command = ["sh", "serving/prepare.sh", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, (tmp_path / "log").read_text().splitlines()

    return run


def test_a_compiler_that_was_not_there_goes_again(prepare, tmp_path):
    _, ran = prepare()
    compiled = ran.index(f"python -m convmixer.cpu.compiler {tmp_path / 'cache' / 'kernels'}")
    assert ran.index("apt-get install -qqy --no-install-recommends g++") < compiled
    assert ran.index("apt-get purge -qqy --auto-remove g++ curl git wget xz-utils") > compiled
    assert not [line for line in ran if "gpu" in line]


def test_a_compiler_that_was_there_stays(prepare):
    _, ran = prepare("gpu", tools=["g++"])
    assert [line for line in ran if line.startswith("apt-get")] == [
        "apt-get update -qq",
        "apt-get purge -qqy --auto-remove curl git wget xz-utils",
    ]
    assert "python -m convmixer.gpu.ahead" in ran


@pytest.mark.parametrize("name, suffix", [("model.safetensors", ".safetensors"), ("any.pth.tar", ".pth.tar")])
def test_the_weights_are_where_the_zoo_looks(prepare, name, suffix, tmp_path, monkeypatch):
    (tmp_path / name).write_text("the weights")
    output, _ = prepare(weights=name)
    assert output == ""
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "cache"))
    assert zoo.local_path("convmixer_768_32") == tmp_path / "cache" / f"convmixer_768_32{suffix}"


def test_without_an_address_that_answers_the_shipped_model_is(prepare, tmp_path):
    output, _ = prepare()
    assert output == "convmixer_768_32 could not be downloaded: the image has the shipped model alone.\n"
    assert not (tmp_path / "cache").exists()
