"""Schemathesis against Cog's own server, as `python -m serving` starts it: it stays up and says nothing about itself.

    pip install -r requirements/fuzz.txt
    python tests/fuzz/server.py --max-examples 200 --seed 1      # all options of Schemathesis: st run --help

Requests are made from the server's own description, right and wrong ones. Pictures in them come from the seeds of
fuzz/pictures.py, damaged; addresses lead to a web server here, to nothing, or to a proxy that is not there. No request
names a prediction or a webhook: see docs/security.md.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0:1] = map(str, Path(__file__).resolve().parents[1:3])  # `fuzz`, `cog_server`, `convmixer` are found

from cog_server import GOOD, PICTURE, Server
from file_server import FileServer, Resource

CHECKS = "not_a_server_error,says_nothing_about_itself,stays_ready"


def main(options: list[str]) -> int:
    """Schemathesis' exit code, or 1 if the server is another one afterwards."""
    with FileServer() as web, tempfile.TemporaryDirectory(prefix="convmixer-fuzz-") as folder:
        web.resources |= {
            "/picture.png": Resource(PICTURE),
            "/to-picture": Resource(redirect=web.url("/picture.png")),
            "/to-file": Resource(redirect="file:///etc/passwd"),
            "/loop": Resource(redirect=web.url("/loop")),
            "/cut": Resource(PICTURE, cuts=[100] * 10**5),
            "/500": Resource(statuses=[500] * 10**5),
        }
        server = Server(Path(folder), http_proxy="http://127.0.0.1:9")  # no address that is made up is asked
        try:
            first = server.output(image=GOOD)
            url = f"http://127.0.0.1:{server.port}"
            command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json", "--checks", CHECKS]
            command += ["--phases", "coverage,fuzzing", "--generation-database", "none", "--no-color"]
            known = {"FUZZ_SERVER": url, "FUZZ_WEB": web.url(""), "FUZZ_FOLDER": folder, "no_proxy": "127.0.0.1"}
            known |= {"SCHEMATHESIS_HOOKS": "fuzz.hooks", "PYTHONPATH": os.pathsep.join(sys.path[:2])}
            code = subprocess.run([*command, *options], cwd=folder, env=os.environ | known, check=False).returncode
            server.wait_for("READY")
            assert server.output(image=GOOD) == first, "the good picture gets another answer"
            assert "ended by" not in server.log.read_text(), "the server or a decoder had to be started again"
        except AssertionError as error:
            print(f"server.py: {error}")
            code = 1
        finally:
            server.kill()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
