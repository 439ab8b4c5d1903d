"""What the Triton kernels become on a GPU, as the compiler says it: needs no GPU.

    python benchmarks/gpu_code.py [--kernel-size 9] [--activation gelu]

For each kernel, on each kind of GPU in the configuration that it is launched with: registers a thread, bytes that did
not fit into registers, shared memory, matrix instructions, and how many instructions the largest loop executes for
1,024 outputs, such as one channel of a 32 x 32 feature map. A multiprocessor starts
four instructions a cycle at most, so that a quarter of that number, in cycles, is a bound from below: an estimate from
counting, and no measurement.
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

from benchmarks.options import Parser
from convmixer.gpu import fused, kernels, strips

OUTPUTS = 1024
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)")
MATRIX = ("HGMMA", "HMMA", "UTCHMMA")  # of compute capability 9, up to 8, and 10
KERNELS = {
    "convolve": kernels._convolve,
    "differentiate": kernels._differentiate,
    "activate": kernels._activate,
    "strips": strips._convolve,  # this and what follows on request only
    "mix": fused._mix,
    "unmix": fused._unmix,
    "norm": fused._norm,
    "unnorm": fused._unnorm,
}
CAPABILITIES = {80: "A100", 86: "RTX 3090", 89: "RTX 4090", 90: "H100, H200", 100: "B200", 120: "RTX 5090"}


@dataclass(frozen=True)
class Code:
    """One compiled kernel."""

    registers: int  # a thread
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    loop: Counter  # instructions of the loop over tiles, by name, as one warp meets them
    ptx: str

    @property
    def matrix(self) -> int:
        return sum(self.loop[name] for name in MATRIX)


def compile_kernel(
    name: str, kernel_size: int, capability: int, activation: str = "gelu", aligned: bool = True, **changed: int
) -> Code:
    """``name``: one of KERNELS. ``aligned``: a map's width is a multiple of 16. ``changed``: of its configuration."""
    kernel, options = KERNELS[name], configuration(name, kernel_size, capability, activation) | changed
    constants = {"KERNEL": kernel_size, "ACTIVATION": activation} | options
    constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    options = {option: value for option, value in options.items() if option.islower()}
    maps = ("x", "y", "z", "grad", "of_z", "of_x")
    numbers = ("taps", "bias", "scale", "shift", "partial", "gain", "offset", "means", "variances")
    numbers += ("of_bias", "of_gain", "of_offset")
    kinds = dict.fromkeys(maps, "*bf16") | dict.fromkeys(numbers, "*fp32") | dict.fromkeys(constants, "constexpr")
    signature = {argument: (kinds | {"eps": "fp32"}).get(argument, "i32") for argument in kernel.arg_names}
    # What a launch finds out by itself: which pointers and numbers are multiples of 16.
    multiples = {*maps, *numbers, "positions", *(("width",) if aligned else ())}
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if name in multiples
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        listing = run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    return Code(registers, stack + local, compiled.metadata.shared, loop_instructions(listing), compiled.asm["ptx"])


def configuration(name: str, kernel_size: int, capability: int, activation: str) -> dict[str, int]:
    """What the kernel is launched with."""
    match name:
        case "convolve":
            return kernels.convolve_configuration(capability, kernel_size, activation)
        case "differentiate":
            return kernels.differentiate_configuration(capability)
        case "unmix":
            return fused.unmix_configuration(capability)
        case _:
            return {"activate": {"BLOCK": kernels.ACTIVATE_BLOCK}, "strips": strips.CONVOLVE, "mix": fused.MIX}.get(
                name, fused.NORM
            )


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
    parser = Parser(prog="benchmarks/gpu_code.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel-size", type=int, default=9, choices=range(1, kernels.MAX_KERNEL_SIZE + 1, 2))
    parser.add_argument("--activation", default="gelu", choices=("gelu", "relu", "none"), help="none: as in training")
    options = parser.parse_args()
    activation = "" if options.activation == "none" else options.activation
    print(f"kernel {options.kernel_size} x {options.kernel_size}, bfloat16, activation {options.activation}")
    print("                         at a time warps  registers spilled shared, KiB  matrix  for 1,024 outputs")
    for name in KERNELS if activation else ("convolve", "differentiate"):
        for capability, gpu in CAPABILITIES.items():
            code = compile_kernel(name, options.kernel_size, capability, activation)
            launched = configuration(name, options.kernel_size, capability, activation)
            at_a_time = launched["TILES"] * kernels.TILE**2 if "TILES" in launched else launched["BLOCK"]
            warps = launched.get("num_warps", 4)
            executed = code.loop.total() * warps * OUTPUTS / at_a_time
            print(
                f"{name:<14} {gpu:<10} {at_a_time:8} {warps:5}  {code.registers:9} {code.spilled:7}"
                f" {code.shared / 1024:11.0f}  {code.matrix:6}  {executed:17,.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
