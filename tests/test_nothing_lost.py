"""One process that is stopped, killed, starved of space or given damaged files: nothing is lost, to the last bit.

The processes, the signals and the full disk are real; tests/saboteur.py has signals come at named moments.
"""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, write_cifar10
from picture_sets import pictures, write_folder
from processes import Server, differences, left_over, read

# 180 pictures: 6 steps an epoch, 18 in all. Everything that draws random numbers or averages is on.
SMALL = (
    "--recipe cifar10 --model.dim 16 --model.depth 2 --batch-size 32 --micro-batch 20 --epochs 3 --lr 0.01 --ema 0.9"
)
SMALL += " --augmentation.reprob 0.5 --augmentation.remode pixel --augmentation.mixup 0.2 --image-sizes 0 16 1 32"
SMALL += " --memory-format channels_last"
FOLDER = (
    "--recipe cifar10 --model.dim 16 --model.depth 1 --batch-size 4 --epochs 2 --lr 0.01 --memory-format contiguous"
)
FOLDER += " --augmentation.ra-n 0 --augmentation.scale 0.5 --augmentation.reprob 0.5 --workers 2"
EACH_STEP = ["--save-every", 0]
STEP = "torch.optim.AdamW.step"
EVALUATION = "torch.bincount"  # once for each batch of held-out pictures, and nowhere else


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def start(server, tmp_path_factory):
    """A function that starts a small run in a folder."""
    data = write_cifar10(tmp_path_factory.mktemp("data"))
    return lambda out, *more, **options: server.start(*SMALL.split(), "--data", data, "--out", out, *more, **options)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = start(folder).wait()
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """The folder of a run that was killed in its second epoch after two of the six steps, each of which was saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert start(folder, *EACH_STEP, bombs=[{"at": STEP, "call": 9}]).wait().code == -signal.SIGKILL
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


@pytest.fixture(scope="module")
def start_folder(server, tmp_path_factory):
    """The same for a set of pictures that two worker processes read from disk."""
    data = write_folder(tmp_path_factory.mktemp("pictures"), pictures())
    return lambda out, *more, **options: server.start(*FOLDER.split(), "--data", data, "--out", out, *more, **options)


@pytest.fixture(scope="module")
def whole_folder(start_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole_folder") / "run"
    ended = start_folder(folder).wait()
    assert ended.code == 0, ended.output
    return folder


def place(folder) -> tuple[int, int]:
    """(finished epochs, finished steps of the next) of the last checkpoint."""
    content = read(folder / "last.pt")
    return content["epoch"], content["step"]


def complaints(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("train/run.py: ")]


def assert_goes_on(start, folder, whole, *expected: str) -> None:
    """Resumes the run to its end, which is the undisturbed run's."""
    ended = start(folder, "--resume").wait()
    assert ended.code == 0, ended.output
    for text in expected:
        assert ended.output.count(text) == 1, ended.output
    assert differences(whole, folder) == []
    assert left_over(folder) == []
    assert (folder / "metrics.csv").read_text().count("\n") == 4


# A signal asks the run to save and stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_in_the_middle_of_an_epoch(start, whole, tmp_path, number):
    run = start(tmp_path / "run", bombs=[{"at": STEP, "call": 9, "signal": number}])
    ended = run.wait()
    assert ended.code == 128 + number, ended.output
    line = f"stopped by {number.name} in epoch 2 after step 4; --resume goes on from there"
    assert ended.output.splitlines()[-1] == line  # the step under way, and the one that noticed
    assert place(tmp_path / "run") == (1, 4)
    assert run.left_over() == []
    assert_goes_on(start, tmp_path / "run", whole, "going on after epoch 1 of 3 and step 4")


@pytest.mark.parametrize(
    ("at", "call", "expected"),
    [(EVALUATION, 2, (1, 6)), ("torch.save", 2, (2, 1))],  # torch.save: of last.pt after the second epoch
    ids=["evaluation", "saving"],
)
def test_a_signal_between_the_steps(start, whole, tmp_path, at, call, expected):
    ended = start(tmp_path / "run", bombs=[{"at": at, "call": call, "signal": signal.SIGTERM}]).wait()
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert place(tmp_path / "run") == expected
    assert_goes_on(start, tmp_path / "run", whole)


