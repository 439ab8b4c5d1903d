"""One process that is stopped, killed, starved of space or given damaged files: nothing is lost, to the last bit."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from picture_sets import pictures, write_folder
from processes import differences, left_over, read

# 180 pictures: 3 steps an epoch, 9 in all. Everything that draws random numbers or averages is on.
SMALL = "--recipe cifar10 --model.dim 16 --model.depth 1 --batch-size 64 --micro-batch 40 --epochs 3 --lr 0.01"
SMALL += " --ema 0.9 --augmentation.reprob 0.5 --augmentation.remode pixel --augmentation.mixup 0.2"
SMALL += " --image-sizes 0 16 1 32 --memory-format channels_last"
FOLDER = "--recipe cifar10 --model.dim 16 --model.depth 1 --batch-size 8 --epochs 2 --lr 0.01"
FOLDER += " --memory-format contiguous --augmentation.ra-n 0 --augmentation.scale 0.5 --augmentation.reprob 0.5"
EACH_STEP = ["--save-every", 0]
STEP = "torch.optim.AdamW.step"
BEFORE_THE_FIRST_STEP = [{"at": "train.session.train_epoch", "signal": signal.SIGSTOP}]
EVALUATION = "torch.bincount"  # once for each batch of held-out pictures, and nowhere else


@pytest.fixture(scope="module")
def start(runs, cifar10):
    """A function that starts a small run in a folder."""
    return lambda out, *more, **options: runs.start(*SMALL.split(), "--data", cifar10, "--out", out, *more, **options)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(folder).wait()
    return folder


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """The folder of a run that was killed in its second epoch after two of the three steps, each of which was saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    start(folder, *EACH_STEP, bombs=[{"at": STEP, "call": 6}]).wait(-signal.SIGKILL)
    assert place(folder) == (1, 2)
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


def folder_words(parent: Path) -> list:
    """The command line of a run on pictures that are read from disk."""
    return [*FOLDER.split(), "--data", write_folder(parent / "pictures", pictures()), "--out", parent / "run"]


def place(folder) -> tuple[int, int]:
    """(finished epochs, finished steps of the next) of the last checkpoint."""
    content = read(folder / "last.pt")
    return content["epoch"], content["step"]


def assert_goes_on(start, folder, whole, *expected: str) -> None:
    """Resumes the run to its end, which is the undisturbed run's."""
    ended = start(folder, "--resume").wait()
    for text in expected:
        assert ended.output.count(text) == 1, ended.output
    assert differences(whole, folder) == []
    assert left_over(folder) == []
    assert (folder / "metrics.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("number", "at", "call", "expected"),
    [
        (signal.SIGTERM, STEP, 4, (1, 2)),  # the step under way is finished, and the one that noticed
        (signal.SIGINT, EVALUATION, 2, (1, 3)),
        (signal.SIGUSR1, "torch.save", 2, (2, 1)),  # while last.pt of the second epoch is written
    ],
)
def test_a_signal_saves_and_stops(start, whole, tmp_path, number, at, call, expected):
    ended = start(tmp_path / "run", bombs=[{"at": at, "call": call, "signal": number}]).wait(128 + number)
    epoch, step = expected
    line = f"stopped by {number.name} in epoch {epoch + 1} after step {step}; --resume goes on from there"
    assert ended.output.splitlines()[-1] == line
    assert place(tmp_path / "run") == expected
    assert_goes_on(start, tmp_path / "run", whole, f"going on after epoch {epoch} of 3 and step {step}")


def test_a_second_ctrl_c_stops_at_once(start, tmp_path):
    bombs = [{"at": STEP, "call": 5, "signal": signal.SIGINT}, {"at": "torch.save", "call": 2, "signal": signal.SIGINT}]
    ended = start(tmp_path / "run", bombs=bombs).wait(130)
    assert ended.complaint == "train/run.py: stopped at once; --resume goes on from the last checkpoint"
    assert place(tmp_path / "run") == (1, 0)  # within an epoch they are saved every ten minutes
    assert left_over(tmp_path / "run") == []


def test_a_run_with_workers_is_stopped_and_killed(runs, tmp_path):
    """A terminal's Ctrl-C goes to the workers, too; after a kill they live on for a moment, without the run's lock."""
    words = [*folder_words(tmp_path), "--workers", 2]
    runs.start(*words, "--out", tmp_path / "whole").wait()
    bombs = [{"at": STEP, "call": 1, "signal": signal.SIGTERM, "whom": "group"}]
    stopped = runs.start(*words, bombs=bombs).wait(128 + signal.SIGTERM)
    assert stopped.left_over() == []
    resumed = [*words, *EACH_STEP, "--resume"]
    killed = runs.start(*resumed, bombs=[{"at": STEP, "call": 2}]).wait(-signal.SIGKILL)
    assert "going on after epoch 1 of 2" in runs.start(*resumed).wait().output
    assert killed.left_over() == []
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_a_run_that_waits_for_a_picture(runs, tmp_path, workers):
    """Every file becomes a pipe that nobody writes to, before the first is read: opening one takes for ever."""
    script = tmp_path / "impatient.py"
    script.write_text("import train.run, train.watch; train.watch.PATIENCE = 1; raise SystemExit(train.run.main())")
    words = [*folder_words(tmp_path), "--workers", workers]
    run = runs.start(*words, script=script, bombs=BEFORE_THE_FIRST_STEP)
    run.wait_until_stopped()
    for path in (tmp_path / "pictures").rglob("*.*"):
        path.unlink()
        os.mkfifo(path)
    os.kill(run.pid, signal.SIGTERM)
    os.kill(run.pid, signal.SIGCONT)
    assert "stopped by SIGTERM; no pictures came for 1 s" in run.wait(128 + signal.SIGTERM).complaint
    assert run.left_over() == []


