"""The engine on a GPU: CUDA graphs, threads, the classifier. Its arithmetic, on any device, is in test_engines.py."""

import threading

import numpy as np
import pytest
import torch

from convmixer import Classifier
from convmixer.gpu.engine import GRAPH_BATCHES, GpuEngine
from convmixer.model import to_arrays
from tests.networks import network, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def engine() -> GpuEngine:
    net = network(dim=32, depth=3, kernel_size=9, patch_size=4)
    return GpuEngine(net.config, to_arrays(net), "cuda")


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return relative_error(torch.from_numpy(found), torch.from_numpy(wanted))


def test_the_classifier(random_checkpoint, picture):
    file, pictures = str(random_checkpoint()), [picture(seed=seed) for seed in range(5)]
    exact, fast = Classifier(file, device="cuda", precision="float32"), Classifier(file, device="cuda")
    assert isinstance(fast.engine, GpuEngine) and not isinstance(exact.engine, GpuEngine)
    fast.warm_up(3)
    assert off(fast.logits(pictures), exact.logits(pictures)) < 0.05
    heatmaps = [each.heatmap(pictures[0], index=3).values for each in (fast, exact)]
    assert off(*heatmaps) < 0.05


def test_tensors_stay_on_the_device(engine):
    pictures = draw(3, 3, 16, 16)
    results = engine.run_tensors(torch.from_numpy(pictures), 2)
    assert {each.device.type for each in results} == {"cuda"}
    for found, same in zip(results, engine.run(pictures, 2), strict=True):
        assert off(same, found.cpu().numpy()) < 2.0**-9


def test_warming_up_records_every_batch(engine):
    engine.warm_up(16, 5)
    recorded = dict(engine._graphs)
    assert [count for count, *_ in recorded] == [1, 2, 4, 8]
    pictures = draw(8, 3, 16, 16)
    together = engine.run(pictures)[0]
    for count in range(1, 9):
        assert off(engine.run(pictures[:count])[0], together[:count]) < 0.02
    assert engine._graphs == recorded


def test_threads_share_an_engine(engine):
    batches = [draw(count, 3, 40, 40) for count in GRAPH_BATCHES[:4] * 3]
    wanted, wrong = [engine.run(batch)[0] for batch in batches], []

    def ask() -> None:
        for batch, logits in zip(batches, wanted, strict=True):
            if not off(engine.run(batch)[0], logits) < 0.05:
                wrong.append(len(batch))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
