"""The containers that `make container` builds, by a real Cog and a real Docker; COG and COG_FLAGS are its own."""

import json
import os
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT

from benchmarks.container import Container, docker, image_size, sample

COG = shlex.split(os.environ.get("COG", "cog"))
SHIPPED = "convmixer_256_8_cifar10"  # knows the sample for a ship
LEAST = ("--user=1000:1000", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module", params=["CPU", "GPU"])
def image(request) -> str:
    """The name of a container image, just built from the repository as it is."""
    if request.param == "GPU" and not os.environ.get("CONVMIXER_TEST_GPU_IMAGE"):
        pytest.skip("the image for a GPU takes minutes and 6 GB: CONVMIXER_TEST_GPU_IMAGE=1 builds it")
    if shutil.which(COG[0]) is None or subprocess.run("docker info", shell=True, capture_output=True).returncode:
        pytest.skip(f"there is no Docker that answers, or no command line of Cog ({COG[0]})")
    name = f"convmixer-test-{request.param.lower()}"
    subprocess.check_call(["make", "container", f"TAG={name}", *["CPU=1"][: request.param == "CPU"]], cwd=ROOT)
    return name


def test_the_container_needs_few_rights_answers_and_stops(image):
    with Container(image, *LEAST, "--memory=512m") as container:
        container.wait()
        output = container.ask(sample(), model=SHIPPED, top_k=3)
        assert (output["predictions"][0]["label"], output["engine"]) == ("ship", "kernel"), container.logs()
        assert container.memory() < 200e6 or not image.endswith("cpu")
        assert container.stop()[1] == 0


def test_cogs_command_line_answers(image, tmp_path):
    (tmp_path / "ship.png").write_bytes(sample())
    words = [*COG, "run", image, "-i", "image=@ship.png", "-i", f"model={SHIPPED}", "-i", "top_k=1"]
    output = json.loads(subprocess.check_output(words, cwd=tmp_path, text=True))
    assert output["predictions"][0]["label"] == "ship"


def test_the_image_has_what_runs_and_not_what_only_the_build_needs(image):
    def inside(script: str) -> str:
        return docker("run", "--rm", "--network=none", "--entrypoint=sh", image, "-c", script)

    expected = {".cog", "LICENSE", "cog.yaml", "cog.cpu.yaml", "convmixer", "predict.py", "serving"}
    assert set(inside("ls -A /src").split()) == expected
    described = json.loads(inside("cat /src/.cog/openapi_schema.json"))
    assert described == json.loads((ROOT / "serving" / "openapi_schema.json").read_text())
    assert not inside(
        "PATH=/usr/bin:/bin; for tool in g++ gcc cc clang++ curl wget git; do command -v $tool; done; true"
    )
    modules = "gradio pandas torchvision timm" + (" torch triton" if image.endswith("cpu") else "")
    code = "import sys, importlib.util as find; print(*filter(find.find_spec, sys.argv[1:]))"
    assert not inside(f'python -c "{code}" {modules}')
    assert image_size(image) < 560e6 or not image.endswith("cpu")
