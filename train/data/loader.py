"""PyTorch's DataLoader over samples: worker processes that read, and what goes wrong in them as one line."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from train.data.samples import data_error_line
from train.errors import DataError
from train.watch import leave_signals_to_the_parent

MORE_SHARED_MEMORY = "in Docker --shm-size 8g gives more shared memory, and --workers 0 does without"


def collate(samples: list) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Samples to pictures (n, ...), int64 labels (n,), and the messages about broken pictures, which are left out."""
    broken = tuple(message for _, _, messages in samples for message in messages)
    whole = [(torch.as_tensor(image), label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in whole]) if whole else torch.empty(0)
    labels = torch.tensor([label for _, label in whole], dtype=torch.int64)
    if (
        get_worker_info()
    ):  # here and not in the queue's own thread, where an error would be lost and the run wait for it
        try:
            images.share_memory_(), labels.share_memory_()
        except RuntimeError as error:
            size = f"a batch of {images.nbytes / 1e6:.1f} MB"
            raise DataError(f"shared memory (/dev/shm) has no room for {size}; {MORE_SHARED_MEMORY}") from error
    return images, labels, broken


def read_with_workers(dataset, workers: int, **options) -> DataLoader:
    """A loader of the batches that `collate` makes, which signals to this process leave alone."""
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=torch.cuda.is_available(),
        # Samples seed the global generator; the loader's own draw must not depend on when that happened.
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def batches_of(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, tuple[str, ...]]]:
    """The loader's batches. Raises DataError as one line also where a worker process raised it, or died."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(data_error_line(error)) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise DataError(f"{reason}: is there too little memory? Give fewer --workers; {MORE_SHARED_MEMORY}") from error
