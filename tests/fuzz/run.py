"""Coverage-guided fuzzing by Atheris: inputs that reach new code are kept and changed again.

    pip install -r requirements/fuzz.txt
    python tests/fuzz/run.py pictures -max_total_time=60 -seed=1      # all libFuzzer options: -help=1
    python tests/fuzz/run.py pictures FILE                            # the bytes of a file, once

A failure ends the run: its traceback is printed, and the bytes are in runs/fuzz/crash-*, timeout-* or oom-*.
"""

import importlib
import os
import random
import resource
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0:1] = [str(ROOT / "tests"), str(ROOT)]  # `fuzz` and `convmixer` are found

INSTRUMENTED = ["convmixer", "PIL", "pillow_heif", "zipfile", "pickletools"]
CPU_SECONDS, SECONDS = 20, 120  # that an input may take; the machine may be busy with something else


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in ("pictures", "checkpoints"):
        sys.exit("run.py: the first argument must be pictures or checkpoints")
    import atheris

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = importlib.import_module(f"fuzz.{arguments[0]}")
    target.check(target.seeds()[0])  # whatever is loaded or made once is there afterwards

    def check(content: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF)
        target.check(content)
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert after.ru_utime - before.ru_utime < CPU_SECONDS, "it took too long"
        grown = after.ru_maxrss - before.ru_maxrss  # in KiB
        assert grown < target.EXTRA_MEMORY / 1024, f"it took {grown / 1024:,.0f} MiB of memory"

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        return target.mutate(content, random.Random(seed), lambda part: atheris.Mutate(part, most))[:most]

    found = ROOT / "runs" / "fuzz"
    found.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(target.seeds()):
            Path(folder, f"{number:03}").write_bytes(seed)
        words = Path(folder, "words.dict")
        words.write_text("\n".join('"' + "".join(map("\\x{:02x}".format, word)) + '"' for word in target.WORDS))
        options = [f"-dict={words}", f"-timeout={SECONDS}", "-rss_limit_mb=4096", "-max_len=100000", "-len_control=0"]
        inputs = [] if any(not word.startswith("-") for word in arguments[1:]) else [folder]
        options += [f"-artifact_prefix={found}/", *arguments[1:], *inputs]
        atheris.Setup([sys.argv[0], *options], check, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