def test_a_second_ctrl_c_stops_at_once(start, whole, tmp_path):
    bombs = [{"at": STEP, "call": 9, "signal": signal.SIGINT}, {"at": "torch.save", "call": 2, "signal": signal.SIGINT}]
    ended = start(tmp_path / "run", bombs=bombs).wait()
    assert ended.code == 130, ended.output
    assert complaints(ended.output) == ["train/run.py: stopped at once; --resume goes on from the last checkpoint"]
    assert place(tmp_path / "run") == (1, 0)
    assert left_over(tmp_path / "run") == []
    assert_goes_on(start, tmp_path / "run", whole, "going on after epoch 1 of 3\n")


def test_a_signal_to_the_whole_group(start_folder, whole_folder, tmp_path):
    """As Ctrl-C in a terminal does, and many schedulers: the worker processes get it, too."""
    run = start_folder(tmp_path / "run", bombs=[{"at": STEP, "call": 2, "signal": signal.SIGTERM, "whom": "group"}])
    ended = run.wait()
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert "Traceback" not in ended.output
    assert place(tmp_path / "run") == (0, 3)
    assert run.left_over(1) == []
    ended = start_folder(tmp_path / "run", "--resume").wait()
    assert ended.code == 0, ended.output
    assert differences(whole_folder, tmp_path / "run") == []


# SIGKILL


def test_checkpoints_within_an_epoch(stopped, start, tmp_path):
    assert place(stopped) == (1, 2)
    folder = tmp_path / "run"  # by default they come every ten minutes
    assert start(folder, bombs=[{"at": STEP, "call": 9}]).wait().code == -signal.SIGKILL
    assert place(folder) == (1, 0)


def test_twenty_kills_at_random_moments(start, whole, tmp_path):
    """One run resumed again and again, most of its time spent in writing checkpoints. Where it ends, another begins."""
    rng, kills, number = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / str(number)
        run = start(folder, *EACH_STEP, "--resume")
        if kills % 4:  # the others may die before they train
            run.wait_for("epoch ")
        time.sleep(rng.uniform(0, 0.25))
        os.kill(run.pid, signal.SIGKILL)  # a process that has ended stays until the server has waited for it
        ended = run.wait()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        if ended.code == 0:
            assert differences(whole, folder) == []
            number += 1
        else:
            kills += 1
    assert_goes_on(start, folder, whole)


def test_kills_inside_every_part_of_a_save(start, whole, tmp_path):
    """Each start dies in another place, then the next goes on from there; as many runs as that takes."""
    bombs = [
        {"at": "torch.save", "call": 2, "half": True},
        {"at": "os.fsync", "call": 5},
        {"at": "os.fsync", "call": 8},
    ]
    bombs += [{"at": "os.replace", "to": "recipe.json"}]
    for name in ("next.pt", "last.pt", "previous.pt", "best.safetensors", "metrics.csv", "model.safetensors"):
        bombs += [{"at": "os.replace", "to": name}, {"at": "os.replace", "to": name, "call": 2, "after": True}]
    killed, number = [], 0
    while bombs:
        folder = tmp_path / str(number)
        ended = start(folder, *EACH_STEP, "--resume", bombs=bombs[:1]).wait()
        assert ended.code in (0, -signal.SIGKILL), ended.output
        if ended.code:
            killed.append(bombs.pop(0))
            continue
        assert differences(whole, folder) == []
        assert left_over(folder) == []
        number += 1
        assert number < 10, f"{bombs[0]} does not go off"
    assert len(killed) == 16
    assert_goes_on(start, folder, whole)


@pytest.mark.parametrize("file", ["previous.pt", "last.pt"])
def test_a_kill_between_the_renames_of_the_last_save(start, whole, tmp_path, file):
    """The resumed run has nothing left to train, but the save to finish."""
    calls = {"previous.pt": 2, "last.pt": 3}
    ended = start(tmp_path / "run", bombs=[{"at": "os.replace", "to": file, "call": calls[file]}]).wait()
    assert ended.code == -signal.SIGKILL
    assert left_over(tmp_path / "run") == ["next.pt"]
    assert_goes_on(start, tmp_path / "run", whole, "going on after epoch 3 of 3")


