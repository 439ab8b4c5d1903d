"""Pictures a second from files on the disk to answers: ours, and timm's network behind a DataLoader, in turns.

    python benchmarks/bulk.py [--rounds 3] [--json FILE]

The pictures are drawn and written as JPEGs. Each contestant is a process that loads what it needs, answers a few, and
then is timed from the first file to the last answer; cores: the processor time of it and its workers, by that time.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that the rest is found

from benchmarks import harness
from benchmarks.harness import MODEL, Failure

SIZES = {"640 x 480": (640, 480, 1024), "4000 x 3000": (4000, 3000, 96)}
DRAWN = 16  # different pictures; the others are copies
BATCH = 64


def ours() -> Callable[[list[Path]], int]:
    from convmixer import Classifier

    classifier = Classifier(MODEL, device="cpu")
    return lambda files: sum(len(batch) for batch in classifier.answers(map(str, files)))


def timm() -> Callable[[list[Path]], int]:
    import torch
    from PIL import Image
    from timm.data import create_transform

    from benchmarks.networks import timm_network
    from convmixer import zoo
    from convmixer.model import to_tensors

    checkpoint = zoo.load(MODEL)
    network, how = timm_network(checkpoint.config, to_tensors(checkpoint.state_dict)), checkpoint.preprocessing
    options = {"interpolation": how.interpolation, "crop_pct": how.crop_pct, "mean": how.mean, "std": how.std}
    transform = create_transform((3, how.size, how.size), **options)

    class Pictures(list):
        def __getitem__(self, index: int) -> torch.Tensor:
            return transform(Image.open(super().__getitem__(index)).convert("RGB"))

    @torch.inference_mode()
    def answer(files: list[Path]) -> int:
        loader = torch.utils.data.DataLoader(Pictures(files), BATCH, num_workers=os.cpu_count())
        return sum(len(network(batch).softmax(1).topk(5).indices) for batch in loader)

    return answer


CONTESTANTS = {"timm, DataLoader": timm, "ours": ours}


def used() -> float:
    """Seconds of processor time, by this process and those that it has waited for."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in each)


def take_part(name: str, folder: Path) -> None:
    """Prints pictures a second, and cores."""
    files, answer = sorted(folder.iterdir()), CONTESTANTS[name]()
    answer(files[:8])
    start, before = time.perf_counter(), used()
    count = answer(files)
    seconds = time.perf_counter() - start
    assert count == len(files)
    print(count / seconds, (used() - before) / seconds)


def run(name: str, folder: Path) -> list[float]:
    done = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(done.stderr.strip())
    return [*map(float, done.stdout.split())]


def main() -> None:
    options, rows = harness.Parser(__doc__, rounds=3).parse_args(), []
    harness.print_machine()
    with tempfile.TemporaryDirectory() as parent:
        for size, (width, height, count) in SIZES.items():
            folder = Path(parent, size)
            folder.mkdir()
            for number in range(DRAWN):
                Path(folder, f"{number:04}.jpg").write_bytes(harness.photograph(width, height, number))
            for number in range(DRAWN, count):
                os.link(folder / f"{number % DRAWN:04}.jpg", folder / f"{number:04}.jpg")
            turns = {name: partial(run, name, folder) for name in CONTESTANTS}
            found = harness.take_turns(turns, options.rounds)
            rates = {name: harness.medians(each) for name, each in found.items()}
            first = next(iter(rates.values()))[0]
            rows += [[size, name, rate, cores, rate / first] for name, (rate, cores) in rates.items()]
    print(f"{MODEL}, medians of {options.rounds} rounds\n")
    print(harness.table(["pictures", "", "images/s", "cores", "x the first"], rows))
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CONTESTANTS:
        take_part(sys.argv[1], Path(sys.argv[2]))
    else:
        harness.run(main)
