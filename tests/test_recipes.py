"""The recipes against what their authors published, flag by flag, and how they are chosen and changed.

The ImageNet settings: https://github.com/locuslab/convmixer#training; what that command leaves open is the default of
the train.py beside it. The CIFAR-10 settings: https://github.com/locuslab/convmixer-cifar10, README and train.py. Where
code and not the recipe decides a value, it is read from the object that the code makes.
"""

import math
import random
import re
import shlex
from dataclasses import asdict, dataclass, fields, replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import nn
from torchvision.transforms import ColorJitter, InterpolationMode, RandomHorizontalFlip, RandomVerticalFlip

from convmixer.config import count_parameters
from train import loop
from train.data.batches import Part, training_transform
from train.distributed import World
from train.loop import Finish, choose_amp, train_epoch
from train.plan import Plan
from train.recipe import Recipe
from train.recipes import RECIPES
from train.run import parse
from train.schedule import rate_at_step
from train.state import TrainingState, new_state
from train.watch import Watch

CPU = torch.device("cpu")
IMAGENET_IMAGES, CIFAR_IMAGES = 1_281_167, 50_000  # of the training sets


@dataclass(frozen=True)
class Built:
    """A recipe and what the training code makes of it, with a tiny network."""

    recipe: Recipe
    state: TrainingState
    finish: Finish
    transform: object
    plan: Plan  # on the authors' number of GPUs

    def in_transform(self, kind: type):
        """The one transform of this kind; None where there is none."""
        found = [t for t in self.transform.transforms if isinstance(t, kind)]
        assert len(found) <= 1
        return found[0] if found else None

    def decay_by_dimensions(self) -> dict[int, set[float]]:
        """The weight decays that parameters of each number of dimensions get."""
        decays: dict[int, set[float]] = {}
        for group in self.state.optimizer.param_groups:
            for parameter in group["params"]:
                decays.setdefault(parameter.ndim, set()).add(group["weight_decay"])
        return decays

    def rate(self, t: float) -> float:
        """The learning rate of the step that ends at ``t``, in epochs; t lies on the end of a step."""
        step = round(t * self.plan.steps) - 1
        epoch, step = divmod(step, self.plan.steps)
        return rate_at_step(self.recipe, epoch, step, self.plan.steps)


@cache
def build(name: str) -> Built:
    recipe = RECIPES[name]
    tiny = replace(recipe, model=replace(recipe.model, dim=8, depth=1))
    images, processes = (IMAGENET_IMAGES, 10) if name.startswith("imagenet") else (CIFAR_IMAGES, 1)
    return Built(
        recipe,
        new_state(tiny, CPU, "off"),
        Finish(recipe, torch.channels_last, CPU),
        training_transform(recipe),
        Plan(images, recipe.batch_size, recipe.micro_batch, recipe.drop_last, processes),
    )


