"""train/run.py as a command: what it says, what it leaves, and what it refuses."""

import csv
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from convmixer import Classifier, load_checkpoint
from train import run as train_run
from train.recipe import Augmentation, Recipe
from train.run import Run

QUICK = ["--recipe", "cifar10", "--model.dim", "16", "--model.depth", "1", "--batch-size", "64"]


@pytest.fixture
def quick(cifar10, tmp_path, call_main):
    """A function that runs train/run.py on one thread in this process; gives (code, stdout, stderr)."""

    def call(*arguments: object, out: str = "run"):
        return call_main(train_run.main, *QUICK, "--data", cifar10, "--out", tmp_path / out, *arguments)

    return call


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", {"channels_last", "contiguous"}), ("channel_major_fused", {"channel_major_fused"})]
)
def test_a_run_folder_opens_in_every_door(quick, cifar10, tmp_path, picture, runs, asked, used):
    code, out, err = quick("--epochs", 2, "--memory-format", asked)
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if "/2 " in line]) == 2
    folder = tmp_path / "run"
    files = {"best.safetensors", "last.pt", "previous.pt", "metrics.csv", "model.safetensors", "recipe.json", ".lock"}
    assert {path.name for path in folder.iterdir()} == files | {"curves.png", "confusion.png", "README.md"}
    assert "--epochs 2" in (folder / "README.md").read_text()  # the command as it was typed
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["epochs"], recipe["model"]["dim"], recipe["weight_decay"]) == (2, 16, 0.005)
    assert recipe["memory_format"] in used

    last, best = (load_checkpoint(folder / name) for name in ("model.safetensors", "best.safetensors"))
    assert (last.name, last.training["recipe"]) == ("convmixer_16_1_cifar10", recipe)
    assert (last.training["epochs"], last.training["finished"], "best" in last.training) == (2, True, False)
    assert last.training["data"] == "CIFAR-10 training set (images 0-179)"
    assert last.accuracy["data"] == "CIFAR-10 hold-out (training images 180-199)"
    with open(folder / "metrics.csv") as file:
        top1, epoch = max((float(row["held_out_top1"]), int(row["epoch"])) for row in csv.DictReader(file))
    assert (best.training["best"], best.training["epochs"]) == (True, epoch)
    assert best.accuracy["top1"] == pytest.approx(top1, abs=1e-3)
    assert Classifier(str(folder / "best.safetensors")).classify(picture())[0].label in best.labels

    words = ["--model", folder / "model.safetensors", "--data", cifar10, "--split", "holdout", "--json"]
    measured = json.loads(runs.start(*words, script="train/evaluate.py").wait().output)
    # The run measured in mixed precision where the processor has it: one picture of the twenty may tip over.
    assert measured["top1"] == pytest.approx(last.accuracy["top1"], abs=5.01)
    assert measured["images"] == last.accuracy["images"] == 20


def test_a_finished_or_foreign_run_is_not_overwritten(quick, tmp_path):
    folder = tmp_path / "run"
    assert quick("--epochs", 2)[0] == 0
    before = (folder / "model.safetensors").read_bytes()
    code, _, err = quick("--epochs", 2)
    assert (code, err.count("\n")) == (2, 1) and "--resume" in err
    code, _, err = quick("--epochs", 3, "--lr", 0.1, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "epochs is 3 and was 2; lr is 0.1 and was 0.05; leave out --epochs to finish the 2, or" in err
    content = torch.load(folder / "last.pt", weights_only=True)
    content["history"][0]["held_out_top1"] = 101.0  # the first epoch was the best
    torch.save(content, folder / "last.pt")
    (folder / "best.safetensors").unlink()
    code, out, _ = quick("--epochs", 2, "--resume")
    assert code == 0 and "going on after epoch 2 of 2" in out
    assert (folder / "model.safetensors").read_bytes() == before and not (folder / "best.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "tpux"], "'tpux'"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--out", "README.md"], "the run folder cannot be written"),
        (["--recipe", "cifar11"], "cifar10_progressive"),
        (["--batch-size", 512, "--drop-last"], "do not fill one batch of 512"),
        (["--augmentation.aa", "nonsense"], "augmentation.aa is 'nonsense'; it must be one of timm's policies"),
        (["--augmentation.ratio", 2, 1], "augmentation.ratio is (2.0, 1.0); the smaller must come first"),
        (["--recipe", "finetune", "--weights", "nothing.safetensors"], "nothing.safetensors"),
        (["--recipe", "finetune", "--weights", "convmixer_768_32"], "could not download convmixer_768_32"),
        (["--opt", "adamm"], "opt is 'adamm'; it must be one of timm's optimizers"),
        (["--augmentation.aa", "rand-m9"], "CIFAR takes --augmentation.ra-n"),
        (["--warmup-epochs", 2], "onecycle has its own warm-up"),
        (["--image-sizes", -1, 16], "image_sizes is ((-1, 16),)"),
        (["--model.patch-size", 32, "--batch-size", 179], "a part of one picture"),
        (["--opt", "bnbadam"], "bnbadam cannot be used: "),  # its package is missing
        (["--sched", "cosine", "--epochs", 3, "--warmup-epochs", 3], "warmup_epochs is 3; it must be below epochs, 3"),
        (["--model.in-chans", 1], "model.in_chans is 1; it must be 3"),
        (["--workers", 5000], "workers is 5000; it must be at least 0 and at most 1024"),
        (["--lr", "nan"], "lr is nan; it must be at least 0"),
        (["--ema", 1], "ema is 1.0; it must be above 0 and below 1"),
    ],
)
def test_wrong_settings_are_one_line(quick, tmp_path, monkeypatch, arguments, part):
    monkeypatch.setenv("CONVMIXER_CACHE", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # as on a cluster's node: nobody answers
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its attempts
    code, _, err = quick(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert part in err
    assert not [*tmp_path.glob("run/[!.]*")]  # nothing is left behind


def test_every_number_of_the_command_line_has_a_range():
    fields = [field for kind in (Run, Recipe, Augmentation) for field in dataclasses.fields(kind)]
    numbers = [field for field in fields if field.type in (int, float, int | None, float | None)]
    assert [field.name for field in numbers if "range" not in field.metadata] == []


@pytest.mark.parametrize("script", ["run", "evaluate", "publish"])
def test_a_reader_of_the_help_may_leave(script):
    command = f"{sys.executable} train/{script}.py --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.stderr == ""
