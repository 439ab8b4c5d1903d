"""What every contestant of benchmarks/inference.py is given: one checkpoint, one ONNX file and one set of pictures.

    python -m benchmarks.inference_models MODEL FOLDER PICTURES [onnx]     in the repository

writes MODEL.safetensors, with onnx MODEL.onnx, and pictures.npy into FOLDER. A process of its own, so that what
PyTorch keeps of this work is not in memory while the contestants run.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

MODELS = ("convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_256_8_cifar10")
ONNX_PACKAGES = ("onnx", "onnxscript")  # that the project's exporter needs
CALIBRATION = 4  # random pictures from which batch norm's statistics are taken


@dataclass(frozen=True)
class Cell:
    """One model at one batch size, and the files that hold it."""

    model: str
    batch: int
    folder: Path
    threads: int | None = None  # None: as each library chooses

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.model}.safetensors"

    @property
    def onnx(self) -> Path:
        return self.folder / f"{self.model}.onnx"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures.npy"


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of the packages that are not installed."""
    return [package for package in packages if importlib.util.find_spec(package) is None]


def random_network(config, size: int, seed: int = 0):
    """A `convmixer.ConvMixer` for pictures of ``size`` pixels, in evaluation mode, with random weights.

    PyTorch's initial weights with batch norm in training would not do: through 32 blocks such a network amplifies the
    rounding of float32 to 2e-4 of its logits, and nothing could be compared. So batch norm's variances have a floor,
    biases keep most values where ReLU lets them through, and the residual branches are half as large: rounding then
    stays below 1e-5. Logits are around 10, features around 1, and no step of the arithmetic is trivial.
    """
    import torch

    from convmixer.model import ConvMixer

    def take_statistics(norm: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance.clamp(min=0.3 * variance.median().item()))

    torch.manual_seed(seed)
    network = ConvMixer(config).eval()
    with torch.no_grad():
        hooks = []
        for place, module in network.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.bias.uniform_(0, 1)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5).mul_(0.5 if ".fn." in place else 1)
                module.bias.normal_(std=0.2)
                hooks.append(module.register_forward_pre_hook(take_statistics))
        network.head.weight.mul_(16)
        network(torch.randn(CALIBRATION, config.in_chans, size, size))
        for hook in hooks:
            hook.remove()
    return network


def random_checkpoint(name: str):
    """The named architecture with random weights, as a `convmixer.Checkpoint`."""
    from convmixer.labels import imagenet_labels
    from convmixer.weights import Checkpoint
    from convmixer.zoo import MODELS as ZOO

    entry = ZOO[name]
    network = random_network(entry.config, entry.preprocessing.size)
    return Checkpoint(name, entry.config, network.state_dict(), imagenet_labels(), entry.preprocessing, {}, {})


def write(name: str, folder: Path, pictures: int, onnx: bool) -> None:
    """Writes the files of a `Cell`: the shipped model as it is, the others with random weights.

    pictures.npy: normalised float32 (pictures, 3, size, size), normal random numbers.
    """
    import numpy as np

    from convmixer import zoo
    from convmixer.export import export_onnx
    from convmixer.weights import save_checkpoint

    cell, entry = Cell(name, pictures, folder), zoo.MODELS[name]
    save_checkpoint(cell.checkpoint, zoo.load(name) if entry.shipped else random_checkpoint(name))
    shape = (pictures, entry.config.in_chans, entry.preprocessing.size, entry.preprocessing.size)
    np.save(cell.pictures, np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    if onnx and not missing(ONNX_PACKAGES):
        export_onnx(cell.checkpoint, cell.onnx)


if __name__ == "__main__":
    name, folder, pictures, *onnx = sys.argv[1:]
    write(name, Path(folder), int(pictures), bool(onnx))