# flag: (published value, how to read it). (d) marks a default of the authors' train.py, not given in the command.
IMAGENET = {
    "distributed_train.sh 10, -b 64: in all": (640, lambda b: b.recipe.batch_size),
    "-b 64: in one pass": ({64}, lambda b: {s.stop - s.start for r in range(10) for s in b.plan.parts(0, r)}),
    "-b 64: passes a step": (1, lambda b: len(b.plan.parts(0, 0))),
    "--opt adamw": (torch.optim.AdamW, lambda b: type(b.state.optimizer)),
    "--opt-betas (d)": ((0.9, 0.999), lambda b: b.state.optimizer.defaults["betas"]),
    "--opt-eps=1e-3": ({1e-3}, lambda b: {g["eps"] for g in b.state.optimizer.param_groups}),
    "--weight-decay 2e-5, not on biases and norms (d)": (
        {1: {0.0}, 2: {2e-5}, 4: {2e-5}},
        lambda b: b.decay_by_dimensions(),
    ),
    "--lr 0.01": (0.01, lambda b: b.recipe.lr),
    "--lr: the same for all parameters": (1.0, lambda b: b.recipe.head_lr),
    "--warmup-epochs 0: first step": (0.01 * 5 / 2 / 2001, lambda b: b.rate(1 / 2001) * b.recipe.epochs),
    "--sched onecycle: at 1/5": (0.005, lambda b: b.rate(b.recipe.epochs / 5)),
    "--sched onecycle: at 2/5": (0.01, lambda b: b.rate(b.recipe.epochs * 2 / 5)),
    "--sched onecycle: at 3/5": (0.00525, lambda b: b.rate(b.recipe.epochs * 3 / 5)),
    "--sched onecycle: at 4/5": (0.0005, lambda b: b.rate(b.recipe.epochs * 4 / 5)),
    "--sched onecycle: at 9/10": (0.00025, lambda b: b.rate(b.recipe.epochs * 9 / 10)),
    "--sched onecycle: the last step": (0.0, lambda b: b.rate(b.recipe.epochs)),
    "--amp": ("auto", lambda b: b.recipe.amp),  # which form it takes is tested below
    "--input-size 3 224 224": ((3, 224), lambda b: (b.recipe.model.in_chans, b.recipe.preprocessing.size)),
    "--input-size: in all epochs": ((), lambda b: b.recipe.image_sizes),
    "--num-classes 1000": (1000, lambda b: b.recipe.model.num_classes),
    "--clip-grad 1.0": (1.0, lambda b: b.recipe.clip_grad),
    "--scale 0.08 1.0 (d)": ((0.08, 1.0), lambda b: b.in_transform(RandomResizedCropAndInterpolation).scale),
    "--ratio 3/4 4/3 (d)": ((3 / 4, 4 / 3), lambda b: b.in_transform(RandomResizedCropAndInterpolation).ratio),
    "--train-interpolation random (d)": (
        {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC},
        lambda b: set(b.in_transform(RandomResizedCropAndInterpolation).interpolation),
    ),
    "--hflip 0.5 (d)": (0.5, lambda b: b.in_transform(RandomHorizontalFlip).p),
    "--vflip 0 (d)": (None, lambda b: b.in_transform(RandomVerticalFlip)),
    "--color-jitter 0.4, off with --aa (d)": (None, lambda b: b.in_transform(ColorJitter)),
    "--aa rand-m9-mstd0.5-inc1: m9": ({9}, lambda b: {op.magnitude for op in b.in_transform(RandAugment).ops}),
    "--aa rand-m9-mstd0.5-inc1: mstd0.5": (
        {0.5},
        lambda b: {op.magnitude_std for op in b.in_transform(RandAugment).ops},
    ),
    "--aa rand-m9-mstd0.5-inc1: inc1": (
        {"PosterizeIncreasing", "SolarizeIncreasing", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing"}
        | {"SharpnessIncreasing"},
        lambda b: {op.name for op in b.in_transform(RandAugment).ops if "Increasing" in op.name},
    ),
    "--aa rand-...: two operations a picture (d)": (2, lambda b: b.in_transform(RandAugment).num_layers),
    "--aa rand-...: each with a chance of 0.5 (d)": (
        {0.5},
        lambda b: {op.prob for op in b.in_transform(RandAugment).ops},
    ),
    "--mixup 0.5": (0.5, lambda b: b.finish.mixup.mixup_alpha),
    "--cutmix 0.5": (0.5, lambda b: b.finish.mixup.cutmix_alpha),
    "--cutmix-minmax (d)": (None, lambda b: b.finish.mixup.cutmix_minmax),
    "--mixup-prob 1.0 (d)": (1.0, lambda b: b.finish.mixup.mix_prob),
    "--mixup-switch-prob 0.5 (d)": (0.5, lambda b: b.finish.mixup.switch_prob),
    "--mixup-mode batch (d)": ("batch", lambda b: b.finish.mixup.mode),
    "--smoothing 0.1 (d)": (0.1, lambda b: b.finish.mixup.label_smoothing),
    "--reprob 0.25": (0.25, lambda b: b.finish.erasing.probability),
    "--remode pixel": (True, lambda b: b.finish.erasing.per_pixel),
    "--recount 1 (d)": ((1, 1), lambda b: (b.finish.erasing.min_count, b.finish.erasing.max_count)),
    "--resplit off (d)": (0, lambda b: b.finish.erasing.num_splits),
    "random erasing of 0.02 to 1/3 of the area (d)": (
        (0.02, 1 / 3),
        lambda b: (b.finish.erasing.min_area, b.finish.erasing.max_area),
    ),
    "--sync-bn off (d)": (False, lambda b: b.recipe.sync_norm),
    "--model-ema off (d)": (None, lambda b: b.state.ema),
    "--initial-checkpoint none (d)": ("", lambda b: b.recipe.weights),
    "--seed 42 (d)": (42, lambda b: b.recipe.seed),
    "the last, smaller batch is left out (d)": (2001, lambda b: b.plan.steps),
    "evaluation: crop 0.96, bicubic": (
        (0.96, "bicubic"),
        lambda b: (b.recipe.preprocessing.crop_pct, b.recipe.preprocessing.interpolation),
    ),
}
IMAGENET_EPOCHS = {
    "imagenet_1536_20": 150,
    "imagenet_768_32": 300,
    "imagenet_1024_20": 150,
}  # the last is not published

# flag: (published value, how to read it). (d): a default of the authors' script, or written there as a constant.
CIFAR = {
    "--batch-size 512 (d)": (512, lambda b: b.recipe.batch_size),
    "the batch is not cut (d)": ([slice(0, 512)], lambda b: b.plan.parts(0, 0)),
    "the last, smaller batch is kept (d)": (98, lambda b: b.plan.steps),
    "the last, smaller batch: its pictures": (50_000 - 97 * 512, lambda b: b.plan.size(97)),
    "AdamW (d)": (torch.optim.AdamW, lambda b: type(b.state.optimizer)),
    "betas (d)": ((0.9, 0.999), lambda b: b.state.optimizer.defaults["betas"]),
    "eps 1e-8 (d)": ({1e-8}, lambda b: {g["eps"] for g in b.state.optimizer.param_groups}),
    "--wd=0.005, on all parameters": ({1: {0.005}, 2: {0.005}, 4: {0.005}}, lambda b: b.decay_by_dimensions()),
    "--lr-max=0.05": (0.05, lambda b: b.rate(b.recipe.epochs * 2 / 5)),
    "--lr-max: the same for all parameters": (1.0, lambda b: b.recipe.head_lr),
    "schedule: at 1/5": (0.025, lambda b: b.rate(b.recipe.epochs / 5)),
    "schedule: at 4/5": (0.0025, lambda b: b.rate(b.recipe.epochs * 4 / 5)),
    "schedule: the last step": (0.0, lambda b: b.rate(b.recipe.epochs)),
    "--clip-norm off (d)": (None, lambda b: b.recipe.clip_grad),
    "label smoothing off (d)": (0.0, lambda b: b.recipe.label_smoothing),
    "mixup and cutmix off (d)": (None, lambda b: b.finish.mixup),
    "EMA off (d)": (None, lambda b: b.state.ema),
    "from random weights (d)": ("", lambda b: b.recipe.weights),
    "AMP (d)": ("auto", lambda b: b.recipe.amp),
    "--scale=1.0": (1.0, lambda b: b.recipe.augmentation.scale),
    "ratio 1 (d)": ((1.0, 1.0), lambda b: b.recipe.augmentation.ratio),
    "flip 0.5 (d)": (0.5, lambda b: b.recipe.augmentation.flip),
    "--ra-n=2": (2, lambda b: b.recipe.augmentation.ra_n),
    "--ra-m=12": (12, lambda b: b.recipe.augmentation.ra_m),
    "32 pixels in all epochs (d)": ((32, ()), lambda b: (b.recipe.preprocessing.size, b.recipe.image_sizes)),
    "mean (d)": ((0.4914, 0.4822, 0.4465), lambda b: b.recipe.preprocessing.mean),
    "standard deviation (d)": ((0.2471, 0.2435, 0.2616), lambda b: b.recipe.preprocessing.std),
    "--hdim 256 --depth 8 --psize 2 --conv-ks 5 (d)": (
        {"dim": 256, "depth": 8, "patch_size": 2, "kernel_size": 5, "num_classes": 10, "in_chans": 3}
        | {"activation": "gelu"},
        lambda b: asdict(b.recipe.model),
    ),
}
CIFAR_SHORT = {
    "--epochs 25 (d)": (25, lambda b: b.recipe.epochs),
    "--jitter=0": (0.0, lambda b: b.recipe.augmentation.jitter),
    "--reprob=0": (None, lambda b: b.finish.erasing),
}
CIFAR_LONG = {
    "--epochs=100": (100, lambda b: b.recipe.epochs),
    "--jitter=0.2": (0.2, lambda b: b.recipe.augmentation.jitter),
    "--reprob=0.2": (0.2, lambda b: b.finish.erasing.probability),
    "erased with the mean colour (d)": (
        (False, False),
        lambda b: (b.finish.erasing.per_pixel, b.finish.erasing.rand_color),
    ),
    "one rectangle (d)": ((1, 1), lambda b: (b.finish.erasing.min_count, b.finish.erasing.max_count)),
    # torchvision's RandomErasing: area 0.02 to 0.33, aspect 0.3 to 3.3.
    "erased area of 0.02 (d)": (0.02, lambda b: b.finish.erasing.min_area),
    "erased area up to 0.33 (d)": (0.33, lambda b: b.finish.erasing.max_area),
    "aspect from 0.3 (d)": (math.log(0.3), lambda b: b.finish.erasing.log_aspect_ratio[0]),
    "aspect up to 3.3 (d)": (
        pytest.approx(3.3, abs=0.04),
        lambda b: math.exp(b.finish.erasing.log_aspect_ratio[1]),
    ),
}

ROWS = [
    *((name, flag, *row) for name in IMAGENET_EPOCHS for flag, row in IMAGENET.items()),
    *((name, "--epochs", epochs, lambda b: b.recipe.epochs) for name, epochs in IMAGENET_EPOCHS.items()),
    *(("cifar10", flag, *row) for flag, row in (CIFAR | CIFAR_SHORT).items()),
    *(("cifar10_100", flag, *row) for flag, row in (CIFAR | CIFAR_LONG).items()),
]


@pytest.mark.parametrize(("name", "flag", "published", "read"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_every_published_flag(name, flag, published, read):
    value = read(build(name))
    assert value == (pytest.approx(published, rel=1e-9) if isinstance(published, float) else published)


def test_a_new_field_must_be_held_against_the_published_settings():
    """The fields that the tables above know; memory_format, split and hold_out change no setting of the authors."""
    assert {field.name for field in fields(Recipe)} == {
        *("name", "model", "preprocessing", "epochs", "batch_size", "micro_batch", "drop_last", "lr", "head_lr"),
        "weight_decay",
        *(
            "opt",
            "sched",
            "warmup_epochs",
            "decay_all",
            "eps",
            "clip_grad",
            "label_smoothing",
            "augmentation",
            "image_sizes",
            "ema",
            "sync_norm",
            "amp",
        ),
        *("memory_format", "seed", "split", "hold_out", "freeze", "weights"),
    }


@pytest.mark.parametrize("seed", range(6))
def test_the_transform_is_the_one_that_timm_builds_from_the_authors_flags(seed, picture):
    theirs = create_transform(
        (3, 224, 224),
        is_training=True,
        use_prefetcher=True,
        scale=[0.08, 1.0],
        ratio=[3 / 4, 4 / 3],
        hflip=0.5,
        vflip=0.0,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )

    def apply(transform) -> np.ndarray:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return transform(image)

    image: Image.Image = picture(300, 260, seed)
    result = apply(build("imagenet_1536_20").transform)
    assert result.shape == (3, 224, 224)
    assert np.array_equal(result, apply(theirs))


@pytest.mark.parametrize(
    ("processes", "parts"),
    [(1, [64] * 10), (2, [64] * 5), (4, [53, 53, 54]), (5, [64, 64]), (8, [40, 40]), (10, [64])],
)
def test_an_epoch_is_the_same_on_any_number_of_gpus(processes, parts):
    for name in IMAGENET_EPOCHS:
        recipe = RECIPES[name]
        plan = Plan(IMAGENET_IMAGES, recipe.batch_size, recipe.micro_batch, recipe.drop_last, processes)
        assert plan.steps == IMAGENET_IMAGES // 640
        for step in (0, plan.steps - 1):
            stretches = [plan.parts(step, rank) for rank in range(processes)]
            assert [s.stop - s.start for s in stretches[0]] == parts
            covered = [i for stretch in stretches for s in stretch for i in range(s.start, s.stop)]
            assert covered == list(range(640 * step, 640 * (step + 1)))


def one_step(name: str, monkeypatch) -> tuple[list, list]:
    """The learning rates and the arguments of gradient clipping in two steps of four pictures."""
    recipe = RECIPES[name]
    tiny = replace(recipe, model=replace(recipe.model, dim=8, depth=1), batch_size=4)
    state, clipped, rates = new_state(tiny, CPU, "off"), [], []
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda p, *args, **options: clipped.append((args, options)))
    images = torch.zeros(4, 3, tiny.preprocessing.size, tiny.preprocessing.size, dtype=torch.uint8)
    train_epoch(
        state,
        state.network,
        lambda epoch, first_step: [Part(images, torch.arange(4))] * 2,
        Plan(8, 4, 4, True),
        Finish(tiny, torch.channels_last, CPU),
        World(CPU),
        "off",
        Watch(),
        after_step=lambda step, loss: rates.extend({group["lr"] for group in state.optimizer.param_groups}),
    )
    return rates, clipped


def test_the_loop_clips_and_sets_the_rate_as_published(monkeypatch):
    rates, clipped = one_step("imagenet_1536_20", monkeypatch)
    assert rates == pytest.approx([0.01 / 60 / 2, 0.01 / 60])  # 60 epochs are 2/5 of 150; one rate for all parameters
    assert clipped == [((1.0,), {})] * 2  # the norm over all parameters, of order 2
    rates, clipped = one_step("cifar10", monkeypatch)
    assert rates == pytest.approx([0.05 / 10 / 2, 0.05 / 10])
    assert clipped == []


@pytest.mark.parametrize(("capability", "amp", "scaled"), [((7, 5), "fp16", True), ((8, 0), "bf16", False)])
def test_mixed_precision_is_theirs_on_their_gpu(monkeypatch, capability, amp, scaled):
    """--amp was fp16 with a scaled loss on the RTX 8000 and 2080 Ti, of capability 7.5."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_amp(RECIPES["imagenet_1536_20"].amp, torch.device("cuda")) == amp
    assert build("imagenet_1536_20").state.scaler.is_enabled() is False
    tiny = replace(RECIPES["cifar10"], model=replace(RECIPES["cifar10"].model, dim=8, depth=1))
    assert new_state(tiny, CPU, amp).scaler.is_enabled() is scaled


def test_smoothing_is_in_the_targets():
    """0.1 over 1000 classes, as timm's mixup_target: 0.9 + 0.1 / 1000 for the true class where nothing was mixed in."""
    finish = build("imagenet_1536_20").finish
    images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)  # a lone picture has no partner to be mixed with
    _, targets = finish(Part(images, torch.tensor([7])), 0, 0, 0)
    assert targets[0, 7].item() == pytest.approx(0.9 + 1e-4)
    assert targets[0, 8].item() == pytest.approx(1e-4)
    assert targets.sum().item() == pytest.approx(1.0)
    assert nn.CrossEntropyLoss()(torch.zeros(1, 1000), targets).item() == pytest.approx(math.log(1000))


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        ("imagenet_1536_20", 51_625_960, (1536, 20, 9, 7, 1000, "gelu")),
        ("imagenet_768_32", 21_110_248, (768, 32, 7, 7, 1000, "relu")),
        ("imagenet_1024_20", 24_383_464, (1024, 20, 9, 14, 1000, "gelu")),
        ("cifar10", 594_186, (256, 8, 5, 2, 10, "gelu")),
        ("cifar10_100", 594_186, (256, 8, 5, 2, 10, "gelu")),
        ("cifar10_muon", 594_186, (256, 8, 5, 2, 10, "gelu")),
        ("cifar10_progressive", 594_186, (256, 8, 5, 2, 10, "gelu")),
        ("cifar10_paper", 706_570, (256, 8, 9, 1, 10, "gelu")),
    ],
)
def test_published_networks(name, parameters, shape):
    model = RECIPES[name].model
    assert count_parameters(model) == parameters
    assert (
        *(model.dim, model.depth, model.kernel_size, model.patch_size, model.num_classes, model.activation),
    ) == shape


