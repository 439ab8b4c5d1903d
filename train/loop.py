"""The training loop: one epoch forward and back, and one pass of evaluation."""

import random
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from train import schedule
from train.data.batches import Part, normalise
from train.distributed import World, average_statistics
from train.errors import TrainingError
from train.recipe import Recipe
from train.state import TrainingState
from train.watch import Watch

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOP5_ABOVE = 5  # classes; among fewer every answer is one of the first five
CHECK_EVERY = 50  # steps between looks at a GPU's loss: each look waits for the GPU


def choose_amp(amp: str, device: torch.device) -> str:
    """What "auto" stands for: "bf16" where ``device`` computes it natively, else "fp16" on CUDA, "off" on the CPU."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "off"


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """Mixed precision for ``device``; "off" gives a context that changes nothing."""
    return torch.autocast(device.type, AMP_DTYPES.get(amp), enabled=amp != "off")


class Finish:
    """The last steps from a part to the network's input, on the device: normalise, mix, erase, shrink.

    timm's Mixup and RandomErasing, in the order of timm's loader. They draw from the global random generators, which
    are seeded for each part, so that a resumed run draws the same.
    """

    def __init__(self, recipe: Recipe, memory_format: torch.memory_format, device: torch.device):
        augmentation = recipe.augmentation
        self.recipe, self.memory_format = recipe, memory_format
        self.mixup = self.erasing = None
        if augmentation.mixup or augmentation.cutmix:
            self.mixup = Mixup(
                augmentation.mixup,
                augmentation.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=recipe.model.num_classes,
            )
        if augmentation.reprob:
            # The authors' CIFAR script erases with torchvision, whose ranges end a little earlier than timm's.
            ranges = {"max_area": 0.33, "max_aspect": 3.3} if augmentation.remode == "const" else {}
            self.erasing = RandomErasing(augmentation.reprob, mode=augmentation.remode, device=device.type, **ranges)

    def __call__(self, part: Part, epoch: int, step: int, number: int) -> tuple[Tensor, Tensor]:
        """Float pictures (n, 3, size, size), and labels (n,) or, with mixup, soft targets (n, classes)."""
        seed = int(np.random.SeedSequence((self.recipe.seed, epoch, step, number, 2)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        x, targets = normalise(part.images, self.recipe.preprocessing), part.labels
        if self.mixup is not None:
            x, targets = self.mix(x, targets)
        if self.erasing is not None:
            x = self.erasing(x)
        full = self.recipe.preprocessing.size
        size = schedule.image_size_at(epoch, self.recipe.image_sizes, full)
        if size != full:
            x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        return x.contiguous(memory_format=self.memory_format), targets

    def mix(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """timm's Mixup mixes pictures in pairs: the last of an odd number stays as it is."""
        even = len(x) - len(x) % 2
        classes, smoothing = self.recipe.model.num_classes, self.recipe.label_smoothing
        targets = mixup_target(labels, classes, 1.0, smoothing)
        if even:
            x[:even], targets[:even] = self.mixup(x[:even], labels[:even])
        return x, targets


