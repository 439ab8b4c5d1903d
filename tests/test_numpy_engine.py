"""The network in NumPy against the network through PyTorch's operators."""

import numpy as np
import pytest
import torch

from convmixer.cpu import numpy_engine
from convmixer.cpu.numpy_engine import NumpyEngine
from convmixer.model import to_arrays
from tests.networks import CASES, network, relative_error


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_logits_and_features_are_the_networks(case, monkeypatch):
    config, sides = CASES[case]
    net = network(**config)
    engine = NumpyEngine(net.config, to_arrays(net))
    pictures = torch.randn(3, net.config.in_chans, *sides)
    logits, features = engine.run(pictures.numpy(), stages=net.config.depth + 1)
    monkeypatch.setattr(numpy_engine, "SLICE_BYTES", 1)  # one picture at a time
    sliced, last = engine.run(pictures.numpy(), stages=1)
    wanted = net.double()(pictures.double())
    maps = net.forward_intermediates(pictures.double())
    assert logits.dtype == features.dtype == np.float32
    assert relative_error(torch.tensor(logits), wanted) < 1e-5 and relative_error(torch.tensor(sliced), wanted) < 1e-5
    assert all(relative_error(torch.tensor(found), map) < 1e-5 for found, map in zip(features, maps, strict=True))
    assert np.allclose(last[0], features[-1], atol=1e-5)


def test_gelu_is_as_exact_as_pytorchs():
    values = torch.cat([torch.linspace(-8, 8, 100_001), torch.tensor([-1e30, -353.0, 353.0, torch.nan])])
    found = torch.from_numpy(numpy_engine.gelu(values.numpy()))
    wanted = torch.nn.functional.gelu(values.double())
    assert (found[:-4] - wanted[:-4]).abs().max() < 1.3e-6
    assert found[-4:-1].tolist() == [0, 0, 353] and found[-1].isnan()


def test_what_it_is_not_given_is_named():
    net = network(dim=8, depth=1, kernel_size=3, patch_size=4)
    engine = NumpyEngine(net.config, to_arrays(net))
    with pytest.raises(ValueError, match=r"the pictures have the shape \(1, 1, 8, 8\); it must be \(N, 3, H, W\)"):
        engine.run(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(ValueError, match="stages is 3; it must be 0 to 2"):
        engine.run(np.zeros((1, 3, 8, 8), np.float32), stages=3)
    logits, features = engine.run(np.zeros((0, 3, 8, 8), np.float32), stages=2)
    assert logits.shape == (0, 1000) and features.shape == (2, 0, 8, 2, 2)
