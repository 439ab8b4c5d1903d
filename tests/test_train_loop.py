"""One epoch of training, one of evaluation, the last steps to the input, and the fast depthwise convolution."""

import dataclasses

import pytest
import torch
from torch import nn

from convmixer.model import ConvMixerConfig, build
from convmixer.preprocessing import CIFAR10
from train import loop
from train.data.batches import Part, normalise
from train.distributed import World
from train.errors import TrainingError
from train.loop import Finish
from train.plan import Plan
from train.recipe import Augmentation, Recipe
from train.schedule import onecycle
from train.speed.depthwise import DepthwiseConv2d, use_fast_depthwise
from train.state import NOTHING_YET, new_state
from train.watch import Watch

TINY = Recipe(
    "tiny", ConvMixerConfig(16, 2, 5, 2, num_classes=10), CIFAR10, epochs=5, batch_size=8, micro_batch=8, amp="off"
)
CPU = torch.device("cpu")


def batches(n: int, seed: int = 0, size: int = 8) -> list[Part]:
    g = torch.Generator().manual_seed(seed)
    return [
        Part(
            torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=g),
            torch.randint(0, 10, (size,), generator=g),
        )
        for _ in range(n)
    ]


def train_epoch(state, recipe: Recipe, parts: list[Part], amp: str = "off", watch: Watch | None = None) -> dict:
    """One epoch of the given parts; gives the sums that the epoch's row is made from, and whether it ended."""
    images = sum(len(part.labels) for part in parts)
    plan = Plan(images, recipe.batch_size, recipe.micro_batch, recipe.drop_last)
    finish = Finish(recipe, torch.channels_last, CPU)
    in_a_step = len(plan.parts(0, 0))
    state.step, state.running = 0, NOTHING_YET.copy()
    ended = loop.train_epoch(
        state,
        state.network,
        lambda epoch, first: parts[first * in_a_step :],
        plan,
        finish,
        World(CPU),
        amp,
        watch or Watch(),
    )
    return {**state.running, "loss": state.running["loss"] / max(state.running["seen"], 1), "ended": ended}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_last_batch_norm_gets_its_gradient_in_the_maps_own_format(memory_format):
    network, seen = new_state(TINY, CPU, "off", memory_format).network, []
    network.blocks[-1][-1].register_full_backward_pre_hook(lambda _, gradients: seen.extend(gradients))
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=memory_format)
    network(x).square().mean().backward()
    (gradient,) = seen
    assert gradient.is_contiguous(memory_format=memory_format)


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
    network = new_state(TINY, CPU, "off").network
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert kinds == [nn.Conv2d] + [DepthwiseConv2d, nn.Conv2d] * 2
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(1, 1, 3))
    use_fast_depthwise(grouped)
    assert all(type(m) is nn.Conv2d for m in grouped)


def test_steps_are_the_published_optimizers():
    """One epoch equals a plain loop with the authors' AdamW and schedule, on plain modules."""
    state = new_state(TINY, CPU, "off")
    plain = build(TINY.model)
    plain.load_state_dict(state.network.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.005)
    for i, part in enumerate(batches(3)):
        optimizer.param_groups[0]["lr"] = onecycle((i + 1) / 3, 5, 0.05)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(normalise(part.images, CIFAR10)), part.labels).backward()
        optimizer.step()
    sums = train_epoch(state, TINY, batches(3))
    assert (sums["seen"], sums["skipped"], sums["ended"]) == (24, 0, True)
    assert state.optimizer.param_groups[0]["lr"] == onecycle(1, 5, 0.05)
    for (name, a), b in zip(state.network.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-3), name  # Adam's first steps are +-lr: signs decide


def test_accumulated_parts_have_the_gradient_of_their_mean():
    """Parts of 3, 3 and 2 pictures count by their size. Batch norm sees parts, so that it stands still here."""
    recipe = dataclasses.replace(TINY, micro_batch=3, lr=0.0)
    whole = batches(1)[0]
    parts = [Part(whole.images[part], whole.labels[part]) for part in Plan(8, 8, 3, False).parts(0, 0)]
    assert [len(part.labels) for part in parts] == [2, 3, 3]
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


@pytest.mark.parametrize(
    "settings", [{}, {"opt": "muon", "lr": 0.03}, {"opt": "nesterov", "lr": 0.2, "sched": "cosine"}]
)
def test_training_learns(settings):
    recipe = dataclasses.replace(TINY, **{"epochs": 20, "lr": 0.01} | settings)
    state = new_state(recipe, CPU, "off")
    losses = []
    for epoch in range(20):
        state.epoch = epoch
        losses.append(train_epoch(state, recipe, batches(2))["loss"])
    assert losses[-1] < losses[0] / 2  # it can learn sixteen pictures by heart


def test_muon_takes_the_1x1_convolutions_alone():
    state = new_state(dataclasses.replace(TINY, opt="muon", weight_decay=0.1), CPU, "off")
    (muon,) = [group for group in state.optimizer.param_groups if not group["use_fallback"]]
    assert [tuple(p.shape) for p in muon["params"]] == [(16, 16, 1, 1)] * 2
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {0.1}
    train_epoch(state, dataclasses.replace(TINY, opt="muon"), batches(1))
    assert "exp_avg_sq" not in state.optimizer.state[muon["params"][0]]
    assert "exp_avg_sq" in state.optimizer.state[state.network.head.weight]


