"""The GPU benchmarks, rehearsed on the CPU: they run, write what they should, and notice wrong results."""

import csv
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="PyTorch comes without Triton here")

from benchmarks import cifar_time, gpu, gpu_agreement, gpu_contestants, gpu_layer
from benchmarks.gpu_code import loop_instructions
from benchmarks.gpu_contestants import CONTESTANTS, Contest
from convmixer.config import ConvMixerConfig
from demo.drawings import draw_examples
from train.recipes import RECIPES

CPU = torch.device("cpu")
SMALL = replace(RECIPES["cifar10"], model=ConvMixerConfig(dim=16, depth=2, kernel_size=5, patch_size=4, num_classes=10))


def test_a_rehearsal_writes_its_figures(python, tmp_path):
    file = tmp_path / "figures.json"
    words = [
        "--device",
        "cpu",
        "--models",
        "cifar10",
        "--batches",
        2,
        "--only",
        "timm NHWC graph",
        "ours",
        "--rounds",
        2,
    ]
    done = python("benchmarks/gpu.py", *words, "--json", file)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["product_flops"] > 0 and result["copy_bytes"] > 0
    assert [cell["mode"] for cell in result["cells"]] == ["inference", "training"]
    for cell in result["cells"]:
        assert list(cell["contestants"]) == ["timm NCHW", "ours"]
        assert list(cell["skipped"]) == ["timm NHWC graph"]
        for about in cell["contestants"].values():
            assert len(about["times_s"]) == 2 and about["images_per_s"] > 0
    for about in result["cells"][0]["contestants"].values():
        assert 1e-4 < about["difference"] < 0.05
    assert "| **ours** |" in done.stdout and "timm NHWC graph: CUDA graphs need a GPU" in done.stdout


def test_who_fails_gets_no_figure_and_the_others_do(monkeypatch, capsys, tmp_path):
    right = Contest.inference

    def inference(self, way):
        call = right(self, way)
        if way.channels_last:
            raise RuntimeError("no such layout\nand much more")
        return (lambda: call() * 1.5) if way.ours else call

    monkeypatch.setattr(Contest, "inference", inference)
    monkeypatch.setitem(gpu.RECIPES, "cifar10", SMALL)
    words = ["--device", "cpu", "--models", "cifar10", "--modes", "inference", "--batches", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["gpu.py", *words, "--only", "ours", "timm NHWC"])
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    assert "| timm NCHW |" in printed
    assert "\nours: failed (ArithmeticError: WRONG LOGITS, off by 5.0e-01 of their norm)\n" in printed
    assert "\ntimm NHWC: failed (RuntimeError: no such layout)\n" in printed


def test_a_layer_that_is_wrong_or_fails_gets_no_figure():
    wanted = torch.ones(8)
    assert "ms   difference 0.0e+00" in gpu_layer.measured(lambda: wanted, wanted, CPU)
    assert gpu_layer.measured(lambda: wanted * 2, wanted, CPU) == "WRONG, off by 1.0e+00"
    assert gpu_layer.measured(lambda: wanted / torch.ones(3), wanted, CPU).startswith("failed (RuntimeError: The size")


def test_nothing_is_begun_when_the_time_is_over():
    contestants, skipped = gpu.race(Contest(SMALL, 2, CPU), "training", ["timm NCHW", "ours"], 1, gpu.Clock(0))
    assert not contestants
    assert skipped == dict.fromkeys(["timm NCHW", "ours"], "the time was over")


def test_all_contestants_train_the_same_network():
    contest = Contest(SMALL, 4, CPU)
    losses = {
        name: float(contest.training(way)()) for name, way in CONTESTANTS.items() if not (way.compiled or way.graph)
    }
    assert list(losses) == ["timm NCHW", "ours", "ours fused", "timm NHWC"]
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=0.02)


def test_the_ceiling_is_the_longer_of_two_times():
    ceiling = {"product_flops": 1e12, "copy_bytes": 1e9}
    floors = gpu.floors(ConvMixerConfig(dim=10, depth=3, patch_size=8), 32, 2, "inference", ceiling)
    positions = 2 * 4 * 4
    assert floors["product_s"] == pytest.approx(3 * 2 * positions * 10 * 10 / 1e12)
    assert floors["copy_s"] == pytest.approx(3 * 4 * positions * 10 * 2 / 1e9)  # each half reads one map and writes one
    about = {"images_per_s": 500.0, "peak_mb": 12.3, "difference": 0.01, "first_s": 1.5, "times_s": [0.004]}
    cell = {"model": "m", "mode": "inference", "batch": 2, "product_s": 0.001, "copy_s": 0.002, "skipped": {}}
    cell["contestants"] = {"timm NCHW": about, "ours": about | {"images_per_s": 750.0}}
    assert gpu.lines(cell)[-2:] == [
        "| timm NCHW | 500 | 1.00 | 50 % | 12 | 1.0e-02 | 1.5 |",
        "| **ours** | 750 | 1.50 | 75 % | 12 | 1.0e-02 | 1.5 |",
    ]


