"""The house keeps its order: who may import whom, and what importing the package costs."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOORS = {"timm", "torchvision", "cog", "gradio", "train", "demo", "serving", "predict"}
MAY_NOT_IMPORT = {
    "convmixer": DOORS | {"requests", "tyro"},
    "train": {"cog", "gradio", "demo", "serving", "predict"},
    "predict.py": {"timm", "torchvision", "gradio", "train", "demo"},
}
SERVING_MAY_IMPORT = {"convmixer", "numpy", "PIL"}
# What the demo is made of: what the container has, Gradio, and of that two parts.
DEMO_MAY_IMPORT = {"convmixer", "demo", "numpy", "PIL", "gradio", "gradio_client", "starlette", "anyio"}
ONLY_INSIDE_FUNCTIONS = {
    "huggingface_hub",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pillow_heif",
    "pyarrow",
    "ray",
    "urllib",
}
WITH_PYTORCH = {"model.py", "torch_engine.py", "export.py", "pickles.py"}  # and convmixer/gpu/


def python_files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(nodes) -> set[str]:
    """The top-level packages that the import statements among ``nodes`` name."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("place", MAY_NOT_IMPORT)
def test_imports_stay_within_the_room(place):
    files = python_files(place)
    assert files
    for file in files:
        forbidden = imported(ast.walk(ast.parse(file.read_text()))) & MAY_NOT_IMPORT[place]
        assert not forbidden, f"{file} imports {forbidden}"


def test_rarely_needed_packages_are_imported_where_they_are_used():
    for file in python_files("convmixer"):
        tree = ast.parse(file.read_text())
        assert not imported(tree.body) & ONLY_INSIDE_FUNCTIONS, file


def test_pytorch_is_imported_where_it_is_the_point():
    users = {
        file.name
        for file in python_files("convmixer")
        if "torch" in imported(ast.parse(file.read_text()).body) and file.parent.name != "gpu"
    }
    assert users == WITH_PYTORCH


def test_triton_is_needed_where_kernels_are_written_and_compiled():
    users = [
        file.name for file in python_files("convmixer") if "triton" in imported(ast.walk(ast.parse(file.read_text())))
    ]
    assert sorted(users) == ["ahead.py", "fused.py", "kernels.py", "strips.py"]


def test_serving_imports_the_package_and_what_reads_pictures():
    for file in python_files("serving"):
        tree = ast.parse(file.read_text())
        types_only = [node.body for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node)]
        annotations = imported(itertools.chain(*types_only))
        forbidden = imported(ast.walk(tree)) - annotations - SERVING_MAY_IMPORT - sys.stdlib_module_names
        assert not forbidden, f"{file} imports {forbidden}"


def test_the_demo_imports_what_is_in_the_container_and_gradio():
    for file in python_files("demo"):
        forbidden = imported(ast.walk(ast.parse(file.read_text()))) - DEMO_MAY_IMPORT - sys.stdlib_module_names
        assert not forbidden, f"{file} imports {forbidden}"


def test_the_demo_loads_gradio_only_once_its_command_line_is_read():
    for file in ("app", "models", "drawings", "space"):
        names = imported(ast.parse((ROOT / "demo" / f"{file}.py").read_text()).body)
        assert not names & {"gradio", "gradio_client", "starlette"}, file


def test_importing_the_demo_calls_no_host():
    modules = [f"demo.{file.stem}" for file in python_files("demo")]
    code = (
        "import importlib, os, sys\n"
        "def hear(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        os.write(1, f'{event} {arguments}'.encode())\n"
        "sys.addaudithook(hear)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import time; time.sleep(0.5)"  # for threads
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run


def test_importing_the_package_loads_no_door():
    code = f"import sys, convmixer; print(*sorted({DOORS!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    "module", ["convmixer.preprocessing", "serving.decoder", "serving.decoding", "predict", "serving.__main__"]
)
def test_who_only_decodes_or_starts_does_not_wait_for_pytorch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_requirements_of_the_core_are_few():
    lines = (ROOT / "requirements" / "core.txt").read_text().splitlines()
    core = {"numpy", "pillow", "pillow-heif", "safetensors", "huggingface_hub"}
    assert {line.split("==")[0] for line in lines if line[0] != "#"} == core