def test_an_optimizer_whose_package_is_missing_is_one_line():
    with pytest.raises(TrainingError, match=r"bnbadam cannot be used: .*; try --opt adamw"):
        new_state(dataclasses.replace(TINY, opt="bnbadam"), CPU, "off")


def inputs_of(state) -> list:
    seen = []
    state.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def test_smaller_pictures_reach_the_network():
    recipe = dataclasses.replace(TINY, image_sizes=((0, 16), (1, 24)))
    state = new_state(recipe, CPU, "off")
    seen = inputs_of(state)
    for epoch in range(2):
        state.epoch = epoch
        train_epoch(state, recipe, batches(1))
    assert [tuple(x.shape[2:]) for x in seen] == [(16, 16), (24, 24)]


def test_erased_rectangles_reach_the_network():
    """timm's erasing: in constant mode the mean colour, which is 0 once normalised."""
    recipe = dataclasses.replace(TINY, augmentation=Augmentation(reprob=1.0))
    state = new_state(recipe, CPU, "off")
    seen = inputs_of(state)
    part = batches(1)[0]
    train_epoch(state, recipe, [part])
    erased = (seen[0] == 0).all(1)
    assert (erased.flatten(1).sum(1) >= 12).all()  # at least 2 % of each picture
    untouched = normalise(part.images, CIFAR10)
    assert torch.equal(seen[0][~erased[:, None].expand_as(untouched)], untouched[~erased[:, None].expand_as(untouched)])


def test_mixed_pictures_have_mixed_targets():
    recipe = dataclasses.replace(TINY, label_smoothing=0.1, augmentation=Augmentation(mixup=0.5))
    finish, part = Finish(recipe, torch.channels_last, CPU), batches(1)[0]
    x, targets = finish(part, 0, 0, 0)
    plain = normalise(part.images, CIFAR10)
    share = ((x[0] - plain[7]) / (plain[0] - plain[7])).nanmedian()  # mixed with those from the other end
    assert 0 < share < 1
    assert torch.allclose(x[0], share * plain[0] + (1 - share) * plain[7], atol=1e-4)
    smooth = torch.nn.functional.one_hot(part.labels, 10) * 0.9 + 0.01
    assert torch.allclose(targets[0], share * smooth[0] + (1 - share) * smooth[7], atol=1e-4)
    again = finish(part, 0, 0, 0)
    assert torch.equal(again[0], x)
    assert not torch.equal(finish(part, 0, 1, 0)[0], x)
    odd = Part(part.images[:7], part.labels[:7])
    x, targets = finish(odd, 0, 0, 0)
    assert torch.equal(x[6], plain[6])  # without a partner
    assert torch.allclose(targets[6], smooth[6])


def test_the_moving_average_follows_and_is_exported():
    recipe = dataclasses.replace(TINY, ema=0.5)
    state = new_state(recipe, CPU, "off")
    start = state.network.head.weight.detach().clone()
    train_epoch(state, recipe, batches(4))
    average, now = state.exported.head.weight, state.network.head.weight
    assert state.exported is not state.network
    assert not torch.equal(average, start)
    assert not torch.equal(average, now)
    assert new_state(TINY, CPU, "off").ema is None


def test_a_loss_that_is_not_finite_stops_the_run():
    state = new_state(TINY, CPU, "off")
    with torch.no_grad():
        state.network.head.bias[0] = float("nan")
    with pytest.raises(TrainingError, match="the loss is not finite in epoch 1, step 1 of 3"):
        train_epoch(state, TINY, batches(3))


def test_a_request_to_stop_ends_the_epoch_after_the_step_under_way():
    state, watch = new_state(TINY, CPU, "off"), Watch()
    watch._receive(15, None)
    sums = train_epoch(state, TINY, batches(3), watch=watch)
    assert (sums["ended"], sums["seen"], state.step) == (False, 8, 1)


def test_broken_pictures_are_counted_and_named_once(capsys):
    parts = [dataclasses.replace(part, broken=("a.jpg: empty",)) for part in batches(3)]
    assert train_epoch(new_state(TINY, CPU, "off"), TINY, parts)["skipped"] == 3
    assert capsys.readouterr().err == "left out: a.jpg: empty\n"


def test_gradients_are_clipped_where_the_recipe_says_so():
    recipe = dataclasses.replace(TINY, clip_grad=1e-9)
    free, clipped = new_state(TINY, CPU, "off"), new_state(recipe, CPU, "off")
    train_epoch(free, TINY, batches(1))
    train_epoch(clipped, recipe, batches(1))

    def norm(state):
        return torch.stack([p.grad.norm() for p in state.network.parameters()]).norm().item()

    assert norm(free) > 1e-2
    assert norm(clipped) == pytest.approx(1e-9, rel=1e-2)


def test_mixed_precision_stays_near_full_precision():
    states = {amp: new_state(TINY, CPU, amp) for amp in ("off", "bf16", "fp16")}
    losses = {amp: train_epoch(state, TINY, batches(1), amp)["loss"] for amp, state in states.items()}
    assert losses["bf16"] != losses["off"]
    assert losses["bf16"] == pytest.approx(losses["off"], rel=0.02)
    assert losses["fp16"] != losses["off"]
    assert losses["fp16"] == pytest.approx(losses["off"], rel=0.005)  # three more bits than bfloat16
    assert states["fp16"].scaler.get_scale() == 2.0**16
    assert not states["bf16"].scaler.is_enabled()
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
