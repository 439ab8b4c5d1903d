"""One epoch of training, one of evaluation, and the last steps to the input."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from convmixer.model import ConvMixerConfig, build
from convmixer.preprocessing import CIFAR10
from train import loop
from train.data.batches import Part, normalise
from train.distributed import World
from train.loop import Finish
from train.plan import Plan
from train.recipe import Augmentation, Recipe
from train.schedule import onecycle
from train.state import NOTHING_YET, new_state
from train.watch import Watch

TINY = Recipe(
    "tiny", ConvMixerConfig(16, 2, 5, 2, num_classes=10), CIFAR10, epochs=5, batch_size=8, micro_batch=8, amp="off"
)
CPU = torch.device("cpu")


def batches(n: int, size: int = 8) -> list[Part]:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (n, size, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, (n, size))
    return [Part(*pair) for pair in zip(torch.from_numpy(pixels), torch.from_numpy(labels), strict=True)]


def train_epoch(state, recipe: Recipe, parts: list[Part], amp: str = "off") -> dict:
    """One epoch of the given parts; gives the sums that the epoch's row is made from, and the mean loss."""
    plan = Plan(sum(len(part.labels) for part in parts), recipe.batch_size, recipe.micro_batch, recipe.drop_last)
    finish = Finish(recipe, torch.channels_last, CPU)
    state.step, state.running = 0, NOTHING_YET.copy()
    assert loop.train_epoch(state, state.network, lambda *_: parts, plan, finish, World(CPU), amp, Watch())
    return {**state.running, "loss": state.running["loss"] / state.running["seen"]}


def test_steps_are_the_published_optimizers():
    """One epoch equals a plain loop with the authors' AdamW and schedule, on plain modules."""
    recipe = dataclasses.replace(TINY, ema=0.5)
    state = new_state(recipe, CPU, "off")
    plain = build(TINY.model)
    plain.load_state_dict(state.network.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.005)
    for i, part in enumerate(batches(3)):
        optimizer.param_groups[0]["lr"] = onecycle((i + 1) / 3, 5, 0.05)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(normalise(part.images, CIFAR10)), part.labels).backward()
        optimizer.step()
    start = state.exported.head.weight.clone()
    sums = train_epoch(state, recipe, batches(3))
    assert state.exported.head.weight.ne(start).any()  # the moving average follows
    assert state.exported.head.weight.ne(state.network.head.weight).any()
    assert (sums["seen"], sums["skipped"]) == (24, 0)
    assert state.optimizer.param_groups[0]["lr"] == onecycle(1, 5, 0.05)
    for (name, a), b in zip(state.network.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-3), name  # Adam's first steps are +-lr: signs decide


