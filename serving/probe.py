"""Whether the server of this container takes requests, for probes that run a command: exit status 0 if it does.

    python -m serving.probe [HOST]

Cog's /health-check has the code 200 whatever it says. PORT is the server's, 5000 by default.
"""

import os
import sys

from .watcher import status_of


def main() -> int:
    status = status_of(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1", int(os.environ.get("PORT", "5000")))
    print(status or "DOWN")
    return 0 if status in ("READY", "BUSY") else 1


if __name__ == "__main__":
    sys.exit(main())
