"""Two processes that talk through gloo on the CPU: the same results as one, and nothing lost.

Where it is about torchrun it is torchrun that starts them; elsewhere they are forked (tests/processes.py).
"""

import shutil
import signal

import pytest
import torch
from conftest import ROOT, write_cifar10
from picture_sets import pictures, write_folder
from processes import Server, differences, left_over, read, speaks_of, torchrun, wait_until_gone
from torch import nn

from convmixer.model import ConvMixerConfig, build
from convmixer.preprocessing import CIFAR10
from train.data.batches import HeldOut, memory_batches
from train.data.cifar import LabelledImages
from train.data.sources import open_pair
from train.distributed import World
from train.loop import evaluate

# 180 pictures: 6 steps an epoch, 18 in all, of 32 pictures or two parts of 16.
SMALL = "--recipe cifar10 --model.dim 16 --model.depth 2 --batch-size 32 --epochs 3 --lr 0.01 --amp off"
SMALL += " --memory-format channels_last"
RANDOM = ["--augmentation.reprob", "0.5", "--ema", "0.9"]  # flips and RandAugment are in the recipe
PLAIN = ["--augmentation.flip", "0", "--augmentation.ra-n", "0", "--ema", "0.9"]
STEP = "torch.optim.AdamW.step"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return [*SMALL.split(), "--data", write_cifar10(tmp_path_factory.mktemp("data"))]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """The folder of a run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert_ends(torchrun(*small, *RANDOM, "--out", folder), folder)
    return folder


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """The folder of a run of two processes whose torchrun got SIGTERM in the second epoch, and what it printed."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    bombs = [{"rank": 0, "at": STEP, "call": 9, "signal": signal.SIGTERM, "whom": "parent"}]
    return folder, torchrun(*small, *RANDOM, "--out", folder, bombs=bombs)


def assert_ends(ended, folder, code: int = 0) -> None:
    """The exit code is right, and no process hung, aborted or was left behind."""
    assert ended.code == code, ended.output
    assert "terminate called" not in ended.output
    assert "SIGABRT" not in ended.output
    assert wait_until_gone(lambda pid: speaks_of(pid, str(folder))) == []
    assert left_over(folder) == []


def assert_end_well(both) -> None:
    for ended in both:
        assert ended.code == 0, ended.output
        assert "terminate called" not in ended.output


