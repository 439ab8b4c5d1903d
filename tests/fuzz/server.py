"""Schemathesis against Cog's own server, as `python -m serving` starts it: it stays up and says nothing about itself.

    pip install -r requirements/fuzz.txt
    python tests/fuzz/server.py --max-examples 200 --seed 1      # all options of Schemathesis: st run --help

Requests are made from the server's own description, right and wrong ones, with damaged pictures and with addresses that
lead to a web server here or to nothing. No request names a prediction or a webhook: see docs/security.md.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script; Schemathesis imports it to know what to send and to check
    sys.path[0:1] = map(str, Path(__file__).resolve().parents[1:3])  # `fuzz`, `cog_server`, `convmixer` are found

import schemathesis
from cog_server import GOOD, PICTURE, ROOT, Server, data_uri
from file_server import FileServer, Resource
from hypothesis import strategies as st

from fuzz.pictures import check_message, damaged, seeds
from serving.watcher import status_of

SECRETS = (str(ROOT), "convmixer-fuzz-", "site-packages", "Traceback", 'File "', "/usr/", "/root", "root:x:")
ADDRESSES = (
    *(f"{os.environ.get('FUZZ_WEB')}/{name}" for name in ("picture.png", "nothing", "to-file", "loop", "cut", "500")),
    *("file:///etc/passwd", "/etc/passwd", "ftp://127.0.0.1:9/x", "http://127.0.0.1:9/", "http://", "http://[::1"),
    *("http://127.0.0.1:99999/x", "http://user:secret@127.0.0.1:9/x", "predict.py", "..", "", "data:", "data:;base64,"),
)
PICTURES = damaged(seeds()).map(data_uri)
IMAGES = PICTURES | PICTURES | st.sampled_from(ADDRESSES) | st.text(max_size=20).map("data:;base64,{}".format)

schemathesis.openapi.format("uri", IMAGES)


@schemathesis.hook
def map_body(context, body):
    return {"input": body["input"]} if isinstance(body, dict) and "input" in body else body


@schemathesis.check
def says_nothing_and_stays_ready(context, response, case) -> None:
    text = re.sub(r"base64,[\w+/=]+", "", response.text)  # in a picture's code, anything may turn up
    for secret in SECRETS:
        assert secret not in text, f"the answer speaks of {secret}"
    content = response.json() if text.startswith("{") else None
    if isinstance(content, dict) and content.get("error"):
        check_message(content["error"])
    assert status_of("127.0.0.1", int(os.environ["PORT"])) in ("READY", "BUSY")


def main(options: list[str]) -> int:
    """Schemathesis' exit code. Raises AssertionError if the server is another one afterwards."""
    os.environ["http_proxy"] = "http://127.0.0.1:9"  # no address that is made up is asked
    folder = tempfile.TemporaryDirectory(prefix="convmixer-fuzz-")
    with folder, FileServer() as web, Server(Path(folder.name)) as server:
        web.resources |= {
            "/picture.png": Resource(PICTURE),
            "/to-file": Resource(redirect="file:///etc/passwd"),
            "/loop": Resource(redirect=web.url("/loop")),
            "/cut": Resource(PICTURE, cuts=[100] * 10**5),
            "/500": Resource(statuses=[500] * 10**5),
        }
        first = server.output(image=GOOD)
        command = [str(Path(sys.executable).with_name("st")), "run", f"http://127.0.0.1:{server.port}/openapi.json"]
        command += ["--checks", "not_a_server_error,says_nothing_and_stays_ready"]
        command += ["--phases", "coverage,fuzzing", "--generation-database", "none", "--no-color"]
        known = {"FUZZ_WEB": web.url(""), "PORT": str(server.port), "no_proxy": "127.0.0.1"}
        known |= {"SCHEMATHESIS_HOOKS": "fuzz.server", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
        code = subprocess.run([*command, *options], cwd=folder.name, env=os.environ | known, check=False).returncode
        server.wait_for("READY")
        assert server.output(image=GOOD) == first, "the good picture gets another answer"
        assert "ended by" not in server.log.read_text(), "the server or a decoder had to be started again"
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