@torch.no_grad()
def test_the_layers_agree():
    table = gpu_layer.layers(ConvMixerConfig(dim=8, depth=1, kernel_size=5, activation="relu"), 12, 2, CPU)
    assert len(table) == 6
    for layer, contestants in table.items():
        eager = {name: call().float() for name, call in contestants.items() if "compiled" not in name}
        assert list(eager) == ["NCHW", "NHWC", "ours"]
        for name, result in eager.items():
            assert (result - eager["NCHW"]).norm() < gpu_layer.AGREE * eager["NCHW"].norm(), (layer, name)


def test_the_time_to_an_accuracy(cifar10_folder, python, tmp_path):
    file, out = tmp_path / "runs.json", tmp_path / "runs"
    words = ["--data", cifar10_folder, "--seeds", 3, 4, "--targets", 0, 101, "--json", file, "--out", out]
    options = ["--split", "full", "--epochs", 2, "--batch-size", 50, "--model.dim", 8, "--model.depth", 1]
    done = python("benchmarks/cifar_time.py", *words, "--", *options)
    assert done.returncode == 0, done.stderr
    runs = json.loads(file.read_text())["result"]["runs"]
    assert [run["seed"] for run in runs] == [3, 4]
    for run in runs:
        with open(out / f"seed-{run['seed']}" / "metrics.csv", newline="") as rows:
            rows = list(csv.DictReader(rows))
        assert run["top1"] == float(rows[-1]["held_out_top1"])
        assert run["reached_s"] == {"0": float(rows[0]["seconds"]), "101": None}
        assert run["all_s"] > run["seconds"]
    assert done.stdout.splitlines()[-1].startswith("| median |") and "not reached" in done.stdout


def test_a_target_that_one_run_missed_has_no_median():
    run = {"seed": 0, "top1": 93.0, "images_per_s": 10.0, "seconds": 9.0, "all_s": 12.0}
    rows = cifar_time.rows_of([run | {"reached_s": {"92": 5.0}}, run | {"seed": 1, "reached_s": {"92": None}}])
    assert rows[-1] == ["median", "93.00 %", 10.0, 9.0, 12.0, "not reached"]


@pytest.mark.parametrize(
    ("script", "words", "reason"),
    [
        ("gpu", ["--models", "resnet50"], "resnet50"),
        ("gpu", ["--batches", "0"], "'0' is not a whole number above 0"),
        ("gpu", ["--json", "no/such/folder/figures.json"], "there is no folder for no/such/folder/figures.json"),
        ("gpu_layer", ["--device", "abacus"], "'abacus' cannot be used"),
        ("gpu_agreement", ["--data", "no/such/folder", "--device", "cpu"], "there are no pictures in no/such/folder"),
        ("cifar_time", ["--data", "x", "--seeds", "one"], "invalid int value: 'one'"),
    ],
)
def test_wrong_arguments_get_one_line(python, script, words, reason):
    done = python(f"benchmarks/{script}.py", *words)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and reason in done.stderr


def test_the_agreement_is_counted(python, tmp_path):
    for name, picture in draw_examples().items():
        picture.save(tmp_path / f"{name}.png")
    done = python("benchmarks/gpu_agreement.py", "--data", tmp_path, "--device", "cpu", "--count", 5)
    assert done.returncode == 0, done.stderr
    assert "the same best class for 5 of 5 pictures" in done.stdout


def test_eight_bits_keep_four_digits():
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e6, 3.0, 0.0])[:, None]
    found = gpu_agreement.rounded(x, 1)
    assert ((found - x).abs() <= 2.0**-4 * x.abs() + 2.0**-9 * x.abs().amax(1, keepdim=True) / 448).all()
    assert not torch.equal(found, x) and found[4].count_nonzero() == 0


def test_the_instructions_of_the_loop_are_counted():
    listing = """
        /*0000*/                   IMAD R1, R2, R3 ;
.L_x_0:
        /*0010*/              @P0 FADD R1, R2, R3 ;
        /*0020*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24 ;
        /*0040*/             @!P1 LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0050*/              @P0 BRA `(.L_x_1) ;
"""
    assert loop_instructions(listing) == {"HGMMA": 1, "LDG": 1, "BRA": 1}


def test_a_recorded_function_needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    x = torch.zeros(3, device="cuda")
    replay = gpu_contestants.recorded(lambda: x + 1)
    x.fill_(5)
    assert replay().tolist() == [6, 6, 6]
