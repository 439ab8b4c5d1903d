"""What Cog's command line reads without running it, by the rules of Cog 0.23: predict.py, cog.yaml, .dockerignore."""

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
from file_server import FileServer, Resource

import predict
from convmixer import zoo
from serving.__main__ import SLOTS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "predict.py").read_text()
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())
BAKED = "convmixer_768_32"  # what the original page on Replicate answered with


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


def test_cog_yaml_has_keys_that_cog_takes():
    build = {"python_version", "python_requirements", "gpu", "cuda", "cudnn", "system_packages", "run", "sdk_version"}
    assert set(CONFIG) <= {"build", "environment", "image", "run"}  # of the rest, each is deprecated
    assert set(CONFIG["build"]) <= build
    assert CONFIG["build"]["python_version"] == "3.12"  # a text: 3.10 as a number would be 3.1
    assert CONFIG["build"]["gpu"] is True
    for command in CONFIG["build"]["run"]:
        assert isinstance(command, str) and "\n" not in command


def test_cog_yaml_names_the_predictor_and_the_requirements():
    file, name = CONFIG["run"].split(":")
    assert (ROOT / file).is_file()
    assert hasattr(predict, name)
    assert (ROOT / CONFIG["build"]["python_requirements"]).is_file()


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_versions_in_the_container_are_those_tested_here():
    gpu = pins("gpu")
    assert gpu == pins("core") | {"torch": "2.11.0"}  # the last one that Cog's table of CUDA versions knows
    assert pins("serve") == {"cog": CONFIG["build"]["sdk_version"]}
    (installs,) = (command for command in CONFIG["build"]["run"] if "install" in command)
    first, otherwise = installs.split(" || ")
    gradio = f"gradio=={pins('demo')['gradio']}"
    assert first == f"uv pip install --no-cache {gradio}"  # as Cog itself calls it there
    assert otherwise == f"python -m pip install --no-cache-dir {gradio}"  # should an image have no uv


def test_cog_takes_the_environment():
    refused = ["PATH", "LD_LIBRARY_PATH", "PYTHON*", "VIRTUAL_ENV", "R8_*", "REPLICATE_*", "LIBRARY_PATH", "CUDA_*"]
    refused += ["NVIDIA_*", "NV_*", "PGET_*", "HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER", "KUBERNETES_*"]
    names = [entry.split("=")[0] for entry in CONFIG["environment"]]
    assert names
    assert not [name for name in names for pattern in refused if fnmatch.fnmatchcase(name, pattern)]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the project out of the container."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    parents = [path, *map(str, Path(path).parents)]
    anywhere = [f"*/{pattern[3:]}" for pattern in patterns if pattern.startswith("**/")]
    matches = any(fnmatch.fnmatch(f"/{parent}", pattern) for parent in parents for pattern in anywhere)
    return matches or any(parent in patterns for parent in parents)


def test_the_container_gets_what_it_needs():
    package = [
        str(path.relative_to(ROOT)) for path in (ROOT / "convmixer").rglob("*") if path.suffix in {".py", ".txt"}
    ]
    assert len(package) > 5
    page = ("demo/app.py", "demo/page.py", "demo/page.css", "demo/page.js")
    for path in ("predict.py", "cog.yaml", "LICENSE", *page, *package):
        assert not ignored(path), path
    assert not ignored(str(zoo.MODELS["convmixer_256_8_cifar10"].shipped.relative_to(ROOT)))
    assert not ignored(".cog/tmp/requirements.txt")  # some versions of Cog refuse to build otherwise


@pytest.mark.parametrize("path", [".git/HEAD", ".venv/bin/python", "data/x.bin", "runs/x/last.pt", "convmixer/x.pyc"])
def test_the_container_gets_nothing_large_or_private(path):
    assert ignored(path)


# The weights in the container. The command of cog.yaml runs with this machine in place of the two sources.


class Bake:
    """Runs the build's commands with other addresses and another folder."""

    def __init__(self, web: FileServer, folder: Path):
        self.web, self.folder = web, folder
        entry = zoo.MODELS[BAKED]
        self.sources = f"https://huggingface.co/{entry.repo}/resolve/main/model.safetensors", entry.release

    def serve(self, number: int, size: int) -> None:
        self.web.resources[f"/{number}"] = Resource(bytes(size))

    def run(self) -> bool:
        variable = CONFIG["environment"][0]
        for command in CONFIG["build"]["run"]:
            if command.startswith("uv pip "):
                continue  # packages, which are here already
            for number, source in enumerate(self.sources):
                command = command.replace(source, self.web.url(f"/{number}"))
            assert "https://" not in command  # no other address than the zoo's
            command = command.replace(variable.removeprefix("CONVMIXER_CACHE="), str(self.folder))
            command = command.replace("--retry 3", "--noproxy '*'")
            if subprocess.run(["sh", "-c", command], timeout=60, check=False).returncode:
                return False
        return True


@pytest.fixture
def bake(tmp_path, monkeypatch) -> typing.Iterator[Bake]:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path / "baked"))
    with FileServer() as web:
        yield Bake(web, tmp_path / "baked")


def test_the_first_source_is_baked_in(bake):
    bake.serve(0, 85_000_000)
    bake.serve(1, 86_000_000)
    assert bake.run()
    assert zoo.resolve("auto") == (BAKED, bake.folder / f"{BAKED}.safetensors")
    assert [path.stat().st_size for path in bake.folder.iterdir()] == [85_000_000]


@pytest.mark.parametrize("first", [None, 2_000], ids=["missing", "an apology"])
def test_the_second_source_is_baked_in_otherwise(bake, first):
    if first:
        bake.serve(0, first)
    bake.serve(1, 86_000_000)
    assert bake.run()
    assert zoo.resolve("auto") == (BAKED, bake.folder / f"{BAKED}.pth.tar")
    assert [path.stat().st_size for path in bake.folder.iterdir()] == [86_000_000]


def test_a_container_without_weights_is_not_built(bake):
    bake.serve(1, 2_000)
    assert not bake.run()
    assert zoo.local_path(BAKED) is None