def test_kills_inside_every_part_of_a_save(start, whole, tmp_path):
    """Each start dies in another place, then the next goes on from there; as many runs as that takes."""
    files = ("recipe.json", "next.pt", "last.pt", "previous.pt", "best.safetensors", "metrics.csv", "model.safetensors")
    bombs = [{"at": "os.replace", "to": name} for name in files]
    bombs += [{"at": "os.fsync", "call": 3}, {"at": EVALUATION, "call": 2}]
    number, total = 0, len(bombs)
    while bombs:
        folder = tmp_path / str(number)
        if start(folder, *EACH_STEP, "--resume", bombs=bombs[:1]).wait(0, -signal.SIGKILL).code:
            bombs.pop(0)
            continue
        assert differences(whole, folder) == []
        assert left_over(folder) == []
        number += 1
        assert number < total, f"{bombs[0]} does not go off"
    assert_goes_on(start, folder, whole)


def flip_a_byte(path):
    """In the middle of a tensor, where nothing but its checksum can tell."""
    content = bytearray(path.read_bytes())
    weight = read(path)["network"]["head.weight"].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink])
def test_the_checkpoint_before_takes_over(start, whole, copy, damage):
    """And is not replaced by the damaged one: at each moment two whole ones are wanted."""
    damage(copy / "last.pt")
    bombs = [{"at": "os.replace", "to": "last.pt"}]
    killed = start(copy, *EACH_STEP, "--resume", bombs=bombs).wait(-signal.SIGKILL)
    said = "missing" if damage is Path.unlink else "not a whole checkpoint of this command"
    for text in (f"last.pt is {said}", "; going on from the one before it", "going on after epoch 1 of 3 and step 1"):
        assert killed.output.count(text) == 1, killed.output
    assert [read(copy / name)["step"] for name in ("next.pt", "previous.pt")] == [2, 1]
    assert_goes_on(start, copy, whole)


@pytest.mark.parametrize("other", [{"a": torch.zeros(3)}, Path("a")], ids=["another's", "a pickle of an object"])
def test_without_a_whole_checkpoint_nothing_is_touched(start, copy, other):
    (copy / "last.pt").write_bytes((copy / "last.pt").read_bytes()[:20_000])
    torch.save(other, copy / "previous.pt")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert "last.pt is not a whole checkpoint of this command" in start(copy, "--resume").wait(2).complaint
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_checkpoint_that_does_not_fit(start, whole, copy):
    """As on a full disk: with the system's limit of a file's size, about half a checkpoint."""
    before = [(copy / name).read_bytes() for name in ("last.pt", "previous.pt")]
    assert "File too large" in start(copy, "--resume", limit=len(before[0]) // 2).wait(1).complaint
    assert [(copy / name).read_bytes() for name in ("last.pt", "previous.pt")] == before
    assert left_over(copy) == []
    assert_goes_on(start, copy, whole, "going on after epoch 1 of 3 and step 2")


def test_shared_memory_that_is_too_small_is_one_line(runs, tmp_path):
    """As Docker's 64 MB are for large batches."""
    words = ["--workers", 1, "--preprocessing.size", 96]
    complaint = runs.start(*folder_words(tmp_path), *words, limit=64 * 1024).wait(2).complaint
    assert "has no room for a batch of 0.2 MB" in complaint and "--shm-size" in complaint


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        (1e30, "the loss is not finite in epoch 1, step 2 of 3"),
        # A variance that overflows makes the normalised values zero, and the loss looks good.
        (1e10, "the weights are not finite after 0 epochs and 2 steps"),
    ],
)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(start, tmp_path, lr, said):
    ended = start(tmp_path / "run", *EACH_STEP, "--amp", "off", "--lr", lr).wait(2)
    assert said in ended.complaint
    content = read(tmp_path / "run" / "last.pt")
    tensors = [*content["network"].values(), *content["ema"].values()]
    tensors += [tensor for moments in content["optimizer"]["state"].values() for tensor in moments.values()]
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_two_runs_in_one_folder(start, whole, tmp_path):
    first = start(tmp_path / "run", bombs=BEFORE_THE_FIRST_STEP)
    first.wait_until_stopped()
    second = start(tmp_path / "run", "--resume").wait(2)
    assert f"another process trains in {tmp_path / 'run'}" in second.complaint
    os.kill(first.pid, signal.SIGCONT)
    first.wait()
    assert differences(whole, tmp_path / "run") == []
