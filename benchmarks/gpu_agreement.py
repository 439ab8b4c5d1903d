"""Whether the GPU's bfloat16 engine gives the answers of float32: the best class of many pictures, and the logits.

    python benchmarks/gpu_agreement.py --data DIR [--model convmixer_256_8_cifar10] [--count 1000] [--device cuda]

DIR is a folder of CIFAR-10, whose hold-out is taken, or any folder of pictures. With --device cpu the same arithmetic
goes through PyTorch's operators. float32 runs on the CPU.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import MODEL, Parser, at_least_one, run
from convmixer import Classifier
from convmixer.engine import find_device
from convmixer.gpu.engine import GpuEngine
from convmixer.model import to_arrays
from train.data.cifar import find_layout, load_cifar, split_cifar

SLICE = 64  # pictures


class Fp8Engine(GpuEngine):
    """The 1x1 convolutions' operands in e4m3, with a scale for each row of the weight and each position. No faster."""

    @staticmethod
    def _product(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return (rounded(weight, 1) @ rounded(columns, 0)).bfloat16()


def rounded(x: torch.Tensor, axis: int) -> torch.Tensor:
    """What e4m3 leaves of ``x``, in float32; a scale for each line along ``axis``."""
    scale = x.float().abs().amax(axis, keepdim=True).clamp(min=1e-30) / 448  # the most of e4m3
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--count", type=at_least_one, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fp8", action="store_true", help="simulate 1x1 convolutions in 8 bits")
    options = parser.parse_args()
    try:
        device, exact = find_device(options.device), Classifier(options.model, device="cpu", engine="torch")
    except ValueError as error:  # no such device or model
        parser.error(str(error))
    engine = (Fp8Engine if options.fp8 else GpuEngine)(exact.config, to_arrays(exact.network), device)
    found = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in Image.registered_extensions())
    if find_layout(options.data):
        _, held_out = split_cifar(load_cifar(options.data, train=True), "holdout", None)
        found = [Image.fromarray(image) for image in held_out.images]
    found = found[: options.count]
    if not found:
        parser.error(f"there are no pictures in {options.data}")
    batches = [[exact.prepare(each) for each in found[at : at + SLICE]] for at in range(0, len(found), SLICE)]
    wanted, logits = (
        np.concatenate([one.run(np.stack(batch))[0] for batch in batches]) for one in (exact.engine, engine)
    )
    same, off = int((logits.argmax(1) == wanted.argmax(1)).sum()), logits - wanted
    relative = np.linalg.norm(off) / np.linalg.norm(wanted)
    print(f"{exact.name} on {device}: the same best class for {same} of {len(found)} pictures")
    print(f"logits off by {relative:.1e} of their norm, at most by {abs(off).max():.2g}")


if __name__ == "__main__":
    run(main)
