"""Time, memory and ceilings of a GPU; on a CPU the same by the host's clock, to rehearse."""

import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: torch.device, at_least: float = 0.2) -> float:
    """Of one call: as many, one after the other, as take ``at_least`` seconds, timed by events on the device."""
    calls, once = 1, _elapsed(call, 1, device)
    if once < at_least:
        calls = max(1, round(at_least / max(once, 1e-6)))
        once = _elapsed(call, calls, device) / calls
    return once


def _elapsed(call: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_counting_memory(device: torch.device) -> int:
    """Bytes in use, from which `peak_memory` counts; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device, before: int) -> float | None:
    """Megabytes that were in use at once since `start_counting_memory`, above ``before``; None on a CPU."""
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6 if device.type == "cuda" else None


def ceilings(device: torch.device) -> dict[str, float]:
    """At most, here: FLOP a second of a bfloat16 product, and bytes a second, read and written, of a copy."""
    side, size = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest(call: Callable[[], object]) -> float:
        call()
        return min(seconds(call, device) for _ in range(3))

    return {
        "product_flops": 2 * side**3 / fastest(lambda: torch.mm(a, b, out=out)),
        "copy_bytes": 2 * size / fastest(lambda: target.copy_(source)),
    }