def assert_same_figures(a, b, names: list[str]) -> None:
    for one, other in zip(read(a / "last.pt")["history"], read(b / "last.pt")["history"], strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def assert_near(a, b, atol: float) -> None:
    """The same weights but for rounding. Batch norm's statistics follow one part after another, or their mean."""
    one, other = read(a / "last.pt"), read(b / "last.pt")
    for part in ("network", "ema"):
        for name, tensor in one[part].items():
            if tensor.is_floating_point() and "running" not in name:
                assert torch.allclose(tensor, other[part][name], atol=atol), (part, name)


# The same results as one process


def test_two_processes_are_one_in_two_parts(server, small, whole, tmp_path):
    """Augmented, erased and averaged alike: random numbers belong to the part, not to the process."""
    ended = server.run(*small, *RANDOM, "--micro-batch", 16, "--out", tmp_path / "one")
    assert ended.code == 0, ended.output
    assert_same_figures(tmp_path / "one", whole, ["train_loss", "train_top1", "lr", "skipped"])
    assert_near(tmp_path / "one", whole, 1e-5)


def test_two_processes_with_synchronised_norm_are_one(server, small, tmp_path):
    ended = server.run(*small, *PLAIN, "--out", tmp_path / "one")
    assert ended.code == 0, ended.output
    assert_end_well(server.run_two(*small, *PLAIN, "--sync-norm", "--out", tmp_path / "two"))
    figures = ["train_loss", "train_top1", "held_out_loss", "held_out_top1", "held_out_top5"]
    assert_same_figures(tmp_path / "one", tmp_path / "two", figures)
    assert_near(tmp_path / "one", tmp_path / "two", 1e-4)


def test_pictures_from_disk(server, tmp_path):
    data = write_folder(tmp_path / "pictures", pictures())
    words = "--recipe cifar10 --model.dim 16 --model.depth 1 --batch-size 4 --drop-last --epochs 2 --lr 0.01 --amp off"
    words += " --memory-format contiguous --augmentation.ra-n 0 --augmentation.scale 0.5 --augmentation.reprob 0.5"
    folder = [*words.split(), "--data", data]
    assert_end_well(server.run_two(*folder, "--workers", 2, "--out", tmp_path / "two"))
    ended = server.run(*folder, "--workers", 0, "--micro-batch", 2, "--out", tmp_path / "one")
    assert ended.code == 0, ended.output
    assert_same_figures(tmp_path / "one", tmp_path / "two", ["train_loss", "train_top1"])
    assert int(read(tmp_path / "two" / "last.pt")["confusion"].sum()) == 3  # held out: one of each class


PARTS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from test_distributed import counts, sync_norm
from train.distributed import join

with join("cpu") as world:
    torch.save({{"norm": sync_norm(world), "counts": counts(world, {folder!r})}}, {out!r} + str(world.rank))
"""


@pytest.fixture(scope="module")
def parts(server, tmp_path_factory):
    """What two processes and one make of the same pictures: [process 0, process 1], one alone."""
    tmp_path = tmp_path_factory.mktemp("parts")
    files = pictures()
    del files["cat/0.JPEG"], files["cat/1.png"]  # half of the others is an odd number
    folder, script, out = write_folder(tmp_path / "pictures", files), tmp_path / "parts.py", tmp_path / "answer"
    script.write_text(PARTS.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), out=str(out)))
    assert_end_well(server.run_two(script=script))
    both = [torch.load(f"{out}{rank}", weights_only=True) for rank in (0, 1)]
    alone = World(torch.device("cpu"))
    return both, {"norm": sync_norm(alone), "counts": counts(alone, str(folder))}


def sync_norm(world: World) -> dict:
    """Two batches through batch norm, of which process 0 has three pictures and process 1 seven."""
    from train.distributed import use_sync_norm

    generator = torch.Generator().manual_seed(0)
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    mine, dtype = (slice(0, 3) if world.main else slice(3, None)), torch.float32
    if world.size > 1:
        use_sync_norm(norm)
    else:  # in double precision: PyTorch's own batch norm has few right digits where the mean is large
        norm, mine, dtype = norm.double(), slice(None), torch.float64
    results = {}
    for i in range(2):
        # Far from zero: a variance from the mean of the squares would have no digit right.
        x = 300 + torch.randn(10, 6, 5, 7, generator=generator) * torch.arange(1, 7).view(1, 6, 1, 1) / 10
        weight = torch.randn(10, 6, 5, 7, generator=generator)
        x = x[mine].to(dtype, memory_format=torch.channels_last).requires_grad_()
        y = norm(x)
        (y * weight[mine]).sum().backward()
        results |= {f"output {i}": y.detach(), f"gradient {i}": x.grad}
    results |= {f"{name}.grad": parameter.grad for name, parameter in norm.named_parameters()}
    results |= {name: buffer.clone() for name, buffer in norm.named_buffers()}
    results["evaluated"] = norm.eval()(x.detach()).detach()
    return results


def counts(world: World, folder: str) -> list[dict]:
    """Evaluations of odd numbers of pictures, from memory and from disk."""
    torch.manual_seed(0)
    network = build(ConvMixerConfig(16, 1, 5, 2, num_classes=10)).eval()
    generator = torch.Generator().manual_seed(1)
    results = []
    for images in (23, 17, 8, 1):  # in steps of 2 x 4: the last step has 7, 1, 8 and 1
        pixels = torch.randint(0, 256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator).numpy()
        labels = torch.randint(0, 10, (images,), generator=generator).numpy()
        data = LabelledImages("noise", pixels, labels, tuple("abcdefghij"))
        results.append(evaluate(network, memory_batches(data, CIFAR10, world, 4), 10, world=world))
    _, source = open_pair(folder, "train", "validation", 0.5, seed=0)
    results.append(evaluate(network, HeldOut(source, CIFAR10, world, 1)(4), 10, world=world))
    return results


def test_synchronised_norm_is_batch_norm_of_all_pictures(parts):
    both, alone = ([both["norm"] for both in parts[0]], parts[1]["norm"])
    for name, expected in alone.items():
        one, other = (answer[name] for answer in both)
        if name.endswith(".grad"):
            found = one + other  # which DistributedDataParallel does
        elif "running" in name or "tracked" in name:
            assert torch.equal(one, other), name
            found = one
        else:
            found = torch.cat([one, other])
        assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-3), name


def test_every_held_out_picture_is_counted_once(parts):
    both, alone = ([both["counts"] for both in parts[0]], parts[1]["counts"])
    assert [counts["images"] for counts in alone] == [23, 17, 8, 1, 11]
    for one, other, expected in zip(*both, alone, strict=True):
        for answer in (one, other):
            assert [answer[name] for name in ("images", "top1", "top5")] == [
                expected[name] for name in ("images", "top1", "top5")
            ]
            assert torch.equal(answer["confusion"], expected["confusion"])
            assert answer["loss"] == pytest.approx(expected["loss"], rel=1e-5)


# Nothing is lost


@pytest.mark.timeout(900)  # four starts, each of which imports everything
def test_torchrun_starts_killed_processes_again(small, whole, tmp_path):
    """In the midst of an epoch, of a save and of an evaluation; --resume comes by itself."""
    bombs = [
        {"start": 0, "rank": 1, "at": STEP, "call": 9},
        {"start": 1, "rank": 0, "at": "os.replace", "to": "previous.pt"},
        {"start": 2, "rank": 1, "at": "torch.bincount", "call": 1},
    ]
    ended = torchrun(*small, *RANDOM, "--save-every", 0, "--out", tmp_path / "run", bombs=bombs, restarts=3)
    assert_ends(ended, tmp_path / "run")
    assert ended.output.count("going on after epoch 1 of 3 and step") == 3, ended.output
    assert differences(whole, tmp_path / "run") == []


def test_sigterm_to_torchrun_saves_within_the_epoch(small, whole, stopped, tmp_path):
    folder, ended = stopped
    assert ended.output.count("stopped by SIGTERM in epoch 2 after step 4; --resume goes on from there") == 1
    assert_ends(ended, folder, code=1)  # torchrun's own
    content = read(folder / "last.pt")
    assert (content["epoch"], content["step"]) == (1, 4)
    copy = shutil.copytree(folder, tmp_path / "copy")
    ended = torchrun(*small, *RANDOM, "--out", copy, "--resume")
    assert_ends(ended, copy)
    assert "going on after epoch 1 of 3 and step 4" in ended.output
    assert differences(whole, copy) == []


def test_one_process_goes_on_for_two(server, small, stopped, tmp_path):
    copy = shutil.copytree(stopped[0], tmp_path / "copy")
    ended = server.run(*small, *RANDOM, "--out", copy, "--resume")
    assert ended.code == 0, ended.output
    assert "going on after epoch 1 of 3 and step 4" in ended.output
    assert read(copy / "last.pt")["epoch"] == 3


def test_two_processes_go_on_for_one(server, small, tmp_path):
    folder = tmp_path / "run"
    ended = server.run(*small, *RANDOM, "--out", folder, bombs=[{"at": STEP, "call": 9, "signal": signal.SIGTERM}])
    assert ended.code == 128 + signal.SIGTERM
    both = server.run_two(*small, *RANDOM, "--out", folder, "--resume")
    assert_end_well(both)
    assert "going on after epoch 1 of 3 and step 4" in both[0].output
    assert [row["epoch"] for row in read(folder / "last.pt")["history"]] == [1, 2, 3]


def test_an_error_ends_all_processes(server, small, tmp_path):
    both = server.run_two(*small, *RANDOM, "--lr", 1e30, "--out", tmp_path / "run")
    assert [ended.code for ended in both] == [2, 2], both
    assert both[0].output.count("train/run.py: the loss is not finite in epoch 1, step") == 1
    assert both[1].output == ""  # it would say the same
