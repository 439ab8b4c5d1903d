"""train/evaluate.py: equal to timm's evaluation, on every kind of data, and clear about what it measured."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import network
from picture_sets import write_shards
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer import Classifier, ConvMixer
from convmixer.preprocessing import IMAGENET
from convmixer.weights import Checkpoint, save_checkpoint
from train import evaluate
from train.data.cifar import load_cifar

TEN = [f"label {i}" for i in range(10)]
SETTINGS = {"interpolation": "bicubic", "crop_pct": IMAGENET.crop_pct, "mean": IMAGENET.mean, "std": IMAGENET.std}


@pytest.fixture
def run(call_main):
    """A function that runs the command in this process; gives (code, stdout, stderr)."""
    return lambda *words: call_main(evaluate.main, "--workers", 0, "--device", "cpu", *words)


@pytest.fixture
def measured(run):
    """A function that runs the command with --json; gives its object, which must come without complaints."""

    def call(*arguments: object) -> dict:
        code, out, err = run("--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """Ten classes of pictures of different sizes, file formats and colour modes, some turned by their EXIF entry."""
    rng, parent = np.random.default_rng(3), tmp_path_factory.mktemp("odd")
    modes = ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1"]
    for i in range(60):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        image = coarse.resize(tuple(rng.integers(20, 190, 2).tolist())).convert(modes[i % 7])
        exif = image.getexif()
        if i % 4 == 1:
            exif[0x0112] = 6  # to be turned by a quarter
        (parent / "odd" / TEN[i % 10]).mkdir(parents=True, exist_ok=True)
        image.save(parent / "odd" / TEN[i % 10] / f"{i}.{'jpg' if i % 7 in (0, 1, 3) else 'png'}", exif=exif)
    return parent / "odd"


def small(classes: int) -> ConvMixer:
    ours = network(seed=1, dim=16, depth=2, kernel_size=5, patch_size=7, num_classes=classes)
    ours.head.weight.data *= 30  # for answers that differ from picture to picture
    return ours


def write_model(path: Path, network: ConvMixer, labels, accuracy: dict | None = None) -> Path:
    content = network.state_dict(), tuple(labels), replace(IMAGENET, size=56), {}, accuracy or {}
    save_checkpoint(path, Checkpoint("small", network.config, *content))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("model") / "model.safetensors", small(10), TEN, {"top1": 91.4, "data": "hold-out"}
    )


def write_pictures(folder: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@torch.inference_mode()
def test_the_figures_are_those_of_timms_own_evaluation(odd_folder, model, measured, run):
    data = create_dataset("", str(odd_folder))
    options = {"num_workers": 0, "use_prefetcher": False, "device": torch.device("cpu")}
    batches = list(create_loader(data, (3, 56, 56), batch_size=16, **options, **SETTINGS))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    network = TimmConvMixer(16, 2, kernel_size=5, patch_size=7, num_classes=10).eval()
    network.load_state_dict(small(10).state_dict())
    for words, logits in (([], network(images)), (["--flip"], (network(images) + network(images.flip(3))) / 2)):
        ours = measured("--model", model, "--data", odd_folder, "--batch-size", 16, "--workers", 2, *words)
        best = logits.topk(5).indices == labels[:, None]
        assert (ours["images"], ours["top1_count"], ours["top5_count"]) == (60, best[:, 0].sum(), best.sum())
        right = [int(best[labels == i, 0].sum()) for i in range(10)]
        assert [round(row["top1"] * row["images"] / 100) for row in ours["per_class"]] == right
        assert ours["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert 0 < ours["top1_count"] < ours["top5_count"] < 60
    said = run("--model", model, "--data", odd_folder, "--flip")[1].splitlines()[0]
    assert said == "small on odd, with mirrored test-time augmentation, in float32 by engine kernel"


def test_pictures_are_decoded_as_timm_does_or_as_the_classifier_does(odd_folder, model, measured, run):
    """The default is said; the other way gives the answers that the doors give."""
    out = run("--model", model, "--data", odd_folder)[1]
    assert "decoded as timm does: no colour profile or EXIF" in out and "   reported: 91.40 % on hold-out\n" in out
    files = sorted(odd_folder.rglob("*.*"))
    answers = Classifier(model, device="cpu").classify_many(files, 1)
    right = sum(best.label == file.parent.name for file, (best,) in zip(files, answers, strict=True))
    result = measured("--model", model, "--data", odd_folder, "--decode", "classifier")
    assert (result["decode"], result["top1_count"]) == ("classifier", right)
    assert measured("--model", model, "--data", odd_folder)["loss"] != result["loss"]


def test_mixed_precision_and_the_part_that_training_held_out_are_said(odd_folder, model, measured):
    words = ["--amp", "bf16", "--hold-out", 0.34, "--seed", 5]
    result = measured("--model", model, "--data", odd_folder, *words)
    assert (result["amp"], result["precision"], result["engine"]) == ("bf16", "bf16", "torch")
    assert (result["images"], result["data"]) == (20, "odd, hold-out (34 % of each class, seed 5)")


def test_classes_are_matched_by_synset_or_by_name(tmp_path, measured, run):
    data = write_pictures(tmp_path / "set", {"n02110958": 3, "n01443537": 4, "n01440764": 1})
    network = small(4)
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([0.0, 1.0, 2.0, 0.0])  # everything is a pug
    reported = {"top1": 80.16, "data": "ImageNet-1k validation", "measured_by": "timm"}
    model = write_model(tmp_path / "model.safetensors", network, ("tench", "goldfish", "pug", "cow"), reported)
    result = measured("--model", model, "--data", data)
    assert [(row["label"], row["images"]) for row in result["per_class"]] == [("tench", 1), ("goldfish", 4), ("pug", 3)]
    assert (result["matched_by"], result["top5"]) == ("synset", None)  # of four classes it would always be 100
    line = "  top-1   37.50 %  3 of 8   published: 80.16 % (timm, ImageNet-1k validation)"
    assert run("--model", model, "--data", data)[1].splitlines()[1] == line

    shards, names = write_shards(tmp_path / "shards"), tmp_path / "names.txt"
    names.write_text("cow\npug\ntench\n")  # in another order
    result = measured("--model", model, "--data", f"wds/{shards}", "--class-names", names)
    assert [(row["label"], row["images"]) for row in result["per_class"]] == [("tench", 8), ("pug", 8), ("cow", 8)]
    assert (result["matched_by"], result["top1_count"]) == ("name", 8)


def test_what_is_left_out_is_named_and_counted(tmp_path, run):
    counts = {f"c{i}": 1 for i in range(30)}
    model = write_model(tmp_path / "model.safetensors", small(30), counts)
    data = write_pictures(tmp_path / "set", counts)
    (data / "c3" / "empty.png").touch()
    (data / "c4" / "notes.txt").write_text("text")
    code, out, err = run("--model", model, "--data", data)
    assert code == 1
    for line in (" of 30\n", "  left out  1 that could not be read\n", "  not read, by their endings: 1 .txt\n"):
        assert line in out
    assert "  the 20 worst classes:\n" in out and out.count("% of 1\n") == 20
    assert err.startswith("train/evaluate.py: left out: ") and "c3/empty.png: the picture is empty" in err
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    code, out, err = run("--model", model, "--data", data)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no picture could be read" in err


def test_cifar_in_its_parts(cifar10, random_checkpoint, measured, run):
    model = random_checkpoint()
    test = load_cifar(cifar10, train=False)
    answers = Classifier(str(model), device="cpu").classify_many(map(Image.fromarray, test.images), 1)
    right = sum(best.index == label for (best,), label in zip(answers, test.labels, strict=True))
    for split, images in {"holdout": 20, "tune": 20, "train": 200}.items():
        assert measured("--model", model, "--data", cifar10, "--split", split)["images"] == images
    out = run("--model", model, "--data", cifar10)[1]
    assert f"{right} of 20" in out and "by their position" in out


def test_what_is_wrong_is_one_line(cifar10, random_checkpoint, tmp_path, run):
    strange = write_pictures(tmp_path / "strange", {"cow": 1, "label 1": 1})
    cases = [
        (["--data", tmp_path / "nowhere"], "does not exist"),
        (["--data", strange], "2 classes, of which 1 (cow, ...) are none of the model's 10"),
        (["--data", strange, "--split", "test"], "--split is for CIFAR"),
        (["--data", cifar10, "--val-split", "val"], "named by --split"),
        (["--data", cifar10, "--class-names", "x"], "names its classes itself"),
        (["--data", cifar10, "--batch-size", 0], "--batch-size is 0"),
        (["--data", cifar10, "--workers", -1], "--workers is -1"),
        (["--data", cifar10, "--amp", "bf16", "--precision", "int8"], "give one of them"),
        (["--data", cifar10, "--model", random_checkpoint(size=16, name="smaller")], "takes pictures of 16 pixels"),
    ]
    for arguments, part in cases:
        code, out, err = run("--model", random_checkpoint(), *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert part in err
