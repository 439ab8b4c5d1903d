"""Whether the server takes requests, for probes that run a command: the exit status is 0 if it does.

    python -m serving.probe [HOST]

Cog's /health-check has the code 200 whatever it says. PORT is the server's, 5000 by default.
"""

import os
import sys

from .watcher import status_of

if __name__ == "__main__":
    status = status_of((sys.argv[1:] or ["127.0.0.1"])[0], int(os.environ.get("PORT", "5000")))
    print(status or "DOWN")
    sys.exit(status not in ("READY", "BUSY"))
