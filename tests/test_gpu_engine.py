"""The network as it runs on GPUs: its arithmetic on any device, and CUDA graphs where there is a GPU."""

import threading

import numpy as np
import pytest
import torch

from convmixer import Classifier, ConvMixer, zoo
from convmixer.gpu.engine import GRAPH_BATCHES, NORM_EPS, GpuEngine
from convmixer.model import build, to_arrays
from tests.networks import CASES, network, relative_error

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
ROUNDING = 2.0**-9  # of bfloat16


def engine_of(net: ConvMixer, device: str = "cpu") -> GpuEngine:
    return GpuEngine(net.config, to_arrays(net), device)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def off(found: np.ndarray, wanted: torch.Tensor) -> float:
    assert found.dtype == np.float32 and found.shape == tuple(wanted.shape)
    return relative_error(torch.from_numpy(found), wanted)


def rounded_everywhere(net: ConvMixer) -> float:
    """How far bfloat16 may carry the logits: the rounding of every feature map on the way, as random as it is."""
    return 4 * ROUNDING * (2 * net.config.depth + 2) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_and_features_are_the_networks_up_to_bfloat16(case, device):
    config, sides = CASES[case]
    net = network(**config)
    engine, near = engine_of(net, device), rounded_everywhere(net)
    assert (engine.name, engine.precision) == ("kernel", "bfloat16")
    for count in (1, 3):
        pictures = draw(count, net.config.in_chans, *sides)
        wanted = net(torch.from_numpy(pictures))
        maps = torch.stack(net.forward_intermediates(torch.from_numpy(pictures)))
        for stages in (0, 1, 1, net.config.depth + 1):
            logits, features = engine.run(pictures, stages)
            assert off(logits, wanted) < near
            assert features.shape == (stages, *maps.shape[1:])
            for found, exact in zip(features, maps[len(maps) - stages :], strict=True):
                assert off(found, exact) < near


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_stay_on_the_device(device):
    net = network(dim=16, depth=2, kernel_size=5, patch_size=4)
    engine, pictures = engine_of(net, device), draw(3, 3, 16, 16)
    logits, features = engine.run_tensors(torch.from_numpy(pictures), 2)
    assert logits.device.type == features.device.type == device
    for found, same in zip((logits, features), engine.run(pictures, 2), strict=True):
        assert off(same, found.cpu()) < ROUNDING


def test_the_batch_norms_are_pytorchs():
    assert torch.nn.BatchNorm2d(1).eps == NORM_EPS


def test_later_changes_of_the_weights_are_not_seen():
    net = network(dim=8, depth=1, kernel_size=3, patch_size=4)
    engine, pictures = engine_of(net), draw(2, 3, 8, 8)
    before = engine.run(pictures)[0]
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    assert np.array_equal(engine.run(pictures)[0], before)


def test_what_does_not_fit_is_refused():
    engine = engine_of(network(dim=8, depth=1, kernel_size=3, patch_size=4))
    for shape in [(3, 8, 8), (1, 1, 8, 8), (1, 3, 3, 8)]:
        with pytest.raises(ValueError, match=r"it must be \(N, 3, H, W\) with sides of at least 4"):
            engine.run(draw(*shape))
    with pytest.raises(ValueError, match="float32 NumPy array"):
        engine.run(draw(1, 3, 8, 8).astype(np.float64))
    for stages in (-1, 3):
        with pytest.raises(ValueError, match=f"stages is {stages}; it must be 0 to 2"):
            engine.run(draw(1, 3, 8, 8), stages)


def test_any_array_and_no_pictures():
    engine = engine_of(network(dim=8, depth=1, kernel_size=3, patch_size=4))
    pictures = draw(2, 3, 8, 8)
    flipped = pictures[..., ::-1].copy()[..., ::-1]
    pictures.flags.writeable = False
    assert np.array_equal(engine.run(flipped)[0], engine.run(pictures)[0])
    logits, features = engine.run(draw(0, 3, 8, 8), 1)
    assert logits.shape == (0, 1000) and features.shape == (1, 0, 8, 2, 2)
    engine.warm_up(8, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_the_shipped_model_gives_the_same_answers(device):
    # Its batch norms magnify what is wrong up to 800 times, and GELU's inputs go down to -1,048.
    shipped = zoo.load("convmixer_256_8_cifar10")
    exact, pictures = build(shipped.config, shipped.state_dict).eval(), draw(64, 3, 32, 32)
    with torch.inference_mode():
        wanted = exact(torch.from_numpy(pictures))
    found = torch.from_numpy(engine_of(exact, device).run(pictures)[0])
    error = (found - wanted).abs().max()
    assert 1e-4 < error / wanted.abs().max() < 0.03
    best = wanted.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * error
    assert clear.sum() > 48 and torch.equal(found.argmax(1)[clear], wanted.argmax(1)[clear])


@ON_GPU
def test_the_classifier_on_a_gpu(random_checkpoint, picture):
    file, pictures = str(random_checkpoint()), [picture(seed=seed) for seed in range(5)]
    exact, fast = Classifier(file, device="cuda", precision="float32"), Classifier(file, device="cuda")
    assert isinstance(fast.engine, GpuEngine) and not isinstance(exact.engine, GpuEngine)
    fast.warm_up(3)
    wanted = torch.from_numpy(exact.logits(pictures))
    assert off(fast.logits(pictures), wanted) < 0.05
    heatmap, wanted = (each.heatmap(pictures[0], index=3) for each in (fast, exact))
    assert abs(heatmap.values - wanted.values).max() < 0.05 * abs(wanted.values).max()


@ON_GPU
def test_warming_up_records_every_batch():
    engine = engine_of(network(dim=16, depth=2, kernel_size=9, patch_size=4), "cuda")
    engine.warm_up(16, 5)
    assert [count for count, *_ in engine._graphs] == [1, 2, 4, 8]
    recorded = dict(engine._graphs)
    pictures = draw(8, 3, 16, 16)
    together = torch.from_numpy(engine.run(pictures)[0])
    for count in range(1, 9):
        assert off(engine.run(pictures[:count])[0], together[:count]) < 0.02
    assert engine._graphs == recorded


@ON_GPU
def test_threads_share_an_engine():
    engine = engine_of(network(dim=32, depth=3, kernel_size=9, patch_size=4), "cuda")
    batches = [draw(count, 3, 40, 40) for count in GRAPH_BATCHES[:4] * 3]
    wanted, wrong = [engine.run(batch)[0] for batch in batches], []

    def ask() -> None:
        for batch, logits in zip(batches, wanted, strict=True):
            if not np.allclose(engine.run(batch)[0], logits, rtol=0, atol=0.05 * float(abs(logits).max())):
                wrong.append(len(batch))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
