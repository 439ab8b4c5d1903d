"""How many threads the engines use."""

import contextlib
import math
import os
from pathlib import Path


def usable_cpus() -> int:
    """What OMP_NUM_THREADS says, or the number of cores that this process may use; at least 1."""
    with contextlib.suppress(ValueError):
        return max(1, int(os.environ.get("OMP_NUM_THREADS", "").split(",")[0]))
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    count = len(cpus)
    with contextlib.suppress(OSError):  # threads of one core share what does the arithmetic
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        count = len({Path(siblings.format(cpu)).read_text() for cpu in cpus})
    with contextlib.suppress(OSError, ValueError):  # a container's share; "max" where it has none
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, math.ceil(quota / period))
    return max(1, count)
