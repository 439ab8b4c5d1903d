"""train/evaluate.py: equal to timm's evaluation, on every kind of data, and clear about what it measured."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from picture_files import heic
from picture_sets import write_shards
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models.convmixer import ConvMixer as TimmConvMixer

from convmixer import Classifier
from convmixer.config import ConvMixerConfig
from convmixer.labels import imagenet_labels
from convmixer.preprocessing import Preprocessing
from convmixer.weights import Checkpoint, save_checkpoint
from convmixer.zoo import MODELS
from train import evaluate
from train.data.sources import open_source

SYNSETS = {"n01440764": "tench", "n01443537": "goldfish", "n02110958": "pug", "n03776460": "mobile home"}


@pytest.fixture
def run(call_main):
    """A function that runs the command in this process; gives (code, stdout, stderr)."""

    def call(*arguments: object):
        return call_main(evaluate.main, "--workers", 0, "--device", "cpu", *arguments)

    return call


@pytest.fixture
def measured(run):
    """A function that runs the command with --json; gives its object, which must come without complaints."""

    def call(*arguments: object) -> dict:
        code, out, err = run("--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    """Ten classes of pictures of different sizes, file formats and colour modes, some turned by their EXIF entry."""
    rng = np.random.default_rng(3)
    modes = ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1", "I;16", "RGB", "RGB"]
    for i in range(60):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        image = coarse.resize(tuple(rng.integers(20, 190, 2).tolist()), Image.Resampling.BICUBIC)
        mode = modes[i // 10 + i % 5]
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
        else:
            image = image.convert(mode)
        exif = image.getexif()
        if i % 4 == 1:
            exif[0x0112] = 6  # to be turned by a quarter
        folder = tmp_path / "odd" / f"label {i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        if mode in ("RGB", "L", "CMYK"):
            image.save(folder / f"{i}.{'jpg' if i % 2 else 'JPEG'}", exif=exif)
        else:
            image.save(folder / f"{i}.png", exif=exif)
    return tmp_path / "odd"


def timm_network(**options) -> TimmConvMixer:
    torch.manual_seed(1)
    network = TimmConvMixer(16, 2, kernel_size=5, patch_size=7, **options)
    with torch.no_grad():  # statistics as after training, so that batch norm is not the identity
        network.train()(torch.randn(8, 3, 56, 56))
        network.head.weight *= 30  # for answers that differ from picture to picture
    return network.eval()


def write_model(path: Path, network: TimmConvMixer, labels, accuracy: dict | None = None) -> Path:
    preprocessing = Preprocessing(56, 0.9, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    config = ConvMixerConfig(16, 2, kernel_size=5, patch_size=7, num_classes=len(labels))
    save_checkpoint(
        path, Checkpoint("small", config, network.state_dict(), tuple(labels), preprocessing, {}, accuracy or {})
    )
    return path


def write_pictures(folder: Path, counts: dict[str, int], size: int = 60) -> Path:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def favourites(*indices: int) -> TimmConvMixer:
    """A network whose answer to everything is these classes of ImageNet, in this order."""
    network = timm_network()
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.zero_()
        network.head.bias[list(indices)] = torch.arange(len(indices), 0, -1.0)
    return network


@torch.inference_mode()
def test_the_counts_are_those_of_timms_own_evaluation(odd_folder, tmp_path, measured):
    network = timm_network(num_classes=10)
    model = write_model(tmp_path / "model.safetensors", network, [f"label {i}" for i in range(10)])
    ours = measured("--model", model, "--data", odd_folder, "--batch-size", 16)

    settings = {
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    for prefetcher in (False, True):  # timm normalises in the one way or in the other
        loader = create_loader(
            create_dataset("", str(odd_folder)),
            (3, 56, 56),
            batch_size=16,
            num_workers=0,
            use_prefetcher=prefetcher,
            device=torch.device("cpu"),
            **settings,
        )
        batches = list(loader)
        logits, labels = torch.cat([network(images) for images, _ in batches]), torch.cat([y for _, y in batches])
        best = logits.topk(5).indices == labels[:, None]
        assert (ours["images"], ours["top1_count"], ours["top5_count"]) == (60, best[:, 0].sum(), best.sum())
        right = [int(best[labels == i, 0].sum()) for i in range(10)]
        assert [round(row["top1"] * row["images"] / 100) for row in ours["per_class"]] == right
        assert ours["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert 0 < ours["top1_count"] < ours["top5_count"] < 60

        classifier = Classifier(str(model), device="cpu")
        options = evaluate.Evaluation(str(odd_folder), batch_size=16, workers=0)
        source, broken = open_source(str(odd_folder), "val"), []
        mine = list(evaluate.source_batches(source, list(range(10)), classifier, options, broken))
        assert broken == []
        for (images, labels), (their_images, their_labels) in zip(mine, batches, strict=True):
            assert images.equal(their_images) or (prefetcher and images.allclose(their_images, atol=1e-5))
            assert labels.equal(their_labels)
        mine_logits = torch.cat([classifier.network(images) for images, _ in mine])
        torch.testing.assert_close(mine_logits, logits, rtol=0, atol=0 if not prefetcher else 1e-4)


def test_every_kind_of_data_gives_the_same(odd_folder, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    folder = measured("--model", model, "--data", odd_folder, "--workers", 2)
    files = sorted(path for path in odd_folder.rglob("*") if path.is_file())
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for path in files:
            tar.add(path, path.relative_to(odd_folder))
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for path in files[shard::2]:
                tar.add(path, f"{path.stem}{path.suffix}")
                label = tarfile.TarInfo(f"{path.stem}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(path.parent.name[-1].encode()))
    others = [
        measured("--model", model, "--data", tmp_path / "val.tar"),
        measured("--model", model, "--data", tmp_path, "--val-split", "val"),
        measured("--model", model, "--data", f"wds/{tmp_path}", "--val-split", "part-{0..1}.tar|60", "--workers", 2),
        measured("--model", model, "--data", f"hfds/{odd_folder}", "--val-split", "train"),
    ]
    for other in others:
        for key in ("images", "top1_count", "top5_count", "per_class"):
            assert other[key] == folder[key], other["data"]
        assert other["loss"] == pytest.approx(folder["loss"])
        assert other["matched_by"] == "name"
    names = ["val.tar", f"{tmp_path.name}/val.tar", f"{tmp_path.name}/part-{{0..1}}.tar", "odd/train"]
    assert [other["data"] for other in others] == names


def test_folders_named_by_synset_are_matched_to_imagenet(tmp_path, measured, run):
    counts = {"n02110958": 3, "n01443537": 4, "n03776460": 2, "n01440764": 1}
    data = write_pictures(tmp_path / "set", counts)
    labels = imagenet_labels()
    pug, goldfish, mobile_home, tench = (labels.index(SYNSETS[name]) for name in counts)
    assert (pug, goldfish, mobile_home, tench) == (254, 1, 660, 0)  # as in ImageNet
    network = favourites(pug, 5, mobile_home, 7, tench, goldfish)
    reported = MODELS["convmixer_768_32"].accuracy
    model = write_model(tmp_path / "model.safetensors", network, labels, reported)
    result = measured("--model", model, "--data", data)
    assert (result["images"], result["top1_count"], result["top5_count"]) == (10, 3, 6)
    assert [(row["label"], row["images"]) for row in result["per_class"]] == [
        ("tench", 1),
        ("goldfish", 4),
        ("pug", 3),
        ("mobile home", 2),
    ]
    assert result["matched_by"] == "synset"

    code, out, err = run("--model", model, "--data", data)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == "small on set, in float32 by engine kernel"
    assert lines[1] == "  top-1   30.00 %  3 of 10   published: 80.16 % (timm, ImageNet-1k validation)"
    assert lines[2] == "  top-5   60.00 %  6 of 10   published: 95.07 % (timm, ImageNet-1k validation)"

    # A model of these four alone, which calls them by ImageNet's labels or by their synsets.
    for names in (SYNSETS.values(), SYNSETS):
        four = write_model(tmp_path / "four.safetensors", timm_network(num_classes=4), names)
        assert [row["images"] for row in measured("--model", four, "--data", data)["per_class"]] == [1, 4, 3, 2]


def test_the_published_figures_are_the_zoos():
    published = {
        name: (entry.accuracy["top1"], entry.accuracy["top5"]) for name, entry in MODELS.items() if entry.accuracy
    }
    assert published == {
        "convmixer_1536_20": (81.382, 95.618),
        "convmixer_768_32": (80.158, 95.070),
        "convmixer_1024_20_ks9_p14": (76.944, 93.364),
    }
    assert evaluate.beside({"top1": 91.4, "data": "hold-out"}, "top1") == "   reported: 91.40 % on hold-out"
    assert evaluate.beside({}, "top1") == ""


def test_mirroring_is_said_and_averages_the_logits(odd_folder, tmp_path, measured, run):
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    plain, mirrored = (measured("--model", model, "--data", odd_folder, *more) for more in ([], ["--flip"]))
    assert (plain["tta"], mirrored["tta"]) == (None, "flip")

    classifier = Classifier(str(model), device="cpu")
    source = open_source(str(odd_folder), "val")
    options = evaluate.Evaluation(str(odd_folder), workers=0)
    logits, truth = [], []
    with torch.inference_mode():
        for images, labels in evaluate.source_batches(source, list(range(10)), classifier, options, []):
            logits.append(torch.stack([classifier.network(images), classifier.network(images.flip(3))]).mean(0))
            truth.append(labels)
    logits, truth = torch.cat(logits), torch.cat(truth)
    assert mirrored["top1_count"] == (logits.argmax(1) == truth).sum()
    assert mirrored["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, truth).item(), rel=1e-5)
    assert mirrored["loss"] != pytest.approx(plain["loss"], rel=1e-4)
    assert run("--model", model, "--data", odd_folder, "--flip")[1].splitlines()[0] == (
        "small on odd, with mirrored test-time augmentation, in float32 by engine kernel"
    )
    assert "mirrored" not in run("--model", model, "--data", odd_folder)[1]


def test_mixed_precision_is_said(odd_folder, tmp_path, measured, run):
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    plain, bf16 = (measured("--model", model, "--data", odd_folder, "--amp", amp) for amp in ("off", "bf16"))
    assert (plain["amp"], bf16["amp"]) == ("off", "bf16")
    assert bf16["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert bf16["loss"] != plain["loss"]
    assert ", in bf16" in run("--model", model, "--data", odd_folder, "--amp", "bf16")[1].splitlines()[0]
    assert measured("--model", model, "--data", odd_folder, "--amp", "auto")["amp"] in ("off", "bf16")


def test_broken_pictures_are_named_counted_and_left_out(odd_folder, tmp_path, run):
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    (odd_folder / "label 3" / "empty.png").touch()
    (odd_folder / "label 4" / "text.jpg").write_text("text")
    code, out, err = run("--model", model, "--data", odd_folder)
    assert code == 1
    assert "  left out  2 that could not be read" in out.splitlines()
    assert " of 60" in out.splitlines()[1]
    assert [line.split(":")[:2] for line in err.splitlines()] == 2 * [["train/evaluate.py", " left out"]]
    assert "label 3/empty.png: the picture is empty" in err and "label 4/text.jpg: " in err
    code, out, _ = run("--model", model, "--data", odd_folder, "--json")
    assert (code, len(json.loads(out)["broken"]), json.loads(out)["images"]) == (1, 2, 60)

    for path in odd_folder.rglob("*.*"):
        path.write_bytes(b"")
    code, out, err = run("--model", model, "--data", odd_folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no picture could be read" in err


def test_pictures_are_decoded_as_timm_does_or_as_the_classifier_does(odd_folder, tmp_path, measured, run):
    """The default is said; the other way gives the answers that the doors give."""
    path = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    code, out, _ = run("--model", path, "--data", odd_folder)
    assert code == 0 and "decoded as timm does: no colour profile or EXIF orientation applied" in out
    code, out, _ = run("--model", path, "--data", odd_folder, "--decode", "classifier")
    assert code == 0 and "as timm does" not in out
    files = sorted(odd_folder.rglob("*.*"))
    answers = Classifier(path, device="cpu").classify_many(files, 1)
    right = sum(best.label == file.parent.name for file, (best,) in zip(files, answers, strict=True))
    result = measured("--model", path, "--data", odd_folder, "--decode", "classifier")
    assert (result["decode"], result["top1_count"]) == ("classifier", right)
    assert measured("--model", path, "--data", odd_folder)["loss"] != result["loss"]


def test_few_classes_of_shards_by_name_without_a_top_5(tmp_path, measured, run):
    """The model has five classes, the data three of them in another order, which a file names."""
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=5), "abcde")
    shards, names = write_shards(tmp_path / "shards"), tmp_path / "names.txt"
    names.write_text("e\nb\na\n")
    result = measured("--model", model, "--data", f"wds/{shards}", "--class-names", names)
    assert [(row["label"], row["images"]) for row in result["per_class"]] == [("a", 8), ("b", 8), ("e", 8)]
    assert (result["top5"], result["top5_count"], result["matched_by"]) == (None, None, "name")
    assert "top-5" not in run("--model", model, "--data", f"wds/{shards}")[1]


def test_heic_is_measured_and_what_is_not_read_is_said(tmp_path, measured, run):
    data = write_pictures(tmp_path / "set", {"a": 2, "b": 1})
    (data / "a" / "4.heic").write_bytes(heic(Image.new("RGB", (60, 60), (9, 99, 9))))
    (data / "a" / "notes.txt").write_text("text")
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=5), "abcde")
    for decode in ("timm", "classifier"):
        result = measured("--model", model, "--data", data, "--decode", decode)
        assert (result["images"], result["left_out"]) == (4, ["not read, by their endings: 1 .txt"])
    assert "  not read, by their endings: 1 .txt" in run("--model", model, "--data", data)[1].splitlines()


def test_the_part_that_training_held_out(odd_folder, tmp_path, measured):
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    result = measured("--model", model, "--data", odd_folder, "--hold-out", 0.34, "--seed", 5)
    assert (result["images"], result["data"]) == (20, "odd, hold-out (34 % of each class, seed 5)")


def test_cifar_in_its_parts(cifar10_folder, random_checkpoint, tmp_path, measured, run):
    model = random_checkpoint()
    records = np.fromfile(cifar10_folder / "cifar-10-batches-bin/test_batch.bin", np.uint8).reshape(-1, 3073)
    answers = Classifier(str(model), device="cpu").classify_many(
        Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)) for record in records
    )
    right = sum(answer[0].index == record[0] for answer, record in zip(answers, records, strict=True))
    sizes = {"holdout": 20, "tune": 20, "train": 200, "test": 20}
    for split, images in sizes.items():
        result = measured("--model", model, "--data", cifar10_folder, "--split", split)
        assert (result["images"], result["matched_by"]) == (images, "position")
        assert sum(row["images"] for row in result["per_class"]) == images
    assert result["top1_count"] == right
    assert measured("--model", model, "--data", cifar10_folder) | {"images_per_s": 0} == result | {"images_per_s": 0}
    assert result["data"].startswith("CIFAR-10 test")
    assert "by their position" in run("--model", model, "--data", cifar10_folder)[1]

    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (30, 3074), dtype=np.uint8)
    records[:, 1] = rng.integers(0, 100, 30)
    records.tofile(folder / "test.bin")
    (folder / "fine_label_names.txt").write_text("\n".join(f"name_{i}" for i in range(100)) + "\n")
    result = measured("--model", random_checkpoint(classes=100, name="hundred"), "--data", folder.parent)
    assert result["images"] == 30
    assert result["data"].startswith("CIFAR-100 test")
    code, _, err = run("--model", model, "--data", folder.parent)
    assert (code, err.count("\n")) == (2, 1)
    assert "100 classes, of which 100 (name_0, " in err


def test_what_is_wrong_is_one_line(cifar10_folder, random_checkpoint, tmp_path, run):
    model = random_checkpoint()
    strange = write_pictures(tmp_path / "strange", {"cow": 1, "label 1": 1})
    single = write_pictures(tmp_path / "loose", {"empty": 0})
    Image.new("RGB", (8, 8)).save(single / "a.png")
    cases = [
        (["--data", tmp_path / "nowhere"], "does not exist"),
        (["--data", single], "in no class's folder"),
        (["--data", strange], "2 classes, of which 1 (cow, ...) are none of the model's 10"),
        (["--data", strange, "--split", "test"], "--split is for CIFAR"),
        (["--data", strange, "--val-split", "vla"], "no split 'vla'"),
        (["--data", cifar10_folder, "--val-split", "val"], "named by --split"),
        (["--data", cifar10_folder, "--class-names", "x"], "names its classes itself"),
        (["--data", cifar10_folder, "--batch-size", 0], "--batch-size is 0"),
        (["--data", cifar10_folder, "--workers", -1], "--workers is -1"),
        (["--data", cifar10_folder, "--device", "tpux"], "'tpux'"),
        (["--data", cifar10_folder, "--model", random_checkpoint(size=16)], "takes pictures of 16 pixels"),
        (["--data", cifar10_folder, "--model", "convmixer_5"], "no model 'convmixer_5'"),
    ]
    for arguments, part in cases:
        code, out, err = run("--model", model, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert part in err


def test_only_the_worst_of_many_classes_are_printed(tmp_path, run):
    counts = {f"c{i}": 1 for i in range(30)}
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=30), counts)
    out = run("--model", model, "--data", write_pictures(tmp_path / "set", counts))[1].splitlines()
    assert "  the 20 worst classes:" in out
    assert len([line for line in out if line.endswith("% of 1")]) == 20


def test_a_reader_that_has_seen_enough_is_no_error(odd_folder, tmp_path):
    model = write_model(tmp_path / "model.safetensors", timm_network(num_classes=10), [f"label {i}" for i in range(10)])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "train/evaluate.py", "--model", model, "--data", odd_folder, "--workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for buffering in ({}, {"PYTHONUNBUFFERED": "1"}):  # the pipe breaks at the end, or at the first line
        process = subprocess.Popen(command, cwd=ROOT, text=True, env=environment | buffering, **pipes)
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 0)
