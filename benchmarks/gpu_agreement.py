"""Whether the GPU's bfloat16 engine gives the answers of float32: the best class of many pictures, and the logits.

    python benchmarks/gpu_agreement.py --data DIR [--model convmixer_256_8_cifar10] [--count 1000] [--device cuda]

DIR is a folder of CIFAR-10, whose hold-out is taken, or any folder of pictures. With --device cpu the same arithmetic
goes through PyTorch's operators. float32 runs on the CPU.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

import torch
from PIL import Image

from benchmarks.options import Parser, at_least_one
from convmixer import Classifier
from convmixer.classifier import choose_device
from convmixer.gpu.engine import GpuEngine
from train.cifar import find_layout, load_cifar, split_cifar

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SLICE = 64


def pictures(data: Path, count: int):
    """Paths, or PIL images of CIFAR's hold-out."""
    if find_layout(data):
        _, held_out = split_cifar(load_cifar(data, train=True), "holdout", None)
        return [Image.fromarray(image) for image in held_out.images[:count]]
    return sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]


def main() -> int:
    parser = Parser(prog="benchmarks/gpu_agreement.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="convmixer_256_8_cifar10")
    parser.add_argument("--count", type=at_least_one, default=1000)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    try:
        device, exact = choose_device(options.device), Classifier(options.model, device="cpu")
    except ValueError as error:  # no such device or model
        parser.error(str(error))
    engine, found = GpuEngine(exact.network, device), pictures(options.data, options.count)
    if not found:
        parser.error(f"there are no pictures in {options.data}")
    same, wanted, off, largest = 0, [], [], 0.0
    for start in range(0, len(found), SLICE):
        batch = torch.stack([exact.prepare(picture) for picture in found[start : start + SLICE]])
        wanted.append(exact.logits(batch))
        off.append(engine(batch) - wanted[-1])
        same += int(((wanted[-1] + off[-1]).argmax(1) == wanted[-1].argmax(1)).sum())
        largest = max(largest, float(off[-1].abs().max()))
    relative = float(torch.cat(off).norm() / torch.cat(wanted).norm())
    print(f"{exact.name} on {device}: the same best class for {same} of {len(found)} pictures")
    print(f"logits off by {relative:.1e} of their norm, at most by {largest:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
