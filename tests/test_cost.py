"""What training costs: the formula against PyTorch's own counter, and the table made of it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import kept_bytes, main, multiply_adds, training_flop
from convmixer.model import ConvMixerConfig, build
from train.recipes import RECIPES


@pytest.mark.parametrize("name", ["imagenet_768_32", "cifar10_paper"])
def test_the_formula_counts_as_pytorch_does(name):
    """Two FLOP a multiply-add; what is left over beside whole patches is not seen."""
    model, size = RECIPES[name].model, RECIPES[name].preprocessing.size + RECIPES[name].model.patch_size - 1
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(model)(torch.zeros(1, 3, size, size))
    assert 2 * multiply_adds(model, size) == counter.get_total_flops()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_the_feature_maps_that_training_keeps(activation):
    model = ConvMixerConfig(dim=64, depth=3, kernel_size=3, patch_size=2, num_classes=2, activation=activation)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.setdefault(tensor.data_ptr(), tensor), id):
        build(model)(torch.randn(2, 3, 32, 32))
    maps = [tensor for tensor in kept.values() if tensor.shape == (2, 64, 16, 16)]  # not weights, not the picture
    assert sum(tensor.nbytes for tensor in maps) == 2 * kept_bytes(model, 32, bytes_each=4)


def test_the_cost_follows_the_size_of_the_pictures():
    """Epochs 0-7 on 16 pixels, 8-13 on 24, 14-19 on 32: shares of 1/4, 9/16 and 1 but for the head."""
    whole = training_flop(replace(RECIPES["cifar10_progressive"], image_sizes=()))
    share = training_flop(RECIPES["cifar10_progressive"]) / whole
    assert share == pytest.approx((8 / 4 + 6 * 9 / 16 + 6) / 20, rel=1e-3)
    assert whole == 20 * 45_000 * 3 * 2 * multiply_adds(RECIPES["cifar10"].model, 32)  # 5,000 are held out


def test_the_table(call_main):
    words = ["--recipe", "imagenet_1024_20", "--images-per-s", "500", "--gpus", "8", "--price", "2.5"]
    out = call_main(main, *words)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    ((name, rate, _, _, gpus, hours, days, money, _),) = [row for row in rows if row and row[-1] == "--images-per-s"]
    expected = 150 * 2001 * 640 / 500 / 8 / 3600
    assert (name, float(rate), int(gpus)) == ("imagenet_1024_20", 500, 8)
    assert float(hours) == pytest.approx(expected, abs=0.05) and float(days) == pytest.approx(expected / 24, abs=0.005)
    assert float(money) == pytest.approx(expected * 8 * 2.5, abs=0.5)
    (theirs,) = [row for row in rows if row and row[0] == "imagenet_1536_20" and "RTX 8000" in row[-1]]
    assert (theirs[1], theirs[3]) == ("24.70", "5.8 %")  # 150 epochs of 1,280,640 pictures in 9 days on ten GPUs
    code, _, error = call_main(main, "--gpus", "0")
    assert code == 2 and "must be above 0" in error


def test_measuring_trains_for_real(call_main, monkeypatch):
    tiny = replace(RECIPES["imagenet_1536_20"], model=replace(RECIPES["imagenet_1536_20"].model, dim=8, depth=1))
    monkeypatch.setitem(RECIPES, "imagenet_1536_20", tiny)
    assert "2 steps of 3 pictures" in call_main(main, "--measure", "--pictures", 3, "--steps", 2)[1]