def test_accumulated_parts_have_the_gradient_of_their_mean():
    """Parts of 3, 3 and 2 pictures count by their size. Batch norm sees parts, so that it stands still here."""
    recipe = dataclasses.replace(TINY, micro_batch=3, lr=0.0)
    whole = batches(1)[0]
    parts = [Part(whole.images[part], whole.labels[part]) for part in Plan(8, 8, 3, False).parts(0, 0)]
    state = new_state(recipe, CPU, "off")
    for module in state.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode: None  # keeps its running statistics
            module.training = False
    plain = build(TINY.model).eval()
    plain.load_state_dict(state.network.state_dict())
    nn.functional.cross_entropy(plain(normalise(whole.images, CIFAR10)), whole.labels).backward()
    train_epoch(state, recipe, parts)
    for (name, a), b in zip(state.network.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("settings", [{"opt": "muon", "lr": 0.03}, {"opt": "nesterov", "lr": 0.2, "sched": "cosine"}])
def test_training_learns(settings):
    recipe = dataclasses.replace(TINY, **{"epochs": 20, "lr": 0.01} | settings)
    state = new_state(recipe, CPU, "off")
    losses = []
    for epoch in range(20):
        state.epoch = epoch
        losses.append(train_epoch(state, recipe, batches(2))["loss"])
    assert losses[-1] < losses[0] / 2  # it can learn sixteen pictures by heart
    if recipe.opt == "muon":  # takes the 1x1 convolutions alone
        (muon,) = [group for group in state.optimizer.param_groups if not group["use_fallback"]]
        assert [tuple(p.shape) for p in muon["params"]] == [(16, 16, 1, 1)] * 2
        assert "exp_avg_sq" not in state.optimizer.state[muon["params"][0]]


def finished(epoch: int = 0, step: int = 0, count: int = 8, **settings):
    """A part's pictures as they are normalised, its labels, and what the network gets of both."""
    recipe, part = dataclasses.replace(TINY, **settings), batches(1, count)[0]
    return normalise(part.images, CIFAR10), part.labels, *Finish(recipe, torch.channels_last, CPU)(part, epoch, step, 0)


def test_smaller_and_erased_pictures_reach_the_network():
    sizes = [finished(epoch, image_sizes=((0, 16), (1, 24)))[2].shape[2:] for epoch in range(2)]
    assert sizes == [(16, 16), (24, 24)]
    plain, _, x, _ = finished(augmentation=Augmentation(reprob=1.0))
    erased = (x == 0).all(1, keepdim=True)  # timm erases with the mean colour, which is 0 once normalised
    assert (erased.flatten(1).sum(1) >= 12).all()  # at least 2 % of each picture
    assert torch.equal(x, plain * ~erased)


def test_mixed_pictures_have_mixed_targets():
    settings = {"label_smoothing": 0.1, "augmentation": Augmentation(mixup=0.5)}
    plain, labels, x, targets = finished(**settings)
    share = ((x[0] - plain[7]) / (plain[0] - plain[7])).nanmedian()  # mixed with those from the other end
    assert 0 < share < 1
    assert torch.allclose(x[0], share * plain[0] + (1 - share) * plain[7], atol=1e-4)
    smooth = nn.functional.one_hot(labels, 10) * 0.9 + 0.01
    assert torch.allclose(targets[0], share * smooth[0] + (1 - share) * smooth[7], atol=1e-4)
    assert torch.equal(finished(**settings)[2], x)
    assert not torch.equal(finished(step=1, **settings)[2], x)
    plain, _, x, _ = finished(count=7, **settings)
    assert torch.equal(x[6], plain[6])  # without a partner


def test_gradients_are_clipped_where_the_recipe_says_so():
    recipe = dataclasses.replace(TINY, clip_grad=1e-9)
    state = new_state(recipe, CPU, "off")
    train_epoch(state, recipe, batches(1))
    assert nn.utils.get_total_norm(p.grad for p in state.network.parameters()) == pytest.approx(1e-9, rel=1e-2)


@pytest.mark.parametrize(("amp", "limit"), [("bf16", 0.02), ("fp16", 0.005)])
def test_mixed_precision_stays_near_full_precision(amp, limit):
    exact = train_epoch(new_state(TINY, CPU, "off"), TINY, batches(1))["loss"]
    state = new_state(TINY, CPU, amp)
    loss = train_epoch(state, TINY, batches(1), amp)["loss"]
    assert loss != exact and loss == pytest.approx(exact, rel=limit)
    assert state.scaler.is_enabled() == (amp == "fp16")
    assert all(p.dtype == torch.float32 for p in state.network.parameters())


def test_evaluation_counts_every_picture_once():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    images, labels = torch.randn(23, 1, 4, 4), torch.randint(0, 10, (23,))
    counts = loop.evaluate(network, zip(images.split(8), labels.split(8), strict=True), 10)
    logits = network(images).detach()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)  # how many classes are above the true one
    assert counts["images"] == 23
    assert (counts["top1"], counts["top5"]) == (int((ranks == 0).sum()), int((ranks < 5).sum()))
    assert counts["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    pairs = torch.stack([labels, logits.argmax(1)], dim=1).tolist()
    assert counts["confusion"].tolist() == [
        [pairs.count([truth, answer]) for answer in range(10)] for truth in range(10)
    ]
