"""Two processes that talk through gloo on the CPU: the same results as one, and nothing lost."""

import shutil
import signal

import pytest
import torch
from processes import differences, left_over, read, speaks_of, torchrun, wait_until_gone

# 180 pictures: 4 steps an epoch, 12 in all, which two processes share unevenly: 23 and 22 of 45, in one part each.
SMALL = "--recipe cifar10 --model.dim 16 --model.depth 1 --batch-size 45 --epochs 3 --lr 0.01 --amp off"
SMALL += " --memory-format channels_last"
RANDOM = ["--augmentation.reprob", "0.5", "--ema", "0.9"]  # flips and RandAugment are in the recipe
PLAIN = ["--augmentation.flip", "0", "--augmentation.ra-n", "0", "--opt", "sgd"]  # feels a gradient's size
PLAIN += ["--image-sizes", "0", "4"]  # few positions: the unbiased variance is another
STEP = "torch.optim.AdamW.step"


@pytest.fixture(scope="module")
def small(cifar10):
    return [*SMALL.split(), "--data", cifar10]


@pytest.fixture(scope="module")
def whole(runs, small, tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.run_two(*small, *RANDOM, "--out", folder)
    return folder


def assert_same(a, b, names: list[str], atol: float) -> None:
    """The same figures and weights, but for rounding and for running statistics, which follow parts or their mean."""
    one, other = read(a / "last.pt"), read(b / "last.pt")
    for row, expected in zip(one["history"], other["history"], strict=True):
        for name in names:
            assert row[name] == pytest.approx(expected[name], rel=1e-5), name
    for part in ("network", "ema"):
        for name, tensor in (one[part] or {}).items():
            if tensor.is_floating_point() and "running" not in name:
                assert torch.allclose(tensor, other[part][name], atol=atol), (part, name)


def test_two_processes_are_one_in_two_parts(runs, small, whole, tmp_path):
    """Augmented, erased and averaged alike: random numbers belong to the part, not to the process."""
    runs.start(*small, *RANDOM, "--micro-batch", 23, "--out", tmp_path / "one").wait()
    assert_same(tmp_path / "one", whole, ["train_loss", "train_top1", "lr", "skipped"], 1e-5)


def test_two_processes_with_synchronised_norm_are_one(runs, small, tmp_path):
    runs.start(*small, *PLAIN, "--out", tmp_path / "one").wait()
    runs.run_two(*small, *PLAIN, "--sync-norm", "--out", tmp_path / "two")
    figures = ["train_loss", "train_top1", "held_out_loss", "held_out_top1", "held_out_top5"]
    assert_same(tmp_path / "one", tmp_path / "two", figures, 1e-4)
    one, two = (read(tmp_path / name / "last.pt")["network"] for name in ("one", "two"))
    for name in (name for name in one if "running" in name):
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.timeout(900)  # two starts, each of which imports everything twice
def test_torchrun_starts_killed_processes_again_and_hands_on_a_signal(runs, small, whole, tmp_path):
    """The first processes are killed in the midst of a save, after which --resume comes by itself."""
    folder = tmp_path / "run"
    bombs = [
        {"start": 0, "at": "os.replace", "to": "previous.pt", "call": 4},
        {"start": 1, "at": STEP, "call": 2, "signal": signal.SIGTERM, "whom": "parent"},
    ]
    ended = torchrun(*small, *RANDOM, "--save-every", 0, "--out", folder, bombs=bombs)
    assert ended.returncode == 1, ended.stdout  # torchrun's own, after a signal
    assert "terminate called" not in ended.stdout and "SIGABRT" not in ended.stdout
    assert wait_until_gone(lambda pid: speaks_of(pid, str(folder))) == []
    assert left_over(folder) == []
    assert ended.stdout.count("going on after epoch 1 of 3") == 1, ended.stdout
    assert ended.stdout.count("stopped by SIGTERM in epoch 2 after step 3; --resume goes on from there") == 1
    copy = shutil.copytree(folder, tmp_path / "copy")
    first, _ = runs.run_two(*small, *RANDOM, "--out", folder, "--resume")
    assert "going on after epoch 1 of 3 and step 3" in first.output
    assert differences(whole, folder) == []
    one = runs.start(*small, *RANDOM, "--out", copy, "--resume").wait()  # goes on for two
    assert "going on after epoch 1 of 3 and step 3" in one.output
    assert [row["epoch"] for row in read(copy / "last.pt")["history"]] == [1, 2, 3]


def test_an_error_ends_all_processes(runs, small, tmp_path):
    first, second = runs.run_two(*small, *RANDOM, "--lr", 1e30, "--out", tmp_path / "run", code=2)
    assert "the loss is not finite in epoch 1, step" in first.complaint
    assert second.output == ""  # it would say the same
