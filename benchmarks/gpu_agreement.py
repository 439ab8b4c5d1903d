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

from benchmarks.options import Parser, at_least_one
from convmixer import zoo
from convmixer.engine import find_device
from convmixer.gpu.engine import GpuEngine
from convmixer.images import load_image
from convmixer.model import build, to_arrays
from convmixer.preprocessing import preprocess
from train.data.cifar import find_layout, load_cifar, split_cifar

FP8_MOST = 448  # of e4m3
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SLICE = 64


def pictures(data: Path, count: int):
    """Paths, or PIL images of CIFAR's hold-out."""
    if find_layout(data):
        _, held_out = split_cifar(load_cifar(data, train=True), "holdout", None)
        return [Image.fromarray(image) for image in held_out.images[:count]]
    return sorted(path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]


class Fp8Engine(GpuEngine):
    """The 1x1 convolutions' operands in e4m3, with a scale for each row of the weight and each position. No faster."""

    @staticmethod
    def _product(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return (rounded(weight, 1) @ rounded(columns, 0)).bfloat16()


def rounded(x: torch.Tensor, axis: int) -> torch.Tensor:
    """What e4m3 leaves of ``x``, in float32; a scale for each line along ``axis``."""
    scale = x.float().abs().amax(axis, keepdim=True).clamp(min=1e-30) / FP8_MOST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


@torch.inference_mode()
def main() -> int:
    parser = Parser(prog="benchmarks/gpu_agreement.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="convmixer_256_8_cifar10")
    parser.add_argument("--count", type=at_least_one, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fp8", action="store_true", help="simulate 1x1 convolutions in 8 bits")
    options = parser.parse_args()
    try:
        device, model = torch.device(find_device(options.device)), zoo.load(options.model)
    except ValueError as error:  # no such device or model
        parser.error(str(error))
    exact, preprocessing = build(model.config, model.state_dict).eval(), model.preprocessing
    kind = Fp8Engine if options.fp8 else GpuEngine
    engine, found = kind(model.config, to_arrays(exact), device), pictures(options.data, options.count)
    if not found:
        parser.error(f"there are no pictures in {options.data}")
    wanted, off = [], []
    for start in range(0, len(found), SLICE):
        images = [load_image(picture, target_size=preprocessing.resize) for picture in found[start : start + SLICE]]
        batch = np.stack([np.asarray(preprocess(image, preprocessing)) for image in images])
        wanted.append(exact(torch.from_numpy(batch)).numpy())
        off.append(engine.run(batch)[0] - wanted[-1])
    wanted, off = np.concatenate(wanted), np.concatenate(off)
    same = int(((wanted + off).argmax(1) == wanted.argmax(1)).sum())
    relative = np.linalg.norm(off) / np.linalg.norm(wanted)
    print(f"{model.name} on {device}: the same best class for {same} of {len(found)} pictures")
    print(f"logits off by {relative:.1e} of their norm, at most by {abs(off).max():.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
