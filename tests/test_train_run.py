"""train/run.py as a command: what it says, what it leaves, and what it refuses."""

import csv
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from convmixer import Classifier, load_checkpoint
from convmixer.zoo import load
from train import run as train_run
from train.recipe import Augmentation, Recipe
from train.run import Run

# 180 pictures in 23 steps an epoch, about a second long, so that a kill hits the middle of one.
SMALL = ["--recipe", "cifar10", "--model.dim", "48", "--model.depth", "4", "--batch-size", "8", "--epochs", "4"]
SMALL += ["--lr", "0.01", "--augmentation.reprob", "0.5", "--ema", "0.9", "--image-sizes", "0", "16", "1", "32"]
SMALL += ["--memory-format", "channels_last"]  # two runs that measure it may choose differently, and round differently
QUICK = ["--recipe", "cifar10", "--model.dim", "16", "--model.depth", "1", "--batch-size", "64"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "train/run.py", *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command(*arguments), cwd=ROOT, text=True, start_new_session=True, **pipes)


def read_until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the run ended before it printed {text!r}")


@pytest.fixture
def quick(cifar10_folder, tmp_path, call_main):
    """A function that runs train/run.py on one thread in this process; gives (code, stdout, stderr)."""

    def call(*arguments: object, out: str = "run"):
        return call_main(train_run.main, *QUICK, "--data", cifar10_folder, "--out", tmp_path / out, *arguments)

    return call


