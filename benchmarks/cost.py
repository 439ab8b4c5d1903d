"""What training a recipe costs: arithmetic by formula, hours from published runs, from a measurement here, or as given.

    python benchmarks/cost.py
    python benchmarks/cost.py --recipe imagenet_1536_20 --images-per-s 500 --gpus 8 --price 2.5
    python benchmarks/cost.py --recipe imagenet_1536_20 --measure [--pictures 2] [--steps 2]

A multiply-add is two FLOP. A training step is counted as three forward passes: the gradients of the weights and of the
inputs cost about one more each. Only convolutions and the head are counted; activations, norms and additions are not.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `train` and `convmixer` are found
    if "--measure" in sys.argv:
        from train.speed.memory import keep_memory

        keep_memory()  # before torch allocates anything, as train/run.py does

import argparse
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.harness import table
from convmixer.config import ConvMixerConfig
from convmixer.engine import find_device
from train.data.batches import Part
from train.distributed import World
from train.loop import Finish, choose_amp, train_epoch
from train.plan import Plan
from train.recipe import Recipe
from train.recipes import RECIPES
from train.schedule import image_size_at
from train.session import device_name
from train.speed.layout import FORMATS, choose_layout, wrap
from train.state import new_state
from train.watch import Watch

IMAGENET_IMAGES = 1_281_167  # training set of ImageNet-1k
CIFAR_IMAGES = {"holdout": 45_000, "tune": 40_000, "full": 50_000}  # train/data/cifar.py's splits
DAY = 86_400


@dataclass(frozen=True)
class Published:
    """A throughput that somebody published."""

    recipe: str
    gpus: int
    gpu: str
    peak: float | None  # TFLOP/s of its matrix units in fp16, by the maker's data sheet
    images_per_s: float  # of one GPU
    source: str


def multiply_adds(model: ConvMixerConfig, size: int) -> int:
    """The multiply-adds of a forward pass of one picture with a side of ``size`` pixels."""
    positions = (size // model.patch_size) ** 2
    stem = model.in_chans * model.patch_size**2 * model.dim
    block = model.kernel_size**2 * model.dim + model.dim**2  # depthwise, pointwise
    return positions * (stem + model.depth * block) + model.dim * model.num_classes


def kept_bytes(model: ConvMixerConfig, size: int, bytes_each: int = 2) -> int:
    """What a picture's forward pass keeps for the backward pass, of numbers of ``bytes_each``: whole feature maps only.

    A convolution and a batch norm keep their input. GELU keeps its own, too; ReLU its output, which the norm has.
    """
    maps = 3 if model.activation == "gelu" else 2  # kept by a convolution, its activation and its norm
    positions = (size // model.patch_size) ** 2
    # The stem's convolution keeps the picture, which is small.
    return positions * model.dim * bytes_each * (2 * model.depth * maps + maps - 1)


def images_of(recipe: Recipe) -> int:
    """The pictures that one process trains on in an epoch, a last batch that is left out not counted."""
    images = IMAGENET_IMAGES if recipe.model.num_classes == 1000 else CIFAR_IMAGES[recipe.split]
    plan = Plan(images, recipe.batch_size, recipe.micro_batch, recipe.drop_last)
    return sum(plan.size(step) for step in range(plan.steps))


def training_flop(recipe: Recipe) -> int:
    """The FLOP of the whole training, with the sizes that the pictures have in each epoch."""
    full = recipe.preprocessing.size
    sizes = [image_size_at(epoch, recipe.image_sizes, full) for epoch in range(recipe.epochs)]
    return images_of(recipe) * sum(3 * 2 * multiply_adds(recipe.model, size) for size in sizes)


def images_per_s(recipe: Recipe, days: float, gpus: int) -> float:
    """The throughput of one GPU of a run that took ``days`` in all, evaluations included."""
    return recipe.epochs * images_of(recipe) / (days * DAY) / gpus


AUTHORS = "the authors' rounded days, https://github.com/locuslab/convmixer/issues/12"
TIMM = "https://github.com/huggingface/pytorch-image-models, results/benchmark-train-amp-{}-pt112-cu113-rtx3090.csv"
PUBLISHED = (
    Published("imagenet_1536_20", 10, "RTX 8000", 130.5, images_per_s(RECIPES["imagenet_1536_20"], 9, 10), AUTHORS),
    Published("imagenet_768_32", 10, "RTX 8000", 130.5, images_per_s(RECIPES["imagenet_768_32"], 8, 10), AUTHORS),
    Published("imagenet_1536_20", 1, "RTX 3090", None, 50.10, TIMM.format("nchw")),
    Published("imagenet_768_32", 1, "RTX 3090", None, 187.17, TIMM.format("nhwc")),
    Published("imagenet_1024_20", 1, "RTX 3090", None, 307.81, TIMM.format("nchw")),
    Published("cifar10", 1, "RTX 2080 Ti", None, 50_000 / 42.6, "https://github.com/locuslab/convmixer-cifar10"),
)


def measure(recipe: Recipe, pictures: int, steps: int, device: torch.device) -> tuple[float, str]:
    """Images a second of train/loop.py's training step on random pictures, after one step of warm-up; and how."""
    recipe = replace(recipe, batch_size=pictures, micro_batch=pictures, epochs=1, weights="")
    amp = choose_amp(recipe.amp, device)
    layout = choose_layout(recipe, amp, device)
    recipe = replace(recipe, memory_format=layout.memory_format)
    state = new_state(recipe, device, amp, FORMATS[layout.memory_format])
    generator, size = torch.Generator().manual_seed(0), recipe.preprocessing.size
    images = torch.randint(0, 256, (pictures, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
    part = Part(images, torch.zeros(pictures, dtype=torch.int64, device=device))
    times: list[float] = []

    def after_step(step: int, loss: torch.Tensor) -> None:
        loss.item()  # waits for the device
        times.append(time.perf_counter())

    network, plan = wrap(state, recipe, World(device), layout), Plan(pictures * (steps + 1), pictures, pictures, True)
    finish, parts = Finish(recipe, FORMATS[layout.memory_format], device), [part] * (steps + 1)
    rest = World(device), amp, Watch()
    train_epoch(state, network, lambda epoch, first_step: parts, plan, finish, *rest, after_step=after_step)
    how = f"{device_name(device)}, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)
    how += f"; {amp}, {layout}; {steps} steps of {pictures} pictures after one of warm-up"
    if device.type == "cuda":
        how += f"; at most {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return pictures * steps / (times[-1] - times[0]), how


def arithmetic() -> str:
    rows = []
    for name, recipe in RECIPES.items():
        if not recipe.weights:  # of fine-tuning nobody knows the pictures
            size = recipe.preprocessing.size
            forward, kept = multiply_adds(recipe.model, size) / 1e9, kept_bytes(recipe.model, size) / 2**20
            flop = f"{training_flop(recipe):.2e}"
            rows.append([name, f"{forward:.2f}", recipe.epochs, f"{images_of(recipe):,}", flop, f"{kept:.1f}"])
    heads = ["recipe", "forward, GMAC", "epochs", "pictures", "training, FLOP", "MiB/picture"]
    kept = "MiB/picture: what a forward pass keeps for the backward pass, in 16 bits"
    return f"{table(heads, rows)}\n{kept}\n"


def row(recipe: Recipe, rate: float, gpus: int, peak: float | None, price: float | None, origin: str) -> list[object]:
    """One throughput of a GPU, and what the recipe's training then takes on ``gpus`` of them."""
    tflops = rate * 3 * 2 * multiply_adds(recipe.model, recipe.preprocessing.size) / 1e12
    # A picture of another size is taken to cost as much as its arithmetic.
    hours = training_flop(recipe) / (tflops * 1e12) / gpus / 3600
    share = peak and f"{100 * tflops / peak:.1f} %"
    money = None if price is None else f"{hours * gpus * price:.0f}"
    speed, length = [f"{rate:.2f}", f"{tflops:.3f}", share], [f"{hours:.1f}", f"{hours / 24:.2f}"]
    return [recipe.name, *speed, gpus, *length, money, origin]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recipes = [name for name, recipe in RECIPES.items() if not recipe.weights]
    parser.add_argument("--recipe", choices=recipes, default="imagenet_1536_20")
    parser.add_argument("--images-per-s", type=float, help="throughput of one GPU that you have measured")
    parser.add_argument("--gpus", type=int, default=1, help="taken to be as fast together as one times their number")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    parser.add_argument("--measure", action="store_true", help="time the training step on this machine")
    parser.add_argument("--pictures", type=int, default=2, help="in a measured step")
    parser.add_argument("--steps", type=int, default=2, help="measured steps")
    options = parser.parse_args()
    if min(options.pictures, options.steps, options.gpus) < 1 or (options.images_per_s or 1) <= 0:
        parser.error("--pictures, --steps, --gpus and --images-per-s must be above 0")
    recipe = RECIPES[options.recipe]
    print(arithmetic())
    rows = []
    for one in PUBLISHED:
        origin = f"{one.gpu}: {one.source}"
        rows.append(row(RECIPES[one.recipe], one.images_per_s, one.gpus, one.peak, None, origin))
    if options.images_per_s:
        rows.append(row(recipe, options.images_per_s, options.gpus, None, options.price, "--images-per-s"))
    if options.measure:
        rate, how = measure(recipe, options.pictures, options.steps, torch.device(find_device(None)))
        rows.append(row(recipe, rate, options.gpus, None, options.price, f"a measurement here: {how}"))
    heads = ["one GPU or machine", "images/s", "TFLOP/s", "of peak", "GPUs", "hours", "days", "money", "from"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
