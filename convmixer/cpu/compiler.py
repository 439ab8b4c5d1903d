"""Compiles kernel.cpp: for this machine, or ahead for all of its kind.

    python -m convmixer.cpu.compiler [FOLDER]

compiles the usual kernels for processors such as this one, by default into the package, which then needs no compiler.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
AHEAD = "ahead"  # the folder beside SOURCE of what was compiled ahead
# The number formats of the 1x1 convolutions, and what the processor must have for each.
PRECISIONS = {"float32": (), "bfloat16": ("avx512_bf16",), "int8": ("avx2",)}
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC")
NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_S = 120

V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# What is compiled ahead, by platform.machine(): the precision, the compiler's options, and what the processor must
# have. The first that a processor can run is the best one.
VARIANTS = {
    "x86_64": (
        ("bfloat16", ("-march=x86-64-v4", "-mavx512bf16"), (*V4, "avx512_bf16")),
        ("int8", ("-march=x86-64-v4", "-mavx512vnni"), (*V4, "avx512_vnni")),
        ("int8", ("-march=x86-64-v3",), V3),
        ("float32", ("-march=x86-64-v4",), V4),
        ("float32", ("-march=x86-64-v3",), V3),
    ),
    "aarch64": (("float32", ("-march=armv8-a",), ()),),
}
KERNEL_SIZES = (3, 5, 7, 9)  # of what is compiled ahead


class KernelError(RuntimeError):
    """There is no kernel here: one line that says why."""


def options_for(kernel_size: int, precision: str, *target: str) -> list[str]:
    """The compiler's options. target: those that say for which processor."""
    return [*OPTIONS, *target, f"-DKERNEL={kernel_size}", f"-DNUMBER={list(PRECISIONS).index(precision)}"]


def file_name(kernel_size: int, precision: str, options: list[str], processor: str = "") -> str:
    """Of the compiled kernel; another one where the source, the options, or the processor is another."""
    sources = [file.read_bytes() for file in sorted(SOURCE.parent.glob("*.h"))]
    key = sha256(b"\0".join([SOURCE.read_bytes(), *sources, " ".join(options).encode(), processor.encode()]))
    return f"kernel-{precision}-{kernel_size}-{key.hexdigest()[:16]}.so"


def compile_kernel(options: list[str], file: Path) -> None:
    """Raises OSError where ``file`` cannot be written, and KernelError where there is no compiler that can make it."""
    with tempfile.TemporaryDirectory(prefix=".compile-", dir=file.parent) as folder:
        part, problem = Path(folder, file.name), "install g++"
        for compiler in filter(shutil.which, [os.environ.get("CXX", ""), *COMPILERS]):
            command = [compiler, *options, "-o", str(part), str(SOURCE)]
            try:
                result = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=TIMEOUT_S,
                )
            except subprocess.TimeoutExpired:
                problem = f"{compiler} took longer than {TIMEOUT_S} s"
                continue
            if result.returncode == 0:
                part.replace(file)  # two processes may do this at once: the last one wins, with the same content
                return
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            problem = f"{compiler} failed: {next(iter(lines), 'no message')}"
    raise KernelError(f"the CPU kernel cannot be compiled; {problem}")


def ahead(kernel_size: int, precision: str, flags: tuple[str, ...] | None = None) -> list[tuple[list[str], str]]:
    """Options and file names of VARIANTS here, the best first; only what a processor with ``flags`` can run."""
    chosen = []
    for name, target, needed in VARIANTS.get(platform.machine(), ()) if sys.platform == "linux" else ():
        if name == precision and (flags is None or set(needed) <= set(flags)):
            options = options_for(kernel_size, precision, *target)
            chosen.append((options, file_name(kernel_size, precision, options)))
    return chosen


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE.parent / AHEAD
    wanted = [kernel for size in KERNEL_SIZES for precision in PRECISIONS for kernel in ahead(size, precision)]

    def make(kernel: tuple[list[str], str]) -> str | None:
        try:
            compile_kernel(kernel[0], folder / kernel[1])
        except (KernelError, OSError) as error:
            return f"{kernel[1]}: {error}"

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        problems = list(filter(None, workers.map(make, wanted)))
    print(*problems, f"{len(wanted) - len(problems)} kernels in {folder}", sep="\n", file=sys.stderr)
    return int(bool(problems) or not wanted)


if __name__ == "__main__":
    sys.exit(main())
