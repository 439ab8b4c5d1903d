"""The recipes against what their authors published, flag by flag, their commands, and the schedules.

The ImageNet settings: https://github.com/locuslab/convmixer#training; what that command leaves open is the default of
the train.py beside it. The CIFAR-10 settings: https://github.com/locuslab/convmixer-cifar10, README and train.py. Where
code and not the recipe decides a value, it is read from the object that the code makes.
"""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing

from convmixer.config import ConvMixerConfig
from convmixer.preprocessing import CIFAR10, IMAGENET
from train.data.batches import training_transform
from train.data.samples import seed_generators
from train.loop import Finish, choose_amp
from train.recipe import Augmentation, Recipe
from train.recipes import RECIPES
from train.run import parse
from train.schedule import image_size_at, onecycle, rate_at_step
from train.state import new_state

CPU = torch.device("cpu")


def optimizer_of(recipe: Recipe) -> tuple:
    """Its kind, betas and eps, and the weight decay of parameters of 1, 2 and 4 dimensions."""
    optimizer = new_state(replace(recipe, model=replace(recipe.model, dim=8, depth=1)), CPU, "off").optimizer
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    (eps,) = {group["eps"] for group in optimizer.param_groups}
    return type(optimizer), optimizer.defaults["betas"], eps, decay


def test_the_imagenet_recipes_are_the_authors_command(picture, monkeypatch):
    recipe = RECIPES["imagenet_1536_20"]
    for name, epochs, model in (
        ("imagenet_768_32", 300, ConvMixerConfig(768, 32, kernel_size=7, patch_size=7, activation="relu")),
        ("imagenet_1024_20", 150, ConvMixerConfig(1024, 20, kernel_size=9, patch_size=14)),  # no epochs are published
    ):
        assert RECIPES[name] == replace(recipe, name=name, epochs=epochs, model=model)
    assert recipe == Recipe(
        name="imagenet_1536_20",
        model=ConvMixerConfig(1536, 20, kernel_size=9, patch_size=7),
        preprocessing=IMAGENET,
        epochs=150,
        batch_size=640,  # distributed_train.sh 10, -b 64
        micro_batch=64,
        drop_last=True,
        lr=0.01,
        decay_all=False,  # not on biases and norms: the default
        weight_decay=2e-5,
        eps=1e-3,
        clip_grad=1.0,
        label_smoothing=0.1,  # the default
        augmentation=recipe.augmentation,  # below, as it comes out
        seed=42,  # the default
    )
    assert (IMAGENET.size, IMAGENET.crop_pct, IMAGENET.interpolation) == (224, 0.96, "bicubic")
    assert optimizer_of(recipe) == (torch.optim.AdamW, (0.9, 0.999), 1e-3, {1: 0.0, 2: 2e-5, 4: 2e-5})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_amp(recipe.amp, torch.device("cuda")) == "fp16"  # --amp was, on their RTX 8000
    finish = Finish(recipe, torch.channels_last, CPU)
    assert vars(finish.mixup) == vars(Mixup(mixup_alpha=0.5, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=1000))
    assert vars(finish.erasing) == vars(RandomErasing(0.25, mode="pixel", device="cpu"))
    theirs = create_transform(
        (3, 224, 224),
        is_training=True,
        use_prefetcher=True,
        scale=[0.08, 1.0],  # this and the next: the defaults
        ratio=[3 / 4, 4 / 3],
        color_jitter=0.4,  # the default, which --aa switches off
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",  # --train-interpolation: the default
    )

    for seed in range(6):
        changed = []
        for transform in (training_transform(recipe), theirs):
            seed_generators(seed)
            changed.append(transform(picture(300, 260, seed)))
        assert np.array_equal(*changed)


