"""The demo: a page in the browser on the machine's own models, and the same answers as an API.

    python demo/app.py [--model NAME|FILE ...] [--host 0.0.0.0] [--port 7860] [--share] [--mcp]

Uploads are deleted after an hour and when the demo ends, no other host is asked anything (but for the weights of a
model that a visitor asks for, and with --share), and no file of the server is opened, whatever a request says: see
demo/guard.py.
"""

import argparse
import contextlib
import errno
import importlib.util
import io
import logging
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

PROGRAM = "demo/app.py"
FIRST_PORT, PORTS = 7860, 100  # where a free one is looked for
QUEUE = 100  # requests that may wait; further ones are told to come back
WRONG = 2  # exit code


def main(argv: list[str] | None = None) -> int:
    from demo.uploads import make_folder

    uploads = ""
    try:
        # The folder that Gradio takes otherwise is one for all users and apps of the machine, and is never emptied.
        uploads = make_folder()
        signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signals.append(signal.SIGHUP)
        for number in signals:
            signal.signal(number, lambda *_: end(uploads))
        start(parse(argv), uploads)
        while True:
            time.sleep(3600)
    except ImportError as error:
        problem = f"{error}; install what is missing with: pip install -r requirements/demo.txt"
    except (ValueError, RuntimeError, OSError) as error:
        problem = " ".join(str(error).split())
    finally:
        shutil.rmtree(uploads, ignore_errors=True)
    print(f"{PROGRAM}: {problem}", file=sys.stderr)
    return WRONG


def parse(argv: list[str] | None) -> argparse.Namespace:
    from convmixer.__main__ import Parser

    parser = Parser(prog=PROGRAM, description="Serve the demo page and its API.")
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="NAME|FILE", help="models to offer, the default one first; or auto")
    host = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    add("--host", default=host, help="default: 127.0.0.1; 0.0.0.0 also serves other machines")
    add("--port", type=port, help=f"default: the first free one from {FIRST_PORT}")
    add("--share", action="store_true", help="also under a public address, through Gradio's servers")
    add("--mcp", action="store_true", help="the API as tools for language models, too; needs gradio[mcp]")
    arguments = parser.parse_args(argv)
    if arguments.port is None and (value := os.environ.get("GRADIO_SERVER_PORT")):
        try:
            arguments.port = port(value)
        except argparse.ArgumentTypeError as error:
            parser.error(f"GRADIO_SERVER_PORT: {error}")
    return arguments


def port(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r:.50} is not a port; give a number from 1 to 65535")
    return value


def start(arguments: argparse.Namespace, uploads: str) -> None:
    """Serve, in threads of its own, and say where. Raises ImportError, or another error with a line for the user."""
    if arguments.mcp and importlib.util.find_spec("mcp") is None:
        raise RuntimeError("--mcp needs another package; install it with: pip install 'gradio[mcp]'")
    address, _ = find_place(arguments.host, arguments.port)  # what is wrong with it shows before anything is loaded
    from convmixer import zoo
    from convmixer.download import terminal_progress
    from demo.models import Models

    for name in arguments.model:
        if name in zoo.MODELS and zoo.local_path(name) is None:
            zoo.download(name, terminal_progress(name))  # Models would do it without a word
    models = Models(arguments.model)
    prepare_environment(address, uploads)
    directly = os.environ["no_proxy"]
    os.environ["no_proxy"] = "*"  # Gradio, which starts with no call to elsewhere, fails where it cannot use a proxy
    from demo.guard import launch_options, start_deleting
    from demo.page import LOOKS, build

    page = build(models, examples())
    page.queue(max_size=QUEUE)
    start_deleting(page)
    options = launch_options(mcp=arguments.mcp) | LOOKS | {"prevent_thread_lock": True, "quiet": True}
    address, number = find_place(arguments.host, arguments.port)  # again, as others may have started meanwhile
    with contextlib.redirect_stdout(io.StringIO()):  # Gradio is not that quiet
        page.launch(**options, server_name=address, server_port=number)
    os.environ["no_proxy"] = directly
    if arguments.mcp and not page.mcp_server:
        raise RuntimeError(f"--mcp does not work with the packages installed here ({page.mcp_error})")
    here = f"http://{address.replace('0.0.0.0', '127.0.0.1').replace('[::]', '[::1]')}:{number}"
    everywhere = " and at this machine's other addresses" if address in ("0.0.0.0", "[::]") else ""
    print(f"The demo is at {here}{everywhere} (Ctrl-C ends it)", flush=True)
    if arguments.mcp:
        print(f"Its tools for language models (MCP) are at {here}/gradio_api/mcp/", flush=True)
    if arguments.share:
        share(page)


def find_place(host: str, number: int | None) -> tuple[str, int]:
    """The address of ``host`` for Gradio, and the port, or the first free one. Raises OSError with a line for the user.

    Gradio takes 5 seconds to find that a port cannot be had, and does not say why.
    """
    try:
        found = socket.getaddrinfo(host, number or FIRST_PORT, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"there is no host {host!r:.80}; give an address of this machine with --host") from error
    family, *_, place = min(found)  # IPv4 before IPv6
    for each in [number] if number else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind((place[0], each, *place[2:]))
            return (place[0] if family == socket.AF_INET else f"[{place[0]}]"), each
        except OSError as error:
            if number or error.errno != errno.EADDRINUSE:
                text = f"port {each} of {host} cannot be used ({error.strerror}); choose another --port or --host"
                raise OSError(text) from error
    raise OSError(f"the ports from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are in use; choose another with --port")


def prepare_environment(address: str, uploads: str) -> None:
    """What Gradio reads when it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("GRADIO_TEMP_DIR", uploads)
    # After each request it makes a table of all past ones, for its page of statistics, which is closed here.
    os.environ["GRADIO_ANALYTICS_MAX_EVENTS"], os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1", str(10**12)
    # It first binds a port of this address, by IPv4, and has no good line for a variable that is wrong.
    os.environ["GRADIO_SERVER_NAME"] = "127.0.0.1" if "[" in address else address
    os.environ.pop("GRADIO_SERVER_PORT", None)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # comes with it, and warns where there is no home
    # It asks its own server whether it is there, which no proxy could tell.
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = ",".join(filter(None, [others, "localhost", address.strip("[]")]))


def examples() -> dict:
    """Pictures by name: what the program draws, the robin first, and two photographs that come with Gradio."""
    from gradio.media import get_image

    from convmixer import load_image
    from demo.drawings import draw_examples

    drawn = draw_examples()
    photographs = {name: load_image(get_image(f"{name}.jpg")) for name in ("cheetah", "lion")}
    return {"bird": drawn.pop("bird")} | drawn | photographs


def share(page) -> None:
    """A public address through Gradio's servers, whose program it fetches at first; without one the demo goes on."""
    from gradio.networking import setup_tunnel

    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            address = setup_tunnel(page.server_name, page.server_port, page.share_token, None, None)
    except Exception as error:  # whatever it was, there is the page on this machine
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"{PROGRAM}: no public address could be had ({reason}); the demo goes on without", file=sys.stderr)
    else:
        print(f"For other people it is at {address} for up to a week", flush=True)


def end(uploads: str) -> NoReturn:
    """At once, whatever the threads are doing."""
    if "gradio.tunneling" in sys.modules:
        for tunnel in sys.modules["gradio.tunneling"].CURRENT_TUNNELS:
            if tunnel.proc:
                tunnel.proc.terminate()
    shutil.rmtree(uploads, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # so that `demo` and `convmixer` are found
    sys.exit(main())
