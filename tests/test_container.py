"""The containers that `make container` builds, by a real Cog and a real Docker.

Both are needed, else these tests are skipped. COG and COG_FLAGS are `make container`'s. The image for a GPU takes
minutes and 6 GB: CONVMIXER_TEST_GPU_IMAGE=1 builds it too.
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.container import Container, docker, image_size, sample

ROOT = Path(__file__).resolve().parents[1]
COG = shlex.split(os.environ.get("COG", "cog"))
SHIPPED = "convmixer_256_8_cifar10"  # knows the sample for a ship
ORDINARY = ("--user", "1000:1000")
READ_ONLY = ("--read-only", "--tmpfs", "/tmp")
LEAST = (*ORDINARY, *READ_ONLY, "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "512m")

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module", params=["CPU", "GPU"])
def image(request) -> str:
    """The name of a container image, just built from the repository as it is."""
    if request.param == "GPU" and not os.environ.get("CONVMIXER_TEST_GPU_IMAGE"):
        pytest.skip("the image for a GPU takes minutes and 6 GB: CONVMIXER_TEST_GPU_IMAGE=1 builds it")
    if shutil.which(COG[0]) is None:
        pytest.skip(f"Cog's command line is not installed ({COG[0]})")
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("there is no Docker that answers")
    name = f"convmixer-test-{request.param.lower()}"
    words = ["make", "--silent", "container", f"TAG={name}", *(["CPU=1"] if request.param == "CPU" else [])]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-4000:]
    return name


@pytest.fixture
def picture_file(tmp_path) -> Path:
    path = tmp_path / "ship.png"
    path.write_bytes(sample())
    return path


def best(output: dict) -> str:
    return output["predictions"][0]["label"]


@pytest.mark.parametrize("options", [(), ORDINARY, READ_ONLY, LEAST], ids=["as it is", "user", "read-only", "least"])
def test_the_container_answers_and_stops(image, options):
    with Container(image, *options) as container:
        container.wait()
        output = container.ask(sample(), model=SHIPPED, top_k=3)
        assert best(output) == "ship"
        assert output["engine"] == "kernel", container.logs()
        assert container.stop()[1] == 0


def test_it_needs_no_network(image, picture_file):
    client = ["--volume", f"{ROOT}/docs/client.py:/client.py:ro", "--volume", f"{picture_file}:/ship.png:ro"]
    with Container(image, "--network", "none", *client) as container:
        assert docker("exec", container.id, "python", "/client.py", "/ship.png").startswith("/ship.png: ")


@pytest.mark.parametrize("command", ["run", "predict"])
def test_cogs_command_line_answers(image, command, picture_file):
    words = [*COG, command, image, "-i", f"image=@{picture_file}", "-i", f"model={SHIPPED}", "-i", "top_k=1"]
    done = subprocess.run(words, cwd=picture_file.parent, capture_output=True, text=True, check=False)
    assert best(json.loads(done.stdout)) == "ship", done.stderr


def inside(image: str, script: str) -> list[str]:
    """The lines that a shell script prints in the image."""
    return docker("run", "--rm", "--entrypoint", "sh", image, "-c", script).splitlines()


def test_what_only_the_build_needs_is_not_in_the_image(image):
    tools = "g++ gcc cc clang++ curl wget git"
    assert not inside(image, f"PATH=/usr/bin:/bin; for tool in {tools}; do command -v $tool; done; true")
    modules = "gradio pandas torchvision timm" + (" torch triton" if image.endswith("cpu") else "")
    code = "import sys, importlib.util as find; print(*filter(find.find_spec, sys.argv[1:]), sep='')"
    assert not inside(image, f'python -c "{code}" {modules} | grep . || true')


def test_the_project_in_the_image_is_what_runs(image):
    (found,) = inside(image, "cd /src && echo $(ls -A)")
    expected = {".cog", "LICENSE", "cog.yaml", "cog.cpu.yaml", "convmixer", "predict.py", "serving"}
    assert set(found.split()) == expected


def test_the_cpu_image_is_small(image):
    if not image.endswith("cpu"):
        pytest.skip("the other one has PyTorch and its CUDA")
    assert image_size(image) < 560e6  # of which the base may have 290, and uv, which Cog brings, 57
    with Container(image) as container:
        container.wait()
        container.ask(sample(), model=SHIPPED)
        assert container.memory() < 200e6
