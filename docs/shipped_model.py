"""Measures a finished CIFAR-10 run on the hold-out in float32, and makes it the shipped model, with its card.

    python docs/shipped_model.py runs/cifar10_100 --data DIR

Writes convmixer/assets/convmixer_256_8_cifar10.safetensors, with the measured accuracy in its metadata, and in
docs/shipped_model/: README.md (the model card), curves.png, confusion.png, metrics.csv, recipe.json. What was tried
stands in docs/shipped_model/tried.md, written by hand, and becomes a part of the card.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from convmixer.model import build
from convmixer.weights import load_checkpoint, save_checkpoint
from train.data.batches import memory_batches
from train.data.cifar import load_cifar, split_cifar
from train.distributed import World
from train.loop import evaluate
from train.report.card import model_card
from train.report.console import read_metrics, write_metrics
from train.report.pictures import draw_confusion, draw_curves

FOLDER = ROOT / "docs" / "shipped_model"
MODEL = ROOT / "convmixer" / "assets" / "convmixer_256_8_cifar10.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder of train/run.py")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    options = parser.parse_args()

    checkpoint = load_checkpoint(options.run / "model.safetensors")
    _, hold_out = split_cifar(load_cifar(options.data, train=True), "holdout")
    network = build(checkpoint.config, checkpoint.state_dict)
    pictures = memory_batches(hold_out, checkpoint.preprocessing, World(torch.device("cpu")), 250)
    counts = evaluate(network, pictures, len(checkpoint.labels))
    accuracy = {
        "top1": 100 * counts["top1"] / counts["images"],
        "top5": 100 * counts["top5"] / counts["images"],
        "data": hold_out.name,
        "images": counts["images"],
        "amp": "off",
    }
    checkpoint = dataclasses.replace(checkpoint, accuracy=accuracy)
    save_checkpoint(MODEL, checkpoint)

    history = read_metrics(options.run / "metrics.csv")
    confusion = counts["confusion"].numpy()
    FOLDER.mkdir(exist_ok=True)
    write_metrics(FOLDER / "metrics.csv", history)
    (FOLDER / "recipe.json").write_text(json.dumps(checkpoint.training["recipe"], indent=2) + "\n")
    draw_curves(FOLDER / "curves.png", history, checkpoint.name)
    draw_confusion(FOLDER / "confusion.png", confusion, checkpoint.labels, checkpoint.name)
    card = model_card(checkpoint, history, confusion)
    (FOLDER / "README.md").write_text(card.rstrip() + "\n\n" + (FOLDER / "tried.md").read_text())
    print(f"{MODEL.name}: {counts['top1']:,} of {counts['images']:,}, {accuracy['top1']:.2f} %")


if __name__ == "__main__":
    main()