def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(cifar10_folder, tmp_path):
    data = ["--data", cifar10_folder]
    whole = subprocess.run(
        command(*SMALL, *data, "--out", tmp_path / "whole"), cwd=ROOT, capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr

    killed = start(*SMALL, *data, "--out", tmp_path / "killed", "--resume")
    read_until(killed, "  2/4")
    time.sleep(0.2)  # into the third epoch
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    stopped = torch.load(tmp_path / "killed" / "last.pt", weights_only=True)
    assert stopped["epoch"] == 2

    resumed = start(*SMALL, *data, "--out", tmp_path / "killed", "--resume")
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert "going on after epoch 2 of 4" in output
    assert "  2/4" not in output  # what was finished is not done again

    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed"))
    assert a["epoch"] == b["epoch"] == 4
    for part in ("network", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part
    moments_a, moments_b = a["optimizer"]["state"], b["optimizer"]["state"]
    assert all(torch.equal(moments_a[i]["exp_avg_sq"], moments_b[i]["exp_avg_sq"]) for i in moments_a)
    exported = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])
    assert not torch.equal(exported[0]["head.weight"], stopped["ema"]["head.weight"])  # the last epochs did count
    with open(tmp_path / "killed" / "metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_a_run_folder_opens_in_every_door(quick, cifar10_folder, tmp_path, picture, python):
    code, out, err = quick("--epochs", 2)
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if "/2 " in line]) == 2
    folder = tmp_path / "run"
    files = {"best.safetensors", "last.pt", "previous.pt", "metrics.csv", "model.safetensors", "recipe.json", ".lock"}
    files |= {"curves.png", "confusion.png", "README.md"}
    assert {path.name for path in folder.iterdir()} == files
    assert "--epochs 2" in (folder / "README.md").read_text()  # the command as it was typed
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["model"]["dim"], recipe["weight_decay"]) == (2, 16, 0.005)
    assert recipe["memory_format"] in ("channels_last", "contiguous")  # what "auto" stood for

    checkpoint = load_checkpoint(folder / "model.safetensors")
    assert checkpoint.name == "convmixer_16_1_cifar10"
    assert checkpoint.training["recipe"] == recipe
    assert (checkpoint.training["epochs"], checkpoint.training["finished"]) == (2, True)
    assert checkpoint.training["data"] == "CIFAR-10 training set (images 0-179)"
    assert checkpoint.accuracy["data"] == "CIFAR-10 hold-out (training images 180-199)"
    assert checkpoint.accuracy["images"] == 20
    assert Classifier(str(folder / "model.safetensors")).classify(picture())[0].label in checkpoint.labels

    with open(folder / "metrics.csv") as file:
        rows = [(float(row["held_out_top1"]), int(row["epoch"])) for row in csv.DictReader(file)]
    best = load_checkpoint(folder / "best.safetensors")
    assert (best.training["best"], best.training["epochs"]) == (True, max(rows)[1])
    assert best.accuracy["top1"] == pytest.approx(max(rows)[0], abs=1e-3)
    assert Classifier(str(folder / "best.safetensors")).classify(picture())[0].label in best.labels
    assert "best" not in checkpoint.training

    result = python(
        "train/evaluate.py",
        "--model",
        folder / "model.safetensors",
        "--data",
        cifar10_folder,
        "--split",
        "holdout",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    # The run measured in mixed precision where the processor has it: one picture of the twenty may tip over.
    assert measured["top1"] == pytest.approx(checkpoint.accuracy["top1"], abs=5.01)
    assert measured["images"] == 20
    assert sum(row["images"] for row in measured["per_class"]) == 20
    correct = sum(row["images"] * row["top1"] / 100 for row in measured["per_class"])
    assert correct == pytest.approx(measured["top1_count"])


def test_a_finished_or_foreign_run_is_not_overwritten(quick, tmp_path):
    assert quick("--epochs", 1)[0] == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, _, err = quick("--epochs", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "--resume" in err
    code, _, err = quick("--epochs", 3, "--lr", 0.1, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "epochs is 3 and was 1; lr is 0.1 and was 0.05; leave out --epochs to finish the 1, or" in err
    assert "run/model.safetensors --epochs 3 --out ANOTHER" in err
    code, out, _ = quick("--epochs", 1, "--resume")
    assert code == 0
    assert "going on after epoch 1 of 1" in out
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


# field: a value below its range, one above it, and what is right
RANGES = {
    **dict.fromkeys(("epochs", "batch_size", "micro_batch", "ahead", "samples"), (0, None, "at least 1")),
    "threads": (-1, 5000, "at least 1 and at most 4096"),
    "workers": (-1, 5000, "at least 0 and at most 1024"),
    "save_every": (-0.5, "inf", "at least 0"),
    **dict.fromkeys(("lr", "head_lr", "weight_decay"), (-0.5, "nan", "at least 0")),
    **dict.fromkeys(("eps", "clip_grad"), (0.0, "inf", "above 0")),
    "label_smoothing": (-0.1, 2.0, "at least 0 and below 1"),
    **dict.fromkeys(("ema", "hold_out"), (0.0, 2.0, "above 0 and below 1")),
    "seed": (-1, 2**63, "at least 0 and at most 9.22337e+18"),
    "warmup_epochs": (-1, None, "at least 0"),
    "augmentation.scale": (0.0, 2.0, "above 0 and at most 1"),
    **dict.fromkeys(
        ("augmentation.flip", "augmentation.reprob", "augmentation.jitter"), (-0.5, 3.0, "at least 0 and at most 1")
    ),
    **dict.fromkeys(("augmentation.mixup", "augmentation.cutmix"), (-1.0, "nan", "at least 0")),
    "augmentation.ra_n": (-1, 101, "at least 0 and at most 100"),
    "augmentation.ra_m": (-1, 31, "at least 0 and at most 30"),
}
OUT_OF_RANGE = [
    (["--" + name.replace("_", "-"), value], f"{name} is {value}; it must be {right}")
    for name, (*values, right) in RANGES.items()
    for value in values
    if value is not None
]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "tpux"], "'tpux'"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--recipe", "cifar11"], "cifar10_progressive"),
        (["--batch-size", 512, "--drop-last"], "do not fill one batch of 512"),
        (["--augmentation.aa", "rand-m9"], "CIFAR takes --augmentation.ra-n"),
        (["--augmentation.aa", "nonsense"], "augmentation.aa is 'nonsense'; it must be one of timm's policies"),
        (["--augmentation.ratio", 2, 1], "augmentation.ratio is (2.0, 1.0); the smaller must come first"),
        (["--recipe", "imagenet_768_32"], "choose a cifar recipe"),
        (["--recipe", "finetune", "--weights", "nothing.safetensors"], "nothing.safetensors"),
        (["--opt", "adamm"], "opt is 'adamm'; it must be one of timm's optimizers"),
        (["--warmup-epochs", 2], "onecycle has its own warm-up"),
        (["--sched", "cosine", "--epochs", 3, "--warmup-epochs", 3], "warmup_epochs is 3; it must be below epochs, 3"),
        (["--model.in-chans", 1], "model.in_chans is 1; it must be 3"),
        (["--image-sizes", -1, 16], "image_sizes is ((-1, 16),)"),
        (["--model.patch-size", 32, "--batch-size", 179], "a part of one picture"),
        *OUT_OF_RANGE,
    ],
)
def test_wrong_settings_are_one_line(quick, tmp_path, arguments, part):
    code, _, err = quick(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert part in err
    assert not (tmp_path / "run").exists()  # nothing is left behind


def test_every_number_of_the_command_line_has_a_range():
    """So that what is not a sensible number is refused, and not accepted without a word."""
    settings = [(Run, ""), (Recipe, ""), (Augmentation, "augmentation.")]
    numbers = {p + f.name for kind, p in settings for f in dataclasses.fields(kind) if f.type in (int, float)}
    numbers |= {
        p + f.name for kind, p in settings for f in dataclasses.fields(kind) if f.type in (int | None, float | None)
    }
    assert numbers == set(RANGES)


def test_weights_that_cannot_be_downloaded_are_one_line(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # as on a cluster's node: nobody answers
    code, _, err = quick("--recipe", "finetune", "--weights", "convmixer_768_32")
    assert (code, err.count("\n")) == (2, 1)
    assert "could not download convmixer_768_32" in err and "by hand" in err


def test_help_says_of_each_option_what_it_is_and_can_be_cut_off():
    command = [sys.executable, "train/run.py", "--help"]
    done = subprocess.run(["sh", "-c", f"{shlex.join(command)} | head -1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "of the weights, the order of the pictures" in " ".join(re.findall(r"[^│\s]+", text.split("--seed")[1])[:12])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [(["--epoch", 3], "--epochs"), (["--epochs", "many"], "many"), (["--model.kernel-size", 4], "kernel_size is 4")],
)
def test_a_mistyped_field_is_explained(quick, arguments, part):
    code, _, err = quick(*arguments)  # in a box of tyro's
    assert code == 2
    assert part in err
    assert "Traceback" not in err


def test_finetuning_starts_from_the_weights_and_takes_the_datas_own_labels(picture, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pets"
    for i in range(12):
        path = folder / ("my cat", "my dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(40, 50, seed=i).save(path)
    words = ["run.py", "--recipe", "finetune", "--data", str(folder), "--workers", "0"]

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [*words, *arguments])
        return train_run.main()

    assert call("--epochs", "1", "--lr", "0", "--hold-out", "0.2", "--out", str(tmp_path / "run")) == 0
    tuned, shipped = load_checkpoint(tmp_path / "run" / "model.safetensors"), load("convmixer_256_8_cifar10")
    assert tuned.labels == ("my cat", "my dog")
    assert tuned.preprocessing == dataclasses.replace(shipped.preprocessing, size=64)
    for name, tensor in shipped.state_dict.items():
        if name.endswith(("weight", "bias")) and not name.startswith("head."):
            assert np.array_equal(tuned.state_dict[name], tensor), name  # the rate was 0
    assert tuned.state_dict["head.weight"].shape == (2, 256)
    answers = Classifier(str(tmp_path / "run" / "model.safetensors")).classify(picture())
    assert {answer.label for answer in answers} == {"my cat", "my dog"}
    capsys.readouterr()
    assert call("--model.kernel-size", "7", "--out", str(tmp_path / "other")) == 2
    assert "leave the fields of --model as they are" in capsys.readouterr().err