def documented_commands() -> list[str]:
    source = (ROOT / "train" / "recipes.py").read_text()
    return re.findall(r"# ((?:torchrun [^\n]*|python )train/run\.py [^\n]*)", source)


def test_every_recipe_has_its_command_and_the_command_gives_it():
    commands, names = documented_commands(), []
    for command in commands:
        launcher, _, arguments = command.partition("train/run.py")
        run = parse(shlex.split(arguments))
        names.append(run.recipe.name)
        start = {name: getattr(RECIPES[run.recipe.name], name) for name in ("weights", "model", "preprocessing")}
        assert replace(run.recipe, **start) == RECIPES[run.recipe.name], command
        assert run.recipe.name == "finetune" or start == {name: getattr(run.recipe, name) for name in start}
        assert (run.data, run.resume) == ("DIR", False)
        if launcher.startswith("torchrun"):
            assert launcher == "torchrun --nproc-per-node 10 "  # as the authors
    assert sorted(names) == sorted(RECIPES)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "finetune"])
def test_any_field_can_be_overridden(name):
    words = ["--epochs", "3", "--model.dim", "128", "--augmentation.mixup", "0.2", "--preprocessing.crop-pct", "0.5"]
    recipe = RECIPES[name]
    changed = parse(["--recipe", name, "--data", "DIR", *words, "--workers", "10"])
    assert changed.workers == 10
    assert changed.recipe == replace(
        recipe,
        epochs=3,
        model=replace(recipe.model, dim=128),
        augmentation=replace(recipe.augmentation, mixup=0.2),
        preprocessing=replace(recipe.preprocessing, crop_pct=0.5),
    )


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [("--epoch", "--epochs"), ("--augmentation.mixpu", "--augmentation.mixup"), ("--model.dims", "--model.dim")],
)
def test_a_mistyped_field_gets_a_suggestion(mistyped, meant, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--recipe", "imagenet_1536_20", "--data", "DIR", mistyped, "0.2"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert mistyped in error
    assert re.search(rf"{re.escape(meant)}(?![\w-])", error)
