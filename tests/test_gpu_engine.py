"""The network as it runs on GPUs: its arithmetic on any device, and CUDA graphs where there is a GPU."""

import threading

import pytest
import torch

from convmixer import Classifier, ConvMixer
from convmixer.classifier import _check_precision
from convmixer.gpu.engine import GRAPH_BATCHES, GpuEngine
from convmixer.sample import draw_sample
from tests.networks import CASES, network, relative_error

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
ROUNDING = 2.0**-9  # of bfloat16


def rounded_everywhere(net: ConvMixer) -> float:
    """How far bfloat16 may carry the logits: the rounding of every feature map on the way, as random as it is."""
    return 4 * ROUNDING * (2 * net.config.depth + 2) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_logits_and_features_are_the_networks_up_to_bfloat16(case, device):
    config, sides = CASES[case]
    net = network(**config)
    engine = GpuEngine(net, device)
    for count in (1, 3):
        pictures = torch.randn(count, net.config.in_chans, *sides)
        with torch.inference_mode():
            wanted, wanted_features = net(pictures), net.forward_features(pictures)
        for _ in range(3):  # on a GPU: at once, recorded, and replayed
            logits, features = engine.with_features(pictures)
            assert logits.dtype == features.dtype == torch.float32
            assert relative_error(logits, wanted) < rounded_everywhere(net)
            assert features.shape == wanted_features.shape
            assert relative_error(features.cpu(), wanted_features) < rounded_everywhere(net)
            again = relative_error(engine(pictures), logits)
            assert again == 0 if device == "cpu" else again < ROUNDING  # a library may choose another way to multiply


def test_later_changes_of_the_network_are_not_seen():
    net = network(dim=8, depth=1, kernel_size=3, patch_size=4)
    engine, pictures = GpuEngine(net, "cpu"), torch.randn(2, 3, 8, 8)
    before = engine(pictures)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(engine(pictures), before)


def test_pictures_that_do_not_fit_are_refused():
    engine = GpuEngine(network(dim=8, depth=1, kernel_size=3, patch_size=4), "cpu")
    for shape in [(3, 8, 8), (1, 1, 8, 8), (1, 3, 3, 8)]:
        with pytest.raises(ValueError, match=r"it must be \(N, 3, H, W\) with sides of at least 4"):
            engine(torch.zeros(shape))


@pytest.mark.parametrize("device", DEVICES)
def test_the_shipped_model_gives_the_same_answers(device):
    # Its batch norms magnify what is wrong up to 800 times, and GELU's inputs go down to -1,048.
    exact = Classifier("convmixer_256_8_cifar10", device="cpu")
    torch.manual_seed(0)
    pictures = torch.stack([exact.prepare(draw_sample()), *torch.randn(63, 3, 32, 32)])
    wanted, found = exact.logits(pictures), GpuEngine(exact.network, device)(pictures)
    error = (found - wanted).abs().max()
    assert 1e-4 < error / wanted.abs().max() < 0.03
    best = wanted.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * error
    assert clear.sum() > 48 and torch.equal(found.argmax(1)[clear], wanted.argmax(1)[clear])


def test_each_device_has_its_precisions():
    for precision in ("float32", "bfloat16"):
        _check_precision(precision, torch.device("cuda"))
    with pytest.raises(ValueError, match="precision 'int8' is not for cuda; there it must be float32 or bfloat16"):
        _check_precision("int8", torch.device("cuda"))
    with pytest.raises(ValueError, match="precision 'bfloat16' is not for mps; there it must be float32"):
        _check_precision("bfloat16", torch.device("mps"))


@ON_GPU
def test_the_classifier_on_a_gpu(random_checkpoint, picture):
    file, pictures = str(random_checkpoint()), [picture(seed=seed) for seed in range(5)]
    exact = Classifier(file, device="cuda")
    fast = Classifier(file, device="cuda", precision="bfloat16")
    assert exact.engine is None and isinstance(fast.engine, GpuEngine)
    assert relative_error(fast.logits(pictures), exact.logits(pictures)) < 0.05
    heatmap, wanted = fast.heatmap(pictures[0], index=3), exact.heatmap(pictures[0], index=3)
    assert abs(heatmap.values - wanted.values).max() < 0.05 * abs(wanted.values).max()


@ON_GPU
def test_threads_share_an_engine():
    net = network(dim=32, depth=3, kernel_size=9, patch_size=4)
    engine = GpuEngine(net, "cuda")
    batches = [torch.randn(count, 3, 40, 40) for count in GRAPH_BATCHES[:4] * 3]
    wanted, wrong = [engine(batch) for batch in batches], []

    def ask() -> None:
        for batch, logits in zip(batches, wanted, strict=True):
            if not torch.allclose(engine(batch), logits, rtol=0, atol=0.05 * float(logits.abs().max())):
                wrong.append(len(batch))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
