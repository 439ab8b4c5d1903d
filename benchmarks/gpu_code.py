"""What the Triton kernels become on a GPU, as the compiler says it: needs no GPU.

    python benchmarks/gpu_code.py [--kernel-size 9] [--activation gelu]

For each kernel, on each kind of GPU, as it is launched: registers a thread, bytes that did not fit into them, shared
memory, matrix instructions, and how many instructions the largest loop executes for 1,024 outputs. A multiprocessor
starts four a cycle at most, so that a quarter of that number, in cycles, is a bound from below.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `convmixer` is found

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.harness import Parser, table
from convmixer.gpu import fused, kernels, strips

OUTPUTS = 1024
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")
MATRIX = ("HGMMA", "HMMA", "UTCHMMA")  # of compute capability 9, up to 8, and 10
KERNELS = {"convolve": kernels._convolve, "differentiate": kernels._differentiate, "activate": kernels._activate}
KERNELS |= {"strips": strips._convolve, "mix": fused._mix, "unmix": fused._unmix}  # these on request only
KERNELS |= {"norm": fused._norm, "unnorm": fused._unnorm}
CAPABILITIES = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100, H200", 100: "B200", 120: "RTX 5090"}


@dataclass(frozen=True)
class Code:
    """One compiled kernel."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    loop: Counter  # instructions of the loop over tiles, by name, as one warp meets them
    matrix: int  # of them, on the matrix units
    ptx: str


def compile_kernel(name: str, kernel_size: int, capability: int, activation: str = "gelu") -> Code:
    """``name``: one of KERNELS. As for maps whose width is a multiple of 16."""
    kernel, options = KERNELS[name], configuration(name, kernel_size, capability, activation)
    constants = {"KERNEL": kernel_size, "ACTIVATION": activation} | options
    constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    options = {option: value for option, value in options.items() if option.islower()}
    kinds = dict.fromkeys(("x", "y", "z", "grad", "of_z", "of_x"), "*bf16") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("tiles", "height", "width", "across", "down", "channels", "positions"), "i32")
    signature = {argument: (kinds | {"eps": "fp32"}).get(argument, "*fp32") for argument in kernel.arg_names}
    # What a launch finds out by itself: which pointers and numbers are multiples of 16.
    multiples = {name for name, kind in signature.items() if kind[0] == "*"} | {"positions", "width"}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in multiples}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        commands = [triton.knobs.nvidia.cuobjdump.path, "-res-usage"], [triton.knobs.nvidia.nvdisasm.path, "-c"]
        usage, listing = (subprocess.check_output([*command, file.name], text=True) for command in commands)
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    loop = loop_instructions(listing)
    matrix = sum(loop[name] for name in MATRIX)
    return Code(registers, stack + local, compiled.metadata.shared, loop, matrix, compiled.asm["ptx"])


def configuration(name: str, kernel_size: int, capability: int, activation: str) -> dict[str, int]:
    """What the kernel is launched with."""
    fixed = {"activate": {"BLOCK": kernels.ACTIVATE_BLOCK}, "strips": strips.CONVOLVE, "mix": fused.MIX}
    if name == "convolve":
        return kernels.convolve_configuration(capability, kernel_size, activation)
    if name == "differentiate":
        return kernels.differentiate_configuration(capability)
    return fused.unmix_configuration(capability) if name == "unmix" else fixed.get(name, fused.NORM)


def loop_instructions(listing: str) -> Counter:
    """The instructions of the loop with the most matrix instructions, or else of the longest; none without a loop."""
    lines, labels, loops = listing.splitlines(), {}, [Counter()]
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = number
        jump = re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:  # backwards
            names = (INSTRUCTION.search(inner) for inner in lines[labels[jump[1]] : number + 1])
            loops.append(Counter(name[1] for name in names if name))
    return max(loops, key=lambda loop: (sum(loop[name] for name in MATRIX), loop.total()))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--kernel-size", type=int, default=9, choices=range(1, kernels.MAX_KERNEL_SIZE + 1, 2))
    parser.add_argument("--activation", default="gelu", choices=("gelu", "relu"))
    options, rows = parser.parse_args(), []
    for name in KERNELS:
        for capability, gpu in CAPABILITIES.items():
            code = compile_kernel(name, options.kernel_size, capability, options.activation)
            launched = configuration(name, options.kernel_size, capability, options.activation)
            outputs = launched["TILES"] * kernels.TILE**2 if "TILES" in launched else launched["BLOCK"]
            executed = code.loop.total() * launched.get("num_warps", 4) * OUTPUTS // outputs
            rows.append([name, gpu, code.registers, code.spilled, code.shared // 1024, code.matrix, executed])
    heads = ["kernel", "GPU", "registers", "spilled", "shared, KiB", "matrix instructions", "for 1,024 outputs"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
