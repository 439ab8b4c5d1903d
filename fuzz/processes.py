"""What a process and all that it started hold: memory and file descriptors, as Linux tells in /proc."""

import contextlib
import os
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:  # grows meanwhile
        found += children.get(each, [])
    return found


def name(pid: int) -> str:
    """What a process of Cog's server is, from its command line."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        kinds = {"-m serving": "supervisor", "cog.server": "server", "decod": "decoder", "watcher": "watcher"}
        return next((kind for part, kind in kinds.items() if part in words), "worker")
    return "gone"


def memory(pid: int) -> int:
    """Bytes that are in memory for this process; 0 when it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmRSS"):
                return 1024 * int(line.split()[1])
    return 0


def descriptors(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0