@pytest.mark.parametrize(("name", "epochs", "rest"), [("cifar10", 25, 0.0), ("cifar10_100", 100, 0.2)])
def test_the_cifar_recipes_are_the_authors_commands(name, epochs, rest):
    recipe = RECIPES[name]
    assert recipe == Recipe(
        name=name,
        model=ConvMixerConfig(dim=256, depth=8, patch_size=2, kernel_size=5, num_classes=10),
        preprocessing=CIFAR10,
        epochs=epochs,
        batch_size=512,
        drop_last=False,
        lr=0.05,
        weight_decay=0.005,
        head_lr=1.0,
        warmup_epochs=0,
        clip_grad=None,
        label_smoothing=0.0,
        image_sizes=(),
        ema=None,
        sync_norm=False,
        seed=0,
        augmentation=Augmentation(scale=1.0, ratio=(1.0, 1.0), flip=0.5, ra_n=2, ra_m=12, jitter=rest, reprob=rest),
    )
    assert (CIFAR10.mean, CIFAR10.std) == ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    assert optimizer_of(recipe) == (torch.optim.AdamW, (0.9, 0.999), 1e-8, {1: 0.005, 2: 0.005, 4: 0.005})
    finish = Finish(recipe, torch.channels_last, CPU)
    assert finish.mixup is None and (finish.erasing is None) == (rest == 0)
    if rest:  # as torchvision's, whose ranges are these
        theirs = RandomErasing(0.2, mode="const", max_area=0.33, max_aspect=3.3, device="cpu")
        assert vars(finish.erasing) == vars(theirs)


def test_every_recipe_has_its_command_and_the_command_gives_it():
    source, names = (ROOT / "train" / "recipes.py").read_text(), []
    for arguments in re.findall(r"# (?:torchrun --nproc-per-node 10|python) train/run\.py ([^\n]*)", source):
        run = parse(arguments.split())
        expected = RECIPES[run.recipe.name]
        if expected.weights:  # the start decides
            expected = replace(expected, **{n: getattr(run.recipe, n) for n in ("weights", "model", "preprocessing")})
        assert (run.recipe, run.data, run.resume) == (expected, "DIR", False)
        names.append(run.recipe.name)
    assert sorted(names) == sorted(RECIPES)


def test_the_learning_rates_are_those_that_the_authors_script_printed_after_each_epoch():
    """25 epochs of 98 steps, peak 0.05: https://github.com/locuslab/convmixer-cifar10"""
    published = [*np.linspace(0.005, 0.05, 10), *np.linspace(0.04525, 0.0025, 10), *np.linspace(0.002, 0, 5)]
    assert [rate_at_step(RECIPES["cifar10"], epoch, 97, 98) for epoch in range(25)] == pytest.approx(published)
    assert rate_at_step(RECIPES["imagenet_1536_20"], 0, 0, 2001) == pytest.approx(0.01 / 60 / 2001)
    assert onecycle(2, epochs=7, lr_max=1.0) == 1.0  # the corners lie on whole epochs: 7 * 2 // 5


@pytest.mark.parametrize("epochs", [1, 2, 4, 7])
def test_any_run_comes_near_its_peak_and_moves_at_every_step(epochs):
    recipe = replace(RECIPES["cifar10"], epochs=epochs, lr=1.0)
    rates = [rate_at_step(recipe, epoch, step, 20) for epoch in range(epochs) for step in range(20)]
    assert max(rates) == 1.0 and 0 < rates[0] < 0.2 and rates[-1] == 0.0
    assert all(rate != before for before, rate in pairwise(rates))


@pytest.mark.parametrize(
    ("sched", "warmup", "rates"),
    [
        ("cosine", 0, {0: 1.0, 10: 0.5, 15: (1 - 2**-0.5) / 2}),
        ("constant", 2, {0: 0.0, 1: 0.25, 2: 0.5, 4: 1.0, 19: 1.0}),
        ("wsd", 1, {0: 0.0, 1: 0.5, 2: 1.0, 15: 1.0, 18: 1 - 0.5**0.5}),
        ("onecycle", 0, {7: 1.0, 15: 0.05, 19: 0.0}),
    ],
)
def test_timms_schedules_depend_on_the_step_alone(sched, warmup, rates):
    """Ten epochs of two steps; asked for out of order, as a resumed run does."""
    recipe = replace(RECIPES["cifar10"], sched=sched, warmup_epochs=warmup, epochs=10, lr=1.0)
    for step, rate in reversed(rates.items()):
        assert rate_at_step(recipe, step // 2, step % 2, 2) == pytest.approx(rate), step


def test_image_sizes():
    sizes = RECIPES["cifar10_progressive"].image_sizes
    assert [image_size_at(epoch, sizes, 32) for epoch in (0, 7, 8, 13, 14, 99)] == [16, 16, 24, 24, 32, 32]
    assert image_size_at(3, (), 32) == image_size_at(0, ((5, 16),), 32) == 32
