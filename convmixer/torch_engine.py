"""The network run by PyTorch: on request, and on devices that have no kernels of this project."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .config import ConvMixerConfig
from .engine import check_pictures
from .model import ConvMixer, build

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# On a CPU pictures run together while one feature map of them all fits in this many bytes: larger batches fall out of
# the cache between two layers, and take longer a picture than one at a time.
CPU_SLICE_BYTES = 4 * 2**20


class TorchEngine:
    """An `Engine` whose logits in float32 are, bit for bit, those of the network in `model.py`.

    weights: under timm's names; on a CPU they are taken over without a copy. precision: "float32", or "bfloat16" or
    "float16" by autocast. layout: "contiguous" or "channels_last".
    """

    name = "torch"

    def __init__(
        self,
        config: ConvMixerConfig,
        weights: Mapping[str, np.ndarray],
        device: str = "cpu",
        precision: str = "float32",
        layout: str = "contiguous",
    ):
        self.precision, self.device = precision, torch.device(device)
        self.network: ConvMixer = build(config, weights).to(self.device).eval()
        self._format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        self.network.to(memory_format=self._format)

    @torch.inference_mode()
    def run(self, pictures: np.ndarray, stages: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """As `Engine.run`."""
        config = self.network.config
        check_pictures(pictures, config, stages)
        size = self._slice_size(pictures.shape[2:]) if self.device.type == "cpu" else max(1, len(pictures))
        slices = np.split(pictures, range(size, len(pictures), size))
        slices = (torch.from_numpy(np.require(each, requirements="CW")) for each in slices)
        logits, features = zip(*(self._run(each, stages) for each in slices), strict=True)
        return torch.cat(logits).numpy(), torch.cat(features, 1).numpy()

    def warm_up(self, size: int, batch: int = 1) -> None:
        """As `Engine.warm_up`: libraries are loaded and choose their algorithms at the first run."""
        batch = 1 if self.device.type == "cpu" else batch
        self.run(np.zeros((batch, self.network.config.in_chans, size, size), np.float32))

    def _run(self, pictures: Tensor, stages: int) -> tuple[Tensor, Tensor]:
        x = pictures.to(self.device, memory_format=self._format)
        with torch.autocast(self.device.type, DTYPES.get(self.precision), enabled=self.precision in DTYPES):
            # Only what is asked for is kept: 33 feature maps of 64 pictures are gigabytes.
            maps = self.network.forward_intermediates(x) if stages else [self.network.forward_features(x)]
            logits = self.network.forward_head(maps[-1])
        taken = [each.float().cpu() for each in maps[len(maps) - stages :]] if stages else []
        return logits.float().cpu(), torch.stack(taken) if taken else torch.empty(0, *maps[-1].shape)

    def _slice_size(self, sides: tuple[int, int]) -> int:
        height, width = (side // self.network.config.patch_size for side in sides)
        return max(1, CPU_SLICE_BYTES // (4 * self.network.config.dim * height * width))
