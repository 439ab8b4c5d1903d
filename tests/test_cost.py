"""What training costs: the formula against PyTorch's own counter, and the arithmetic made of it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import (
    IMAGENET_IMAGES,
    images_of,
    images_per_s,
    kept_bytes,
    main,
    measure,
    multiply_adds,
    training_flop,
)
from convmixer.model import ConvMixerConfig, build
from train.recipes import RECIPES

SMALL = ConvMixerConfig(dim=24, depth=3, kernel_size=5, patch_size=3, num_classes=7, in_chans=4)


def counted(model: ConvMixerConfig, size: int, pictures: int, backward: bool = False, device: str = "meta") -> int:
    """PyTorch's count of FLOP, two a multiply-add."""
    with torch.device(device):
        network, x = build(model), torch.zeros(pictures, model.in_chans, size, size)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".fn.0.weight" not in name)  # depthwise
    with FlopCounterMode(display=False) as counter:
        logits = network(x)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("size", "pictures", "device"), [(9, 1, "cpu"), (14, 3, "cpu"), (14, 3, "meta")])
def test_the_formula_on_a_small_network(size, pictures, device):
    """14 pixels hold four whole patches of 3 a side; what is left over at the edge is not seen."""
    assert 2 * pictures * multiply_adds(SMALL, size) == counted(SMALL, size, pictures, device=device)


@pytest.mark.parametrize(
    "name", ["imagenet_1536_20", "imagenet_768_32", "imagenet_1024_20", "cifar10", "cifar10_paper"]
)
def test_the_formula_on_the_published_networks(name):
    recipe = RECIPES[name]
    assert 2 * multiply_adds(recipe.model, recipe.preprocessing.size) == counted(
        recipe.model, recipe.preprocessing.size, pictures=1
    )


def test_a_training_step_is_about_three_forward_passes():
    """Exact but for the gradient of the pictures, which nobody needs.

    PyTorch counts the weight gradient of a depthwise convolution as if it were dense, so it is left out on both sides.
    """
    model = replace(RECIPES["imagenet_1536_20"].model, depth=2)
    stem, depthwise = (2 * 32**2 * 1536 * n for n in (3 * 7**2, 2 * 9**2))
    everything = 3 * 2 * multiply_adds(model, 224)
    assert counted(model, 224, 1, backward=True) == everything - stem - depthwise
    assert stem / everything < 0.02


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_feature_maps_that_training_keeps(activation, depth):
    model = ConvMixerConfig(dim=64, depth=depth, kernel_size=3, patch_size=2, num_classes=2, activation=activation)
    network, x = build(model), torch.randn(2, 3, 32, 32)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[:2] == (2, 64):  # feature maps, not weights or the picture
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = network(x)
    maps = [tensor for tensor in kept.values() if tensor.ndim == 4]
    assert sum(t.numel() * 4 for t in maps) == 2 * kept_bytes(model, 32, bytes_each=4)
    assert logits.requires_grad


def test_pictures_of_an_epoch():
    assert images_of(RECIPES["imagenet_1536_20"]) == 2001 * 640 == IMAGENET_IMAGES - 527  # the rest is left out
    assert images_of(RECIPES["cifar10"]) == 45_000  # 5,000 are held out
    assert images_of(replace(RECIPES["cifar10"], split="full")) == 50_000


def test_the_cost_follows_the_size_of_the_pictures():
    """Epochs 0-7 on 16 pixels, 8-13 on 24, 14-19 on 32: shares of 1/4, 9/16 and 1 but for the head."""
    whole = training_flop(replace(RECIPES["cifar10_progressive"], image_sizes=()))
    share = training_flop(RECIPES["cifar10_progressive"]) / whole
    assert share == pytest.approx((8 / 4 + 6 * 9 / 16 + 6) / 20, rel=1e-3)
    assert training_flop(RECIPES["cifar10_100"]) == 4 * training_flop(RECIPES["cifar10"])


def test_the_authors_days_as_a_throughput():
    """150 epochs of 1,280,640 pictures in 9 days on ten GPUs."""
    assert images_per_s(RECIPES["imagenet_1536_20"], 9, 10) == pytest.approx(24.704, abs=0.001)


def test_measuring_trains_for_real():
    recipe = replace(RECIPES["cifar10"], model=replace(RECIPES["cifar10"].model, dim=8, depth=1))
    rate, how = measure(recipe, 4, 3, torch.device("cpu"))
    assert rate > 0
    assert "3 steps of 4 pictures" in how
    mixed = replace(recipe, augmentation=RECIPES["imagenet_1536_20"].augmentation, clip_grad=1.0)
    assert measure(mixed, 2, 1, torch.device("cpu"))[0] > 0


def test_the_table(monkeypatch, capsys):
    words = ["--recipe", "imagenet_1024_20", "--images-per-s", "500", "--gpus", "8", "--price", "2.5"]
    monkeypatch.setattr("sys.argv", ["cost.py", *words])
    main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row and row[-1] == "--images-per-s"]
    name, rate, _, _, gpus, hours, days, money, _ = row
    expected = 150 * 1_280_640 / 500 / 8 / 3600
    assert (name, float(rate), int(gpus)) == ("imagenet_1024_20", 500, 8)
    assert float(hours) == pytest.approx(expected, abs=0.05)
    assert float(days) == pytest.approx(expected / 24, abs=0.005)
    assert float(money) == pytest.approx(expected * 8 * 2.5, abs=0.5)
    assert any(row and row[0] == "imagenet_1536_20" and row[3] == "5.8 %" for row in rows)  # the authors' GPUs


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--images-per-s", "-1"], ["--recipe", "finetune"]])
def test_wrong_usage(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["cost.py", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err
