"""One block's layers on a GPU, each by itself: PyTorch's operators in both layouts against this project's kernels.

    python benchmarks/gpu_layer.py [--models imagenet_1536_20 ...] [--batch 256]
    python benchmarks/gpu_layer.py --device cpu --batch 1 --models cifar10       a rehearsal: its figures mean nothing

bfloat16, random feature maps, the fastest of three measurements by CUDA events, in milliseconds. Results are compared
with each other first. "copy" is the time of reading and writing the map once at this GPU's copying speed: no layer can
be faster, and one that is much slower does arithmetic, or reads more than once.
"""

import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

import torch
from torch import Tensor, nn

from benchmarks.gpu import MODELS
from benchmarks.gpu_clock import ceilings, seconds
from benchmarks.options import Parser, at_least_one
from convmixer.config import ConvMixerConfig
from convmixer.engine import find_device
from convmixer.gpu import ops
from train.recipes import RECIPES
from train.session import device_name

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
AGREE = 0.02  # relative difference that bfloat16 may make


def layers(config: ConvMixerConfig, side: int, batch: int, device: torch.device) -> dict[str, dict[str, Callable]]:
    """By layer and contestant, functions that give a result whose order of axes is (N, C, H, W), or (C, k, k)."""
    torch.manual_seed(0)
    dim, k = config.dim, config.kernel_size
    maps = torch.randn(2, batch, dim, side, side, device=device).bfloat16()
    taps = torch.randn(dim, k, k, device=device) / k
    weight = (torch.randn(dim, dim, device=device) / dim**0.5).bfloat16()
    vectors = bias, scale, shift = [torch.randn(dim, device=device) for _ in range(3)]
    narrow_taps, narrow_bias = taps[:, None].bfloat16(), bias.bfloat16()
    norm = nn.BatchNorm2d(dim).to(device).eval()
    with torch.no_grad():
        norm.weight.copy_(scale * (norm.running_var + norm.eps).sqrt())
        norm.bias.copy_(shift)
    activation = nn.GELU() if config.activation == "gelu" else nn.ReLU()
    table: dict[str, dict[str, Callable[[], Tensor]]] = {
        name: {} for name in ("depthwise", "depthwise block", "input gradient", "taps' gradient", "1x1", "1x1 block")
    }

    def convolve(x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, narrow_taps, narrow_bias, padding=k // 2, groups=dim)

    def backward(x: Tensor, grad: Tensor, which: int) -> Tensor:
        mask = [index == which for index in range(3)]
        pad, one = [k // 2] * 2, [1, 1]
        return torch.ops.aten.convolution_backward(grad, x, narrow_taps, None, one, pad, one, False, [0, 0], dim, mask)[
            which
        ]

    def block(x: Tensor) -> Tensor:
        return norm(activation(convolve(x))) + x

    def pointwise(x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight[:, :, None, None], narrow_bias)

    def pointwise_block(x: Tensor) -> Tensor:
        return norm(activation(pointwise(x)))

    for layout, memory_format in LAYOUTS.items():
        x, grad = (one.contiguous(memory_format=memory_format) for one in maps)
        compiled = [torch.compile(f, options={"layout_optimization": False}) for f in (block, pointwise_block)]
        table["depthwise"][layout] = lambda x=x: convolve(x)
        table["depthwise block"][layout] = lambda x=x: block(x)
        table["depthwise block"][f"{layout} compiled"] = lambda x=x, f=compiled[0]: f(x)
        table["input gradient"][layout] = lambda x=x, grad=grad: backward(x, grad, 0)
        table["taps' gradient"][layout] = lambda x=x, grad=grad: backward(x, grad, 1).squeeze(1)
        table["1x1"][layout] = lambda x=x: pointwise(x)
        table["1x1 block"][layout] = lambda x=x: pointwise_block(x)
        table["1x1 block"][f"{layout} compiled"] = lambda x=x, f=compiled[1]: f(x)

    x, grad = (one.transpose(0, 1).contiguous() for one in maps)
    zero, turned, flat = torch.zeros_like(bias), taps.flip(1, 2), x.flatten(1)

    def product() -> Tensor:
        return (weight @ flat).view_as(x)

    table["depthwise"]["ours"] = lambda: ops.depthwise(x, taps, bias).transpose(0, 1)
    table["depthwise block"]["ours"] = lambda: ops.mix_positions(x, taps, *vectors, config.activation).transpose(0, 1)
    table["input gradient"]["ours"] = lambda: ops.depthwise(grad, turned, zero).transpose(0, 1)
    table["taps' gradient"]["ours"] = lambda: ops.depthwise_taps(x, grad, k)
    table["1x1"]["ours"] = lambda: torch.addmm(narrow_bias[:, None], weight, flat).view_as(x).transpose(0, 1)
    table["1x1 block"]["ours"] = lambda: ops.activate(product(), *vectors, config.activation).transpose(0, 1)
    return table


@torch.no_grad()
def main() -> int:
    parser = Parser(prog="benchmarks/gpu_layer.py", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--batch", type=at_least_one, default=256)
    parser.add_argument("--device", default="cuda", help="cpu to rehearse")
    options = parser.parse_args()
    try:
        device = torch.device(find_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    ceiling = ceilings(device)
    product, copy = ceiling["product_flops"] / 1e12, ceiling["copy_bytes"] / 1e12
    print(f"{device_name(device)}, PyTorch {torch.__version__}; at most {product:.1f} TFLOP/s, {copy:.2f} TB/s")
    for model in options.models:
        config, side = RECIPES[model].model, RECIPES[model].preprocessing.size // RECIPES[model].model.patch_size
        bytes_ = 2 * 2 * options.batch * config.dim * side * side
        print(f"\n{model}: {config.dim} x {side} x {side}, kernel {config.kernel_size}, batch {options.batch}")
        print(f"copy {1000 * bytes_ / ceiling['copy_bytes']:.3f} ms", flush=True)
        for layer, contestants in layers(config, side, options.batch, device).items():
            wanted = next(iter(contestants.values()))().float()
            for name, call in contestants.items():
                print(f"  {layer:<16} {name:<14} {measured(call, wanted, device)}", flush=True)
    return 0


def measured(call: Callable[[], Tensor], wanted: Tensor, device: torch.device) -> str:
    """Milliseconds, and the difference from ``wanted``; or in one line why there are none."""
    try:
        difference = float((call().float() - wanted).norm() / wanted.norm())
        if not difference < AGREE:
            return f"WRONG, off by {difference:.1e}"
        fastest = min(seconds(call, device, 0.05) for _ in range(3))
    except Exception as error:  # of whatever kind: the others go on
        return f"failed ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    return f"{1000 * fastest:9.3f} ms   difference {difference:.1e}"


if __name__ == "__main__":
    sys.exit(main())
