"""The demo: a page in the browser on the machine's own models, and the same answers as an API.

    python demo/app.py [--model NAME|FILE ...] [--host 0.0.0.0] [--port 7860] [--share] [--mcp]

Uploads are deleted after an hour, no other host is asked anything (but for the weights of a model that a visitor asks
for, and with --share), and no file of the server is opened, whatever a request says: see demo/guard.py.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, so that `demo` and `convmixer` are found

PROGRAM = "demo/app.py"
QUEUE = 100  # requests that may wait; further ones are told to come back


def parse(argv: list[str] | None) -> argparse.Namespace:
    from convmixer.__main__ import Parser

    parser = Parser(prog=PROGRAM, description="Serve the demo page and its API.")
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="NAME|FILE", help="models to offer, the default one first; or auto")
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    add("--host", default=host, help="default: 127.0.0.1; 0.0.0.0 also serves other machines")
    free = "default: the first free one from 7860"
    add("--port", type=port, default=os.environ.get("GRADIO_SERVER_PORT"), help=free)
    add("--share", action="store_true", help="also under a public address, through Gradio's servers")
    add("--mcp", action="store_true", help="the API as tools for language models, too; needs gradio[mcp]")
    return parser.parse_args(argv)


def port(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 1 to 65535")
    return value


def examples() -> dict:
    """Pictures by name: what the program draws, the robin first, and two photographs that come with Gradio."""
    from gradio.media import get_image

    from convmixer import load_image
    from demo.drawings import draw_examples

    drawn = draw_examples()
    photographs = {name: load_image(get_image(f"{name}.jpg")) for name in ("cheetah", "lion")}
    return {"bird": drawn.pop("bird")} | drawn | photographs


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from demo.guard import launch_options, start_deleting
        from demo.models import Models
        from demo.page import LOOKS, build

        page = build(Models(arguments.model), examples())
        page.queue(max_size=QUEUE)
        start_deleting(page)
        chosen = {"share": arguments.share, "mcp_server": arguments.mcp}
        page.launch(**launch_options() | LOOKS | chosen, server_name=arguments.host, server_port=arguments.port)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
