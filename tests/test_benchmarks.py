"""The benchmarks: they run, write what they should, and notice wrong results. No speed is tested."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("triton", reason="PyTorch comes without Triton here")

from benchmarks import gpu, gpu_agreement, inference
from benchmarks.harness import MODEL, Failure, table, take_turns
from demo.drawings import draw_examples


def test_inference(python, tmp_path):
    files = [tmp_path / "figures.json", tmp_path / "plot.png"]
    words = ["--models", MODEL, "--batches", 1, "--only", "ours float32", "torch.mm", "--rounds", 1]
    done = python("benchmarks/inference.py", *words, "--json", files[0], "--plot", files[1])
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(files[0].read_text())["result"].values()
    assert {"timm eager", "torch.mm"} <= set(cell) and "| torch.mm |" in done.stdout
    assert all(about["images/s"] == pytest.approx(1000 / about["ms"]) for about in cell.values())
    with Image.open(files[1]) as image:
        assert image.format == "PNG" and min(image.size) > 150


def test_wrong_logits_end_the_run():
    right = np.array([[1.0, -2.0], [0.5, 1.5]])
    inference.check_logits({inference.MEASURE: right, "ours float32": right + 1e-4, "ours int8": right + 0.1})
    for name, wrong in (("ours float32", right + 3e-4), ("ours int8", right * np.nan), ("ours int8", right[:1])):
        with pytest.raises(Failure, match=name):
            inference.check_logits({inference.MEASURE: right, name: wrong})


def test_gpu(monkeypatch, call_main, tmp_path):
    """Who fails gets no figure, and the others do."""
    small, right = gpu.RECIPES["cifar10"], gpu.Contest.call
    small = replace(small, model=replace(small.model, dim=16, depth=2))
    monkeypatch.setitem(gpu.RECIPES, "cifar10", small)

    def call(self, name, mode):
        if name == "timm NHWC":
            raise RuntimeError("no such layout\nand much more")
        found = right(self, name, mode)
        return (lambda: found() * 1.5) if (name, mode) == ("ours", "inference") else found

    monkeypatch.setattr(gpu.Contest, "call", call)
    words = ["--device", "cpu", "--models", "cifar10", "--batches", 2, "--rounds", 1, "--only", "ours", "timm NHWC"]
    code, printed, _ = call_main(gpu.main, *words, "ours fused", "--json", tmp_path / "figures.json")
    assert code == 1 and "timm NHWC failed (RuntimeError: no such layout)\n" in printed
    assert "ours failed (ArithmeticError: WRONG LOGITS, off by 5.0e-01 of their norm)\n" in printed
    cells = json.loads((tmp_path / "figures.json").read_text())["result"]["cells"]
    inferred, trained = cells["cifar10, inference, batch 2"], cells["cifar10, training, batch 2"]
    assert inferred["timm NCHW"]["images_per_s"] > 0 and inferred["timm NCHW"]["difference"] < 0.05
    assert {name for name, each in trained.items() if "failed" not in each} == {"timm NCHW", "ours", "ours fused"}
    _, printed, _ = call_main(gpu.main, *words, "--minutes", 0)
    assert "timm NCHW: the time was over" in printed


def test_the_time_to_an_accuracy(cifar10_folder, python, tmp_path):
    options = ["--split", "full", "--epochs", 2, "--batch-size", 50, "--model.dim", 8, "--model.depth", 1]
    words = ["--data", cifar10_folder, "--seeds", 3, "--targets", 0, 101, "--json", tmp_path / "runs.json"]
    done = python("benchmarks/cifar_time.py", *words, "--", *options)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads((tmp_path / "runs.json").read_text())["result"]["runs"]
    assert 0 < run["to 0 %"] < run["seconds"] < run["all"] and run["to 101 %"] is None
    assert done.stdout.splitlines()[-1].startswith("| median |")


@pytest.mark.parametrize("words", [[], ["--fp8"]])
def test_the_agreement_is_counted(words, call_main, tmp_path):
    for name, picture in draw_examples().items():
        picture.save(tmp_path / f"{name}.png")
    words = ["--data", tmp_path, "--device", "cpu", "--count", 5, *words]
    assert "the same best class for 5 of 5 pictures" in call_main(gpu_agreement.main, *words)[1]


@pytest.mark.parametrize("words", [["--batches", "0"], ["--json", "no/such/folder/x.json"], ["--device", "abacus"]])
def test_wrong_arguments_get_one_line(call_main, words):
    code, printed, complaint = call_main(gpu.main, *words)
    assert (code, printed, complaint.count("\n")) == (2, "", 1) and words[1] in complaint


def test_turns_and_tables():
    order = []
    take_turns({name: lambda name=name: order.append(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "abccba"  # nobody always follows the same
    assert table(["", "x"], [["a", 1234.5], ["b", None]]) == "|  | x |\n|---|---|\n| a | 1,234 |\n| b |  |"