def train_epoch(
    state: TrainingState,
    forward: nn.Module,
    parts: Callable[[int, int], Iterable[Part]],
    plan,
    finish: Finish,
    world: World,
    amp: str,
    watch: Watch,
    save: Callable[[], None] = lambda: None,
    after_step: Callable[[int, float], None] = lambda step, loss: None,
) -> bool:
    """Trains from ``state.step`` to the end of the epoch; ``forward`` is the network, maybe wrapped.

    ``save`` is called by all processes when ``watch`` says it is time. False: ``watch`` asked to stop, and the state
    was saved after the step under way. Raises TrainingError when a loss is not finite; nothing is saved then.
    """
    recipe, network, optimizer, scaler = finish.recipe, state.network.train(), state.optimizer, state.scaler
    device = world.device
    # Mixup has the smoothing in its targets.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if finish.mixup else recipe.label_smoothing)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct, seen, skipped; of this process
    first_bad = torch.full((), plan.steps, device=device)  # step whose loss was not finite
    clock = time.perf_counter()

    def fold() -> None:
        """Moves ``sums`` of all processes into ``state.running``."""
        nonlocal clock
        loss, correct, seen, skipped = world.total(sums).tolist()
        sums.zero_()
        now = time.perf_counter()
        running = state.running
        state.running = {
            "loss": running["loss"] + loss,
            "correct": running["correct"] + int(correct),
            "seen": running["seen"] + int(seen),
            "skipped": running["skipped"] + int(skipped),
            "seconds": running["seconds"] + now - clock,
        }
        clock = now

    source = watch.read(parts(state.epoch, state.step))
    for step in range(state.step, plan.steps):
        lr = schedule.rate_at_step(recipe, state.epoch, step, plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        stretches = plan.parts(step, world.rank)
        optimizer.zero_grad(set_to_none=True)
        for number in range(len(stretches)):
            part = next(source)
            x, targets = finish(part, state.epoch, step, world.rank * len(stretches) + number)
            last = number == len(stretches) - 1
            # Only the last part's backward adds up the gradients of the processes.
            with nullcontext() if last or world.size == 1 else forward.no_sync():
                with autocast(amp, device):
                    logits = forward(x)
                    loss = criterion(logits, targets)
                # The mean over the step's pictures, whatever the parts' sizes; DDP divides by the processes.
                scaler.scale(loss * (len(x) * world.size / plan.size(step))).backward()
            loss = loss.detach()
            first_bad = torch.where(torch.isfinite(loss), first_bad, first_bad.clamp(max=step))
            sums[0] += loss.double() * len(x)
            if targets.ndim == 1:
                sums[1] += (logits.argmax(1) == targets).sum()
            sums[2] += len(x)
            sums[3] += len(part.broken)
            for message in part.broken:
                watch.skipped(message)
        bad = 0
        if device.type == "cpu" or (step + 1) % CHECK_EVERY == 0 or step + 1 == plan.steps:
            bad = int(first_bad.item() < plan.steps)
        stop, due, bad = world.largest(int(watch.stopping), int(world.main and watch.save_due()), bad)
        if (stop or due) and device.type != "cpu":
            bad = max(bad, *world.largest(int(first_bad.item() < plan.steps)))
        if bad:
            (worst,) = world.largest(-int(first_bad.item()))
            raise TrainingError(
                f"the loss is not finite in epoch {state.epoch + 1}, step {1 - worst} of {plan.steps}; the last good"
                " checkpoint is kept; try a lower --lr or --clip-grad 1"
            )
        if recipe.clip_grad is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        average_statistics(network, world)
        if state.ema is not None:
            state.ema.update(network, step=state.epoch * plan.steps + step)
        state.step = step + 1
        after_step(step + 1, loss)
        if stop or due:
            fold()
            save()
        if stop:
            return False
    fold()
    return True


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    amp: str = "off",
    world: World | None = None,
    stopping: Callable[[], bool] = lambda: False,
    memory_format: torch.memory_format = torch.channels_last,
) -> dict:
    """Counts over (normalised float pictures, labels) batches, each process its own: every picture once.

    As soon as ``stopping`` says so, the rest is left out.

    Gives ``images``, ``top1`` and ``top5`` (counts of correct answers), ``loss`` (mean), and ``confusion``: int64
    (num_classes, num_classes), rows the true class, columns the answer.
    """
    network.eval()
    parameter = next(network.parameters())
    device = parameter.device
    world = world or World(device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    top5, loss = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.float64, device=device)
    for images, labels in batches:
        if stopping():
            break
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(amp, device):
            logits = network(images.contiguous(memory_format=memory_format))
        logits = logits.float()
        best = logits.topk(min(5, num_classes), dim=1).indices
        confusion += torch.bincount(labels * num_classes + best[:, 0], minlength=num_classes**2)
        top5 += (best == labels[:, None]).sum()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
    confusion = world.total(confusion).view(num_classes, num_classes).cpu()
    images = int(confusion.sum())
    return {
        "images": images,
        "top1": int(confusion.diagonal().sum()),
        "top5": int(world.total(top5)),
        "loss": float(world.total(loss)) / max(images, 1),
        "confusion": confusion,
    }