def test_a_killed_run_with_workers_goes_on_at_once(start_folder, whole_folder, tmp_path):
    """The workers of the killed process live on for a moment; they must not keep the folder locked."""
    killed = start_folder(tmp_path / "run", *EACH_STEP, bombs=[{"at": STEP, "call": 3}])
    assert killed.wait().code == -signal.SIGKILL
    ended = start_folder(tmp_path / "run", *EACH_STEP, "--resume").wait()
    assert ended.code == 0, ended.output
    assert differences(whole_folder, tmp_path / "run") == []
    assert killed.left_over() == []


# Damaged files


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    """In the middle of a tensor, where nothing but its checksum can tell."""
    content = bytearray(path.read_bytes())
    weight = read(path)["network"]["head.weight"].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty, remove])
def test_the_checkpoint_before_takes_over(start, whole, copy, damage):
    before = read(copy / "previous.pt")["step"]
    damage(copy / "last.pt")
    said = "last.pt is missing" if damage is remove else "last.pt is not a whole checkpoint of this command"
    assert before == 1
    assert_goes_on(
        start, copy, whole, said, "; going on from the one before it", "going on after epoch 1 of 3 and step 1"
    )


def test_a_whole_checkpoint_is_not_replaced_by_a_damaged_one(start, copy):
    """At each moment two whole ones are wanted: the next save must not push the damaged one over the whole one."""
    truncate(copy / "last.pt")
    bombs = [{"at": "os.replace", "to": "last.pt"}]
    assert start(copy, *EACH_STEP, "--resume", bombs=bombs).wait().code == -signal.SIGKILL
    assert [read(copy / name)["step"] for name in ("next.pt", "previous.pt")] == [2, 1]


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty])
def test_both_checkpoints_damaged(start, copy, damage):
    for name in ("last.pt", "previous.pt"):
        damage(copy / name)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    ended = start(copy, "--resume").wait()
    assert ended.code == 2, ended.output
    (line,) = complaints(ended.output)
    assert "last.pt is not a whole checkpoint of this command" in line
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("content", [b"no checkpoint", {"a": torch.zeros(3)}, [1, 2]], ids=["text", "tensor", "list"])
def test_a_file_that_is_no_checkpoint(start, tmp_path, content):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    before = path.read_bytes()
    ended = start(tmp_path / "run", "--resume").wait()
    assert ended.code == 2, ended.output
    assert len(complaints(ended.output)) == 1
    assert path.read_bytes() == before


# What the machine or the recipe does not allow


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a small file system of its own, or mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("only a user that may mount file systems can have a full one: " + done.stderr.decode().strip())

    yield folder, mount
    while os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(("size", "saved"), [(180, (1, 0)), (208, (2, 0))], ids=["last.pt", "best.safetensors"])
def test_a_full_disk(start, whole, mounted, size, saved):
    """A checkpoint has 76 KiB: the second save of last.pt finds no space, or best.safetensors after it."""
    disk, mount = mounted
    mount(f"size={size}k")
    ended = start(disk / "run").wait()
    assert ended.code == 1, ended.output
    (line,) = complaints(ended.output)
    assert "No space left on device" in line
    assert place(disk / "run") == saved
    assert left_over(disk / "run") == []
    mount("remount,size=4m")
    assert_goes_on(start, disk / "run", whole, f"going on after epoch {saved[0]} of 3\n")


