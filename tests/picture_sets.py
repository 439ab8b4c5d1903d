"""Small sets of pictures, written in each of the forms that train/data/sources.py reads."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog 2", "dog 10")  # in the natural order of timm, which is not the alphabet's
EACH = 8


def encode(seed: int, format: str = "JPEG") -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    height, width = rng.integers(20, 60, 2)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def pictures(first_seed: int = 0) -> dict[str, bytes]:
    """EACH pictures of each class, by path."""
    return {
        f"{name}/{i}.{'png' if i % 2 else 'JPEG'}": encode(first_seed + 100 * index + i, "PNG" if i % 2 else "JPEG")
        for index, name in enumerate(CLASSES)
        for i in range(EACH)
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, broken: dict[int, bytes] | None = None, info: bool = True) -> Path:
    """24 samples over 4 shards; a label is the sample's number modulo 3."""
    shards = [f"part-{shard}.tar" for shard in range(4)]
    for shard, name in enumerate(shards):
        files = {}
        for number in range(shard, 24, 4):
            files[f"{number:04}.jpg"] = (broken or {}).get(number, encode(number))
            files[f"{number:04}.cls"] = str(number % 3).encode()
        write_tar(folder / name, files)
    if info:
        split = {"num_samples": 24, "filenames": shards, "shard_lengths": [6] * 4}
        splits = {name: split | {"name": name} for name in ("train", "val")}
        (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def write_parquet(folder: Path, labels: list, feature=None) -> Path:
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    rows = {"image": [{"bytes": encode(i), "path": None} for i in range(len(labels))], "label": labels}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    if feature is not None:
        table = table.cast_column("label", feature)
    table.to_parquet(str(folder / "train-00000.parquet"))
    return folder
