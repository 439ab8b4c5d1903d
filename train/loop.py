"""The training loop: one epoch forward and back, one pass of evaluation, and everything a resumed run needs."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from convmixer.model import ConvMixer, build
from convmixer.preprocessing import Preprocessing
from convmixer.weights import write_atomically
from train import schedule
from train.data import LabelledImages, erase, normalise
from train.depthwise import use_fast_depthwise
from train.errors import TrainingError
from train.recipes import Recipe

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


@dataclass
class TrainingState:
    """All that changes during a run. ``epoch`` counts finished epochs."""

    network: ConvMixer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    epoch: int = 0
    history: list[dict] = field(default_factory=list)  # one row an epoch, as in metrics.csv
    commit: str = "unknown"  # of the code that started the run

    @property
    def exported(self) -> ConvMixer:
        """The network that is evaluated and exported: the moving average where the recipe has one."""
        return self.network if self.ema is None else self.ema.module

    def save(self, path: Path, resolved: dict) -> None:
        """Writes everything to ``path``; a crash or a full disk in the middle leaves the file that was there before."""
        content = {
            "recipe": resolved,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema and self.ema.module.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "commit": self.commit,
        }
        write_atomically(path, lambda file: torch.save(content, file))

    def load(self, content: dict) -> None:
        """Takes over what `save` wrote."""
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.epoch, self.history, self.commit = content["epoch"], content["history"], content["commit"]


def new_state(recipe: Recipe, device: torch.device, amp: str) -> TrainingState:
    """The state before the first epoch: weights initialised from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    network = build(recipe.model).to(device, memory_format=torch.channels_last)
    use_fast_depthwise(network)
    # The authors decay every parameter, biases and norms included.
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, eps=recipe.eps, weight_decay=recipe.weight_decay)
    ema = None if recipe.ema is None else ModelEmaV3(network, decay=recipe.ema, use_warmup=True)
    return TrainingState(network, optimizer, torch.amp.GradScaler(device.type, enabled=amp == "fp16"), ema)


def train_epoch(
    state: TrainingState,
    batches: Iterable,
    steps: int,
    recipe: Recipe,
    preprocessing: Preprocessing,
    amp: str,
    after_step: Callable[[int, int], None] = lambda step, steps: None,
) -> dict:
    """Trains on an epoch of (images, labels, boxes) batches; gives ``loss``, ``top1`` (%), ``lr`` and ``images_per_s``.

    Raises TrainingError at the first loss that is not finite.
    """
    network, optimizer, scaler = state.network.train(), state.optimizer, state.scaler
    device = next(network.parameters()).device
    size = schedule.image_size_at(state.epoch, recipe.image_sizes, preprocessing.size)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    correct, seen, start = torch.zeros((), dtype=torch.int64, device=device), 0, time.perf_counter()
    for step, (images, labels, boxes) in enumerate(batches):
        lr = schedule.onecycle_at_step(state.epoch, step, steps, recipe.epochs, recipe.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        x = normalise(images, preprocessing)
        if recipe.augmentation.reprob:
            x = erase(x, boxes)
        if size != preprocessing.size:
            x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        with autocast(amp, device):
            logits = network(x.contiguous(memory_format=torch.channels_last))
            loss = criterion(logits, labels)
        # Waiting for the loss costs little on a CPU; on a GPU the check waits until the epoch's end.
        if device.type == "cpu" and not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} in epoch {state.epoch}, step {step}; try a lower --lr")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if recipe.clip_grad is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        if state.ema is not None:
            state.ema.update(network, step=state.epoch * steps + step)
        total_loss += loss.detach().double() * len(labels)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
        after_step(step + 1, steps)
    mean_loss = total_loss.item() / seen
    if not np.isfinite(mean_loss):
        raise TrainingError(f"the loss is {mean_loss} in epoch {state.epoch}; try a lower --lr")
    seconds = time.perf_counter() - start
    return {"loss": mean_loss, "top1": 100 * correct.item() / seen, "lr": lr, "images_per_s": seen / seconds}


def uint8_batches(data: LabelledImages, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The pictures in order, as uint8 (N, 3, H, W) and int64 labels (N,)."""
    for start in range(0, len(data), batch_size):
        chunk = slice(start, start + batch_size)
        yield torch.from_numpy(data.images[chunk]).permute(0, 3, 1, 2), torch.from_numpy(data.labels[chunk])


@torch.inference_mode()
def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, amp: str = "off") -> dict:
    """Counts over (normalised float images, labels) batches: every picture once.

    Gives ``images``, ``top1`` and ``top5`` (counts of correct answers), ``loss`` (mean), and ``confusion``: int64
    (num_classes, num_classes), rows the true class, columns the answer.
    """
    network.eval()
    device = next(network.parameters()).device
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    top5, loss, count = torch.zeros((), dtype=torch.int64, device=device), 0.0, 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with autocast(amp, device):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        logits = logits.float()
        best = logits.topk(min(5, num_classes), dim=1).indices
        confusion += torch.bincount(labels * num_classes + best[:, 0], minlength=num_classes**2)
        top5 += (best == labels[:, None]).sum()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    confusion = confusion.view(num_classes, num_classes).cpu()
    return {
        "images": count,
        "top1": int(confusion.diagonal().sum()),
        "top5": int(top5),
        "loss": loss / max(count, 1),
        "confusion": confusion,
    }
