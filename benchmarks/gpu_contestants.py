"""The contestants of benchmarks/gpu.py: each a function that takes a batch through a network, or a training step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from benchmarks.inference_models import random_network
from convmixer.gpu.engine import GpuEngine
from convmixer.model import ACTIVATIONS, ConvMixer, to_arrays
from train.recipe import Recipe
from train.speed.channel_major import use_channel_major

MEASURE = "timm NCHW"  # what the others are compared with
OURS = ("ours", "ours compiled", "ours fused", "ours fused compiled")


class Skip(Exception):
    """One line that says why a contestant cannot take part."""


@dataclass(frozen=True)
class Way:
    """One way to run the network."""

    channels_last: bool = False
    compiled: bool = False
    layout_optimization: bool = False  # of torch.compile: may it choose channels_last by itself
    graph: bool = False  # replayed as a CUDA graph; inference only
    ours: bool = False  # this project's kernels, on channel-major maps
    fused: bool = False  # half a block in one kernel; training only


CONTESTANTS = {  # in this order, while there is time
    MEASURE: Way(),
    "ours": Way(ours=True),
    "ours compiled": Way(ours=True, compiled=True),
    "ours fused": Way(ours=True, fused=True),
    "ours fused compiled": Way(ours=True, fused=True, compiled=True),
    "timm NHWC": Way(channels_last=True),
    "timm NCHW graph": Way(graph=True),
    "timm NHWC graph": Way(channels_last=True, graph=True),
    "timm NCHW compiled": Way(compiled=True),
    "timm NCHW compiled, any layout": Way(compiled=True, layout_optimization=True),
    "timm NHWC compiled": Way(channels_last=True, compiled=True, layout_optimization=True),
}


def timm_network(network: ConvMixer) -> nn.Module:
    """timm's network with the same weights."""
    config = network.config
    other = TimmConvMixer(
        config.dim,
        config.depth,
        kernel_size=config.kernel_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        act_layer=ACTIVATIONS[config.activation],
    )
    other.load_state_dict(network.state_dict())
    return other.train(network.training)


class Contest:
    """One recipe's network at one batch size, its input, and what is right."""

    def __init__(self, recipe: Recipe, batch: int, device: torch.device):
        self.config, self.batch, self.device = recipe.model, batch, device
        size = recipe.preprocessing.size
        self.network = random_network(recipe.model, size)
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.randn(batch, recipe.model.in_chans, size, size, generator=generator).to(device)
        self.labels = torch.randint(recipe.model.num_classes, (batch,), generator=generator).to(device)
        self.autocast = torch.autocast(device.type, torch.bfloat16)

    @torch.inference_mode()
    def exact(self, count: int = 4) -> Tensor:
        """Logits of the first pictures in float32, on the CPU."""
        return self.network(self.pictures[:count].cpu())

    def inference(self, way: Way) -> Callable[[], Tensor]:
        """A function that gives the logits on the device. Raises Skip."""
        if way.ours:
            if way.compiled or way.fused:
                raise Skip("of inference there is only one")
            engine = GpuEngine(self.config, to_arrays(self.network), self.device)
            return lambda: engine.run_tensors(self.pictures)[0]
        if way.graph and self.device.type != "cuda":
            raise Skip("CUDA graphs need a GPU")
        network, pictures = self._prepared(timm_network(self.network), way)

        @torch.inference_mode()
        def call() -> Tensor:
            with self.autocast:
                return network(pictures)

        return recorded(call) if way.graph else call

    def training(self, way: Way) -> Callable[[], Tensor]:
        """A function that takes a step, forward, backward and AdamW's, and gives the loss. Raises Skip."""
        if way.graph:
            raise Skip("CUDA graphs are for inference here")
        network = copy.deepcopy(self.network).train()
        if way.ours:
            use_channel_major(network, way.fused)
        network, pictures = self._prepared(network if way.ours else timm_network(network), way)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

        def call() -> Tensor:
            with self.autocast:
                loss = nn.functional.cross_entropy(network(pictures), self.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return call

    def _prepared(self, network: nn.Module, way: Way) -> tuple[nn.Module, Tensor]:
        memory_format = torch.channels_last if way.channels_last else torch.contiguous_format
        network = network.to(self.device, memory_format=memory_format)
        if way.compiled:
            network = torch.compile(network, dynamic=False, options={"layout_optimization": way.layout_optimization})
        return network, self.pictures.contiguous(memory_format=memory_format)


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
