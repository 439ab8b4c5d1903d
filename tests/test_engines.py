"""Every engine against the network through PyTorch's operators in float64: logits, feature maps, what is refused."""

import threading
from functools import partial

import numpy as np
import pytest
import torch

from convmixer import Classifier, torch_engine, zoo
from convmixer.cpu import numpy_engine
from convmixer.cpu.engine import KernelEngine
from convmixer.cpu.kernel import KernelError
from convmixer.gpu.engine import GpuEngine
from convmixer.model import build, to_arrays
from convmixer.preprocessing import preprocess
from convmixer.sample import draw_sample
from tests.networks import CASES, network, relative_error

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ENGINES = {
    "kernel": KernelEngine,
    "NumPy": numpy_engine.NumpyEngine,
    "PyTorch": torch_engine.TorchEngine,
    "the GPU's arithmetic": partial(GpuEngine, device="cpu"),
    "GPU": partial(GpuEngine, device="cuda"),
}
EACH = [pytest.param(name, marks=ON_GPU if name == "GPU" else ()) for name in ENGINES]


def engine_of(name: str, net, *precision: str):
    try:
        return ENGINES[name](net.config, to_arrays(net), *precision)
    except KernelError as reason:
        pytest.skip(str(reason))


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", EACH)
@torch.inference_mode()
def test_logits_and_features_are_the_networks(engine, case, monkeypatch):
    config, sides = CASES[case]
    net = network(**config)
    tested, everything = engine_of(engine, net), net.config.depth + 1
    # The rounding of every feature map on the way to bfloat16, as random as it is.
    near = 1e-5 if tested.precision == "float32" else 4 * 2.0**-9 * (2 * everything) ** 0.5
    net.double()
    for count, stages in ((1, 0), (3, 1), (3, everything)):
        pictures = draw(count, net.config.in_chans, *sides)
        exact = torch.from_numpy(pictures).double()
        maps = torch.stack(net.forward_intermediates(exact))
        logits, features = tested.run(pictures, stages)
        assert logits.dtype == features.dtype == np.float32 and features.shape == (stages, *maps.shape[1:])
        assert relative_error(torch.from_numpy(logits), net(exact)) < near
        for found, wanted in zip(features, maps[everything - stages :], strict=True):
            assert relative_error(torch.from_numpy(found), wanted) < near
    monkeypatch.setattr(numpy_engine, "SLICE_BYTES", 1)  # one picture at a time
    monkeypatch.setattr(torch_engine, "CPU_SLICE_BYTES", 1)
    again, last = tested.run(pictures, 1)
    assert relative_error(torch.from_numpy(again), torch.from_numpy(logits)) < near
    assert relative_error(torch.from_numpy(last[0]), torch.from_numpy(features[-1])) < near


@pytest.mark.parametrize("engine", EACH)
def test_what_may_be_asked(engine):
    tested = engine_of(engine, network(dim=8, depth=1, kernel_size=3, patch_size=4))
    for shape in [(3, 8, 8), (1, 1, 8, 8), (1, 3, 3, 8)]:
        with pytest.raises(ValueError, match=r"it must be \(N, 3, H, W\) with sides of at least 4"):
            tested.run(draw(*shape))
    for wrong in (draw(1, 3, 8, 8).astype(np.float64), [[0.0]]):
        with pytest.raises(ValueError, match="they must be a float32 NumPy array"):
            tested.run(wrong)
    for stages in (-1, 3):
        with pytest.raises(ValueError, match=f"stages is {stages}; it must be 0 to 2"):
            tested.run(draw(1, 3, 8, 8), stages)
    logits, features = tested.run(draw(0, 3, 8, 8), 2)
    assert logits.shape == (0, 1000) and features.shape == (2, 0, 8, 2, 2)
    pictures = draw(2, 3, 8, 8)
    elsewhere = pictures[..., ::-1].copy()[..., ::-1]  # in memory, in another order
    pictures.flags.writeable = False
    assert np.array_equal(tested.run(elsewhere)[0], tested.run(pictures)[0])
    elsewhere[0, 0, 0, 0] = np.nan
    assert np.isnan(tested.run(elsewhere)[0]).all(1).tolist() == [True, False]
    tested.warm_up(8, 3)


@pytest.mark.parametrize("engine", ["kernel", "the GPU's arithmetic"])
def test_weights_are_copied(engine):
    net = network(dim=8, depth=1, kernel_size=3, patch_size=4)
    tested, pictures = engine_of(engine, net), draw(2, 3, 8, 8)
    before = tested.run(pictures)[0]
    for tensor in net.state_dict().values():
        tensor.zero_()
    assert np.array_equal(tested.run(pictures)[0], before)


@pytest.fixture(scope="module")
def shipped():
    """The shipped network, pictures, logits; batch norms magnify what is wrong 800 times, GELU gets down to -1,048."""
    checkpoint = zoo.load("convmixer_256_8_cifar10")
    net = build(checkpoint.config, checkpoint.state_dict).eval()
    pictures = np.stack([preprocess(draw_sample(), checkpoint.preprocessing), *draw(31, 3, 32, 32)]).astype(np.float32)
    with torch.inference_mode():
        return net, pictures, net(torch.from_numpy(pictures))


PRECISE = [
    ("kernel", ("float32",), 0, 1e-5),
    ("kernel", ("bfloat16",), 1e-4, 0.03),
    ("kernel", ("int8",), 1e-4, 0.06),
    ("the GPU's arithmetic", (), 1e-4, 0.03),
    pytest.param("GPU", (), 1e-4, 0.03, marks=ON_GPU),
]


@pytest.mark.parametrize(("engine", "precision", "least", "most"), PRECISE)
def test_the_shipped_model(engine, precision, least, most, shipped):
    net, pictures, wanted = shipped
    found = torch.from_numpy(engine_of(engine, net, *precision).run(pictures)[0])
    assert least <= relative_error(found, wanted) < most
    assert found.argmax(1)[0] == wanted.argmax(1)[0]


@pytest.mark.parametrize("engine", [EACH[0], EACH[-1]])
def test_threads_share_an_engine(engine):
    tested = engine_of(engine, network(dim=48, depth=3, kernel_size=5, patch_size=2))
    near = 0.05 if tested.precision == "bfloat16" else 0
    batches = [draw(count, 3, 20 + 8 * count, 30) for count in (1, 2, 4, 8)]
    wanted, wrong = [tested.run(batch)[0] for batch in batches], []

    def ask(turn: int) -> None:
        for number in range(turn, turn + 60):
            found = tested.run(batches[number % 4])[0]
            if not np.allclose(found, wanted[number % 4], rtol=0, atol=near * abs(found).max()):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@ON_GPU
def test_the_classifier_on_a_gpu(random_checkpoint, picture):
    file, pictures = str(random_checkpoint()), [picture(seed=seed) for seed in range(5)]
    exact, fast = Classifier(file, device="cuda", precision="float32"), Classifier(file, device="cuda")
    assert isinstance(fast.engine, GpuEngine) and not isinstance(exact.engine, GpuEngine)
    fast.warm_up(5)
    recorded = dict(fast.engine._graphs)
    assert [count for count, *_ in recorded] == [1, 2, 4, 8]
    for count in range(1, 6):
        found, wanted = (torch.from_numpy(each.logits(pictures[:count])) for each in (fast, exact))
        assert relative_error(found, wanted) < 0.05
    assert fast.engine._graphs == recorded
    heatmaps = [torch.from_numpy(each.heatmap(pictures[0], index=3).values) for each in (fast, exact)]
    assert relative_error(*heatmaps) < 0.05
