"""The house keeps its order: who may import whom, and what importing the package costs."""

import ast
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
MAY_IMPORT = {
    "serving": {"convmixer", "numpy", "PIL"},
    # What the container has, Gradio, and of that two parts.
    "demo": {"convmixer", "demo", "numpy", "PIL", "gradio", "gradio_client", "starlette", "anyio"},
}
IN_FUNCTIONS = {"huggingface_hub", "urllib", "onnx", "onnxscript", "onnxruntime", "pillow_heif", "pyarrow", "ray"}
AT_THE_TOP_OF = {  # in convmixer/
    "torch": {"model.py", "torch_engine.py", "export.py", "pickles.py"}
    | {f"gpu/{name}.py" for name in ("ahead", "engine", "fused", "halves", "kernels", "ops", "strips")},
    "triton": {f"gpu/{name}.py" for name in ("ahead", "fused", "kernels", "strips")},
}


def python_files(place: str) -> list[Path]:
    return [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))


def imported(file: Path, everywhere: bool = True) -> set[str]:
    """The top-level packages that a file imports, but for annotations; everywhere: or at its top level only."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    names = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("place", [*MAY_NOT_IMPORT, *MAY_IMPORT])
def test_imports_stay_within_the_room(place):
    names = set().union(*map(imported, python_files(place)))
    if place in MAY_IMPORT:
        assert names <= MAY_IMPORT[place] | sys.stdlib_module_names
    else:
        assert names and not names & MAY_NOT_IMPORT[place]


def test_rarely_needed_packages_are_imported_where_they_are_used():
    for file in python_files("convmixer"):
        assert not imported(file, everywhere=False) & IN_FUNCTIONS, file
    for name in ("app", "models", "drawings", "space"):  # before the demo's command line is read
        assert not imported(ROOT / "demo" / f"{name}.py", everywhere=False) & {"gradio", "gradio_client", "starlette"}


@pytest.mark.parametrize("package", AT_THE_TOP_OF)
def test_pytorch_and_triton_are_imported_where_they_are_the_point(package):
    users = {file for file in python_files("convmixer") if package in imported(file, everywhere=False)}
    assert {str(file.relative_to(ROOT / "convmixer")) for file in users} == AT_THE_TOP_OF[package]


MODULES = [f"demo.{file.stem}" for file in sorted((ROOT / "demo").glob("*.py"))]
NO_TORCH = ["convmixer.preprocessing", "serving.decoder", "serving.decoding", "predict", "serving.__main__"]


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [(["convmixer"], DOORS), (NO_TORCH, {"torch"}), (MODULES, set())],
    ids=["the package loads no door", "who only decodes or starts does not wait for PyTorch", "the demo calls no host"],
)
def test_importing(modules, unwanted, python):
    code = (
        "import importlib, os, sys, time\n"
        "def hear(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'):\n"
        "        os.write(1, f'{event} {arguments}'.encode())\n"
        "sys.addaudithook(hear)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "time.sleep(0.5)\n"  # for threads
        f"print(*sorted({unwanted!r} & set(sys.modules)))\n"
    )
    run = python("-c", code)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run
