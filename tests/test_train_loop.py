"""One epoch of training, one of evaluation, and the fast depthwise convolution."""

import dataclasses

import pytest
import torch
from torch import nn

from convmixer.model import ConvMixerConfig
from convmixer.preprocessing import CIFAR10
from train import loop
from train.depthwise import DepthwiseConv2d, use_fast_depthwise
from train.recipes import Augmentation, Recipe

TINY = Recipe("tiny", ConvMixerConfig(16, 2, 5, 2, num_classes=10), epochs=5, batch_size=8, amp="off")
CPU = torch.device("cpu")


def batches(n: int, seed: int = 0) -> list:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=g),
            torch.randint(0, 10, (8,), generator=g),
            torch.zeros(8, 4, dtype=torch.int64),
        )
        for _ in range(n)
    ]


def test_the_fast_depthwise_convolution_has_the_same_gradients():
    torch.manual_seed(0)
    exact = nn.Conv2d(24, 24, 5, groups=24, padding=2).double()
    fast = nn.Conv2d(24, 24, 5, groups=24, padding=2)
    fast.load_state_dict(exact.state_dict())
    use_fast_depthwise(nn.Sequential(fast))
    assert type(fast) is DepthwiseConv2d
    x = torch.randn(3, 24, 9, 11)
    x64, x32 = x.double().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(3, 24, 9, 11)
    out64, out32 = exact(x64), fast(x32)
    out64.backward(grad.double())
    out32.backward(grad)
    pairs = [
        (out32, out64),
        (x32.grad, x64.grad),
        (fast.weight.grad, exact.weight.grad),
        (fast.bias.grad, exact.bias.grad),
    ]
    for a, b in pairs:
        assert a.shape == b.shape
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)


def test_only_depthwise_convolutions_are_switched():
    network = loop.new_state(TINY, CPU, "off").network
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert kinds == [nn.Conv2d] + [DepthwiseConv2d, nn.Conv2d] * 2
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(1, 1, 3))
    use_fast_depthwise(grouped)
    assert all(type(m) is nn.Conv2d for m in grouped)


def test_a_step_is_the_published_optimizers():
    """One epoch equals a plain loop with the authors' AdamW and schedule, on plain modules."""
    from convmixer.model import build
    from train.data import normalise
    from train.schedule import onecycle

    state = loop.new_state(TINY, CPU, "off")
    plain = build(TINY.model)
    plain.load_state_dict(state.network.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.005)
    for i, (images, labels, _) in enumerate(batches(3)):
        optimizer.param_groups[0]["lr"] = onecycle((i + 1) / 3, 5, 0.05)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(normalise(images, CIFAR10)), labels).backward()
        optimizer.step()
    result = loop.train_epoch(state, batches(3), 3, TINY, CIFAR10, "off")
    assert result["lr"] == onecycle(1, 5, 0.05)
    for (name, a), b in zip(state.network.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-3), name  # Adam's first steps are +-lr: signs decide


def test_training_learns():
    state = loop.new_state(dataclasses.replace(TINY, epochs=20, lr=0.01), CPU, "off")
    recipe = dataclasses.replace(TINY, epochs=20, lr=0.01)
    losses = []
    for epoch in range(20):
        state.epoch = epoch
        losses.append(loop.train_epoch(state, batches(2), 2, recipe, CIFAR10, "off")["loss"])
    assert losses[-1] < losses[0] / 2  # it can learn sixteen pictures by heart


def test_smaller_pictures_reach_the_network():
    recipe = dataclasses.replace(TINY, image_sizes=((0, 16), (1, 24)))
    state = loop.new_state(recipe, CPU, "off")
    sizes = []
    state.network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    for epoch in range(2):
        state.epoch = epoch
        loop.train_epoch(state, batches(1), 1, recipe, CIFAR10, "off")
    assert sizes == [(16, 16), (24, 24)]


def test_erased_rectangles_reach_the_network():
    recipe = dataclasses.replace(TINY, augmentation=Augmentation(reprob=1.0))
    state = loop.new_state(recipe, CPU, "off")
    seen = []
    state.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images, labels, boxes = batches(1)[0]
    boxes[:] = torch.tensor([4, 5, 6, 7])
    loop.train_epoch(state, [(images, labels, boxes)], 1, recipe, CIFAR10, "off")
    assert (seen[0][:, :, 4:10, 5:12] == 0).all()
    assert (seen[0] == 0).sum() == 8 * 3 * 42


def test_the_moving_average_follows_and_is_exported():
    recipe = dataclasses.replace(TINY, ema=0.5)
    state = loop.new_state(recipe, CPU, "off")
    start = state.network.head.weight.detach().clone()
    loop.train_epoch(state, batches(4), 4, recipe, CIFAR10, "off")
    average, now = state.exported.head.weight, state.network.head.weight
    assert state.exported is not state.network
    assert not torch.equal(average, start)
    assert not torch.equal(average, now)
    assert loop.new_state(TINY, CPU, "off").ema is None


def test_a_loss_that_is_not_finite_stops_the_run():
    state = loop.new_state(TINY, CPU, "off")
    with torch.no_grad():
        state.network.head.bias[0] = float("nan")
    with pytest.raises(loop.TrainingError, match="loss is nan in epoch 0, step 0"):
        loop.train_epoch(state, batches(1), 1, TINY, CIFAR10, "off")


def test_gradients_are_clipped_where_the_recipe_says_so():
    recipe = dataclasses.replace(TINY, clip_grad=1e-9)
    free, clipped = loop.new_state(TINY, CPU, "off"), loop.new_state(recipe, CPU, "off")
    loop.train_epoch(free, batches(1), 1, TINY, CIFAR10, "off")
    loop.train_epoch(clipped, batches(1), 1, recipe, CIFAR10, "off")

    def norm(state):
        return torch.stack([p.grad.norm() for p in state.network.parameters()]).norm().item()

    assert norm(free) > 1e-2
    assert norm(clipped) == pytest.approx(1e-9, rel=1e-2)


def test_mixed_precision_stays_near_full_precision():
    states = {amp: loop.new_state(TINY, CPU, amp) for amp in ("off", "bf16")}
    losses = {amp: loop.train_epoch(state, batches(1), 1, TINY, CIFAR10, amp)["loss"] for amp, state in states.items()}
    assert losses["bf16"] != losses["off"]
    assert losses["bf16"] == pytest.approx(losses["off"], rel=0.02)
    assert all(p.dtype == torch.float32 for p in states["bf16"].network.parameters())
    assert loop.choose_amp("fp16", CPU) == "fp16"
    assert loop.choose_amp("auto", CPU) in ("bf16", "off")


def test_evaluation_counts_every_picture_once():
    class Table(nn.Module):
        """Logits that are the first ten pixels of the picture."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x.flatten(1)[:, :10] * self.scale

    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(23, 1, 4, 4, generator=g), torch.randint(0, 10, (23,), generator=g)
    parts = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 23, 8)]
    counts = loop.evaluate(Table(), parts, 10)
    logits = images.flatten(1)[:, :10]
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)  # how many classes are above the true one
    assert counts["images"] == 23
    assert counts["top1"] == int((ranks == 0).sum())
    assert counts["top5"] == int((ranks < 5).sum())
    assert counts["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for truth, answer in zip(labels, logits.argmax(1), strict=True):
        confusion[truth, answer] += 1
    assert torch.equal(counts["confusion"], confusion)
