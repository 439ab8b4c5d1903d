"""Pictures a second from files on the disk to answers: ours, and timm's network behind a DataLoader, in turns.

    python benchmarks/bulk.py [--model convmixer_256_8_cifar10] [--rounds 3] [--json FILE]

The pictures are drawn and written as JPEGs, 640 x 480 and 4000 x 3000 pixels. Each contestant is a process that imports
and loads what it needs, answers a few pictures, and then is timed from the first file to the last answer; cores is the
processor time that it and its workers took in that time, divided by it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # the repository, so that `benchmarks` is found

from benchmarks.harness import print_machine, table, take_turns, write_json  # noqa: E402
from benchmarks.options import at_least_one, in_a_folder  # noqa: E402

SIZES = {"640 x 480": ((640, 480), 1024), "4000 x 3000": ((4000, 3000), 96)}
DRAWN = 16  # different pictures; the others are copies

HEAD = """
import os, resource, sys, time
from pathlib import Path
model, files = sys.argv[1], sorted(map(str, Path(sys.argv[2]).iterdir()))
def used():
    who = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in who)
"""
TIMED = """
start, before = time.perf_counter(), used()
count = answer(files)
seconds = time.perf_counter() - start
assert count == len(files)
print(count / seconds, (used() - before) / seconds)
"""
OURS = """
from convmixer import Classifier
classifier = Classifier(model, device="cpu")
def answer(files):
    return sum(len(batch) for batch in classifier.answers(files))
answer(files[:8])
"""
TIMM = """
import torch
from PIL import Image
from timm.data import create_transform
from timm.models.convmixer import ConvMixer
from convmixer import zoo
checkpoint = zoo.load(model)
config, how = checkpoint.config, checkpoint.preprocessing
activation = torch.nn.GELU if config.activation == "gelu" else torch.nn.ReLU
network = ConvMixer(config.dim, config.depth, kernel_size=config.kernel_size, patch_size=config.patch_size,
                    num_classes=config.num_classes, act_layer=activation).eval()
network.load_state_dict({name: torch.from_numpy(array) for name, array in checkpoint.state_dict.items()})
transform = create_transform((3, how.size, how.size), interpolation=how.interpolation, crop_pct=how.crop_pct,
                             mean=how.mean, std=how.std)
class Files(torch.utils.data.Dataset):
    def __init__(self, files):
        self.files = files
    def __len__(self):
        return len(self.files)
    def __getitem__(self, index):
        return transform(Image.open(self.files[index]).convert("RGB"))
@torch.inference_mode()
def answer(files):
    loader = torch.utils.data.DataLoader(Files(files), batch_size=64, num_workers=os.cpu_count())
    return sum(len(network(batch).softmax(1).topk(5).indices) for batch in loader)
answer(files[:8])
"""
CONTESTANTS = {"timm, DataLoader": TIMM, "ours": OURS}


def draw(folder: Path, size: tuple[int, int], count: int) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        file = folder / f"{number:04}.jpg"
        if number < DRAWN:
            coarse = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
            grain = np.random.default_rng(number).normal(0, 6, (size[1], size[0], 1))
            Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)).save(file, quality=90)
        else:
            os.link(folder / f"{number % DRAWN:04}.jpg", file)


def run(code: str, model: str, folder: Path) -> tuple[float, float]:
    """Pictures a second, and cores."""
    command = [sys.executable, "-c", HEAD + code + TIMED, model, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bulk.py: {done.stderr}")
    rate, cores = map(float, done.stdout.split())
    return rate, cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convmixer_256_8_cifar10")
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--json", type=in_a_folder)
    options, rows = parser.parse_args(), []
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, count) in SIZES.items():
            draw(Path(folder, name), size, count)
            found = take_turns(
                {who: partial(run, code, options.model, Path(folder, name)) for who, code in CONTESTANTS.items()},
                options.rounds,
            )
            medians = {
                who: [statistics.median(column) for column in zip(*turns, strict=True)] for who, turns in found.items()
            }
            first = next(iter(medians.values()))[0]
            rows += [[name, who, rate, cores, rate / first] for who, (rate, cores) in medians.items()]
    print(f"{options.model}, medians of {options.rounds} rounds\n")
    print(table(["pictures", "", "images/s", "cores", "x the first"], rows))
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