def test_a_checkpoint_that_does_not_fit(start, whole, copy):
    """The same with the system's limit of a file's size, which needs no rights: about half a checkpoint."""
    before = (copy / "last.pt").read_bytes()
    ended = start(copy, "--resume", limit=len(before) // 2).wait()
    assert ended.code == 1, ended.output
    (line,) = complaints(ended.output)
    assert "File too large" in line
    assert (copy / "last.pt").read_bytes() == before
    assert left_over(copy) == []
    assert_goes_on(start, copy, whole, "going on after epoch 1 of 3 and step 2")


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        (1e30, "the loss is not finite in epoch 1, step "),
        (1e10, "the weights are not finite after 0 epochs and 2 steps"),
    ],
    ids=["loss", "weights"],  # a variance that overflows makes the normalised values zero, and the loss looks good
)
def test_a_run_that_diverges(start, tmp_path, lr, said):
    """What was saved before is there, and there is nothing in it that is not finite."""
    ended = start(tmp_path / "run", *EACH_STEP, "--amp", "off", "--lr", lr).wait()
    assert ended.code == 2, ended.output
    (line,) = complaints(ended.output)
    assert said in line
    content = read(tmp_path / "run" / "last.pt")
    assert all(tensor.isfinite().all() for part in ("network", "ema") for tensor in content[part].values())
    for moments in content["optimizer"]["state"].values():
        assert all(tensor.isfinite().all() for tensor in moments.values())


def test_two_runs_in_one_folder(start, whole, tmp_path):
    first = start(tmp_path / "run")
    first.wait_for("epoch ")
    os.kill(first.pid, signal.SIGSTOP)
    second = start(tmp_path / "run", "--resume").wait()
    os.kill(first.pid, signal.SIGCONT)
    assert second.code == 2, second.output
    (line,) = complaints(second.output)
    assert f"another process trains in {tmp_path / 'run'}" in line
    assert first.wait().code == 0
    assert differences(whole, tmp_path / "run") == []


def test_a_file_in_the_place_of_the_run_folder(start, tmp_path):
    (tmp_path / "run").write_text("mine")
    ended = start(tmp_path / "run").wait()
    assert ended.code == 2, ended.output
    (line,) = complaints(ended.output)
    assert "the run folder cannot be written" in line
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_may_not_be_written(start, mounted):
    disk, mount = mounted
    if os.geteuid():
        disk.chmod(0o555)
    else:  # root may write everywhere else
        mount("ro")
    ended = start(disk / "run").wait()
    disk.chmod(0o755) if os.geteuid() else None
    assert ended.code == 2, ended.output
    (line,) = complaints(ended.output)
    assert "the run folder cannot be written" in line


IMPATIENT = "import train.run, train.watch; train.watch.PATIENCE = 1; raise SystemExit(train.run.main())"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_ends_a_run_that_waits_for_a_picture(server, tmp_path, workers):
    """Every file becomes a pipe that nobody writes to: opening one takes for ever."""
    data = write_folder(tmp_path / "pictures", pictures())
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    words = [*FOLDER.split(), "--epochs", 1000, "--data", data, "--out", tmp_path / "run", "--workers", workers]
    run = server.start(*words, script=tmp_path / "impatient.py")
    run.wait_for("  1/1000")
    for path in data.rglob("*.*"):
        path.unlink()
        os.mkfifo(path)
    log, length = run.log, -1
    while length != log.stat().st_size:  # until it prints no rows any more
        length = log.stat().st_size
        time.sleep(0.5)
    os.kill(run.pid, signal.SIGTERM)
    ended = run.wait()
    assert ended.code == 128 + signal.SIGTERM, ended.output
    (line,) = complaints(ended.output)
    assert "stopped by SIGTERM; no pictures came for 1 s" in line
    assert "--resume" in line
    assert run.left_over() == []


def test_shared_memory_that_is_too_small_is_one_line(tmp_path):
    """As Docker's 64 MB are for large batches: a name space of its own, with a small /dev/shm."""
    data = write_folder(tmp_path / "pictures", pictures())
    words = [*FOLDER.split(), "--preprocessing.size", 96, "--data", data, "--out", tmp_path / "run"]
    command = shlex.join([sys.executable, "train/run.py", *map(str, words)])
    inside = f"mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec {command}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", inside], cwd=ROOT, capture_output=True, text=True, timeout=200)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("only a user that may mount file systems can have a small one: " + done.stderr.strip())
    assert done.returncode == 2, done.stderr
    (line,) = complaints(done.stderr)
    assert "has no room for a batch of 0.1 MB" in line
    assert "--shm-size" in line and "--workers" in line
    assert left_over(tmp_path / "run") == []
