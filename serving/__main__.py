"""Serve the classifier over HTTP with Cog's own server, the one that runs in the container, but without Docker.

    python -m serving --port 5000
    python -m serving --probe          # for orchestrators: exits with 0 if a server takes requests

Should the server end without being asked to, it is started again. SIGTERM and SIGINT let the requests under way finish.
"""

import argparse
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from .supervisor import supervise
from .watcher import check_folder, status_of

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = Path(__file__).with_name("openapi_schema.json")  # as Cog's command line writes it
COGS_SCHEMA = ROOT / ".cog" / "openapi_schema.json"  # where its server looks; without it any input would pass
SLOTS = 16
MAX_SLOTS = 256  # each holds a picture of up to 100 MB


def main(arguments: list[str] | None = None) -> None:
    """Check the arguments and run Cog's server."""
    parser = _Parser(prog="python -m serving", description="Serve the classifier with Cog's own HTTP server.")
    port = os.environ.get("PORT") or "5000"
    parser.add_argument("--port", type=_up_to(65535), default=port, help="default: PORT or 5000")
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1; 0.0.0.0 also serves other machines")
    parser.add_argument("--slots", type=_up_to(MAX_SLOTS), default=SLOTS, help=f"requests at a time; default: {SLOTS}")
    parser.add_argument("--probe", action="store_true", help="only say what the server there says of itself")
    options = parser.parse_args(arguments)
    if options.probe:  # Cog's /health-check has the code 200 whatever it says
        status = status_of(options.host, options.port)
        print(status or "DOWN")
        sys.exit(status not in ("READY", "BUSY"))
    try:
        address = free_address(options.host, options.port)
        check_folder()
        write_schema(COGS_SCHEMA)
    except OSError as error:
        sys.exit(f"{parser.prog}: {error}")
    print(f"Cog's server will answer at http://{address}:{options.port}/predictions", flush=True)
    sys.exit(run_server(address, options.port, options.slots))


def free_address(host: str, port: int) -> str:
    """The IPv4 address of ``host``, where ``port`` is free. Raises OSError with one line for the user."""
    # Cog's server takes addresses only, and reports a port in use with a traceback.
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except OSError as error:
        reason = f"port {port} of {host} cannot be used ({error.strerror})"
        raise OSError(f"{reason}; choose another --port or --host") from error
    return address[0]


def write_schema(path: Path) -> None:
    """Put the description of the API where Cog looks for it. Servers that are running have read theirs."""
    path.parent.mkdir(exist_ok=True)
    complete = path.with_suffix(f".{os.getpid()}.tmp")  # a server that is starting may read at any moment
    complete.write_bytes(SCHEMA.read_bytes())
    complete.replace(path)


def run_server(address: str, port: int, slots: int) -> int:
    """Cog's server, for as long as it is wanted. Gives its exit status."""
    environment = os.environ | {
        "PORT": str(port),
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_MAX_CONCURRENCY": str(slots),
        "MALLOC_ARENA_MAX": "2",  # or the memory of large requests stays with each thread that ever had one
        # The server starts its worker as "python": it must be this one.
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
    }
    for name in ("COG_WEIGHTS", "CONVMIXER_CACHE"):
        if environment.get(name):  # the user's path starts from the user's folder, and Cog looks for predict.py in ROOT
            environment[name] = os.path.abspath(os.path.expanduser(environment[name]))
    return supervise([sys.executable, "-m", "cog.server.http", "--host", address], ROOT, environment)


def _up_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r:.50} is not a number from 1 to {most}")
        return int(text)

    return number


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would also print the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


if __name__ == "__main__":
    main()
