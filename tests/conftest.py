"""What several test files need. Data that is not part of the project is looked for beside it, and skipped if absent."""

import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

# A shell has its background jobs ignore the one, nohup the other, and with them every server that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def empty_hub_cache(tmp_path_factory):
    """What timm has fetched on this machine does not change what "auto" means."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture
def photos() -> Path:
    """The folder of real photographs: dog.jpg, cat.jpg, pizza.jpg, shuttle.jpg."""
    folder = Path(os.environ.get("CONVMIXER_TEST_PHOTOS", SHARED_DATA / "photos"))
    if not (folder / "dog.jpg").exists():
        pytest.skip(f"the photographs are not at {folder} (CONVMIXER_TEST_PHOTOS names another folder)")
    return folder


@pytest.fixture
def cases() -> Path:
    """The folder of pictures that went wrong once, made from the photographs."""
    folder = Path(os.environ.get("CONVMIXER_TEST_CASES", ROOT.parent / "shared" / "cases")) / "pictures"
    if not folder.is_dir():
        pytest.skip(f"there are no such pictures at {folder} (CONVMIXER_TEST_CASES names the folder above it)")
    return folder


@pytest.fixture
def silent():
    """Any warning that reaches the test fails it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def no_decoding(monkeypatch):
    """Any attempt to decode pixels fails the test."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))


@pytest.fixture
def call_main(monkeypatch, capsys):
    """A function that runs the main() of a command in this process, with arguments; gives (code, stdout, stderr)."""

    def call(main, *arguments: object):
        name = main.__module__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return call


def write_checkpoint(
    folder: Path,
    seed: int = 0,
    classes: int = 10,
    dim: int = 16,
    depth: int = 2,
    size: int = 32,
    name: str = "random",
    activation: str = "gelu",
) -> Path:
    """Writes a checkpoint of a randomly initialised network and gives its path."""
    from convmixer.model import ConvMixer, ConvMixerConfig
    from convmixer.preprocessing import Preprocessing
    from convmixer.weights import Checkpoint, save_checkpoint

    torch.manual_seed(seed)
    config = ConvMixerConfig(dim, depth, kernel_size=5, patch_size=2, num_classes=classes, activation=activation)
    network = ConvMixer(config)
    with torch.no_grad():  # statistics as after training, so that batch norm is not the identity
        network.train()(torch.randn(8, 3, size, size))
    preprocessing = Preprocessing(size, 1.0, "bicubic", (0.5, 0.45, 0.4), (0.25, 0.2, 0.3))
    labels = tuple(f"label {index}" for index in range(classes))
    path = folder / f"{name}-{seed}.safetensors"
    save_checkpoint(path, Checkpoint(name, config, network.state_dict(), labels, preprocessing, {}, {}))
    return path


@pytest.fixture
def random_checkpoint(tmp_path):
    """`write_checkpoint` into the test's own folder."""
    return partial(write_checkpoint, tmp_path)


@pytest.fixture
def picture():
    """A function that draws a noisy RGB picture of a given size; the same every time."""

    def draw(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    return draw


def write_cifar10(parent: Path) -> Path:
    """A folder in CIFAR-10's binary layout: 200 training and 20 test pictures, each class a colour of its own."""
    folder = parent / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (10, 3, 1))
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = rng.integers(0, 10, 20 if name == "test_batch" else 40)
        pixels = (colours[labels] + rng.normal(0, 30, (len(labels), 3, 1024))).clip(0, 255).astype(np.uint8)
        records = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(len(labels), -1)], axis=1)
        records.tofile(folder / f"{name}.bin")
    return folder.parent


@pytest.fixture
def cifar10_folder(tmp_path) -> Path:
    """A folder in CIFAR-10's binary layout."""
    return write_cifar10(tmp_path)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Path:
    """The same for the whole session: not to be changed."""
    return write_cifar10(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """What starts train/run.py as processes of their own, without the seconds that their imports take."""
    from processes import Server

    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture
def python():
    """A function that runs Python in a process of its own, in the repository, and gives the finished process."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        options.setdefault("cwd", ROOT)
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, **options)

    return run


@pytest.fixture(scope="session")
def running(tmp_path_factory):
    """Cog's own server with six slots, for all tests that leave it as it was."""
    from cog_server import Server

    with Server(tmp_path_factory.mktemp("server"), "--slots", 6) as server:
        yield server


@pytest.fixture
def cog(running):
    """The running server, which must answer well after each test, whatever happened in it."""
    yield running
    running.is_well()


@pytest.fixture
def web():
    """A web server on this machine, without a file."""
    from file_server import FileServer

    with FileServer() as web:
        yield web
