"""docs/client.py against the real server, and against what a server in trouble does."""

import os
import socket
import subprocess
import sys
import threading

import pytest
from cog_server import PATIENCE, PICTURE, ROOT, expect

from docs.client import ServerError, classify

STRAY = b'{"status": "failed", "error": "Prediction failed: CancelationException: "}'
DONE = b'{"status": "succeeded", "output": {"model": "at last"}}'
SAYS = [
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}",
    b"",  # it hangs up
    *(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text) for text in (STRAY, DONE)),
]


@pytest.mark.parametrize(
    ("picture", "top_k", "line"),
    [
        (b"no picture", 5, r"^the picture cannot be read as a picture; supported formats are .*TGA$"),
        (PICTURE, 101, r"^the server refuses the request: 422 .*maximum of 100"),
        (bytes(80 * 2**20), 5, r"^the server refuses the request: 413 "),  # it closes before it has read it all
    ],
    ids=["no picture", "wrong input", "too large"],
)
def test_a_request_that_is_refused_is_told_in_the_servers_line(cog, picture, top_k, line):
    with pytest.raises(ServerError, match=line):
        classify(picture, f"http://127.0.0.1:{cog.port}", within=PATIENCE, top_k=top_k)


def test_a_busy_server_is_asked_again(cog, web):
    with cog.under_way(web, 6):
        cog.wait_for("BUSY")
        with pytest.raises(
            ServerError, match=r"no answer from \S+ within 0.2 seconds, at last: (409 .*apacity|timed out)"
        ):
            classify(PICTURE, f"HTTP://127.0.0.1:{cog.port}", within=0.2)
        threading.Timer(0.1, web.resources["/held.png"].pause.set).start()
        expect(classify(PICTURE, f"127.0.0.1:{cog.port}/", within=PATIENCE), cog.classifier, PICTURE)


def test_a_server_that_is_still_starting_is_waited_for():
    """The port opens late, answers 503, hangs up, cancels the wrong request, and answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(ServerError, match=r"^no answer from http\S+ within 0.2 seconds, at last: .*refused.*$"):
        classify(PICTURE, f"http://127.0.0.1:{address[1]}", within=0.2)

    def door() -> None:
        with socket.create_server(address) as listener:
            for words in SAYS:
                with listener.accept()[0] as client:
                    client.recv(2**20)
                    client.sendall(words)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(2**20):
                        pass

    threading.Timer(0.1, door).start()
    assert classify(PICTURE, f"http://127.0.0.1:{address[1]}", within=PATIENCE) == {"model": "at last"}


def test_the_command_line(cog, tmp_path):
    (tmp_path / "good.png").write_bytes(PICTURE)
    command = [sys.executable, ROOT / "docs" / "client.py", "good.png", "bad.png", "--server", f"127.0.0.1:{cog.port}"]
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    best = cog.classifier.classify(PICTURE)[0]
    assert (run.returncode, run.stdout) == (1, f"good.png: {best.label}, {best.score:.2%}\n")
    assert run.stderr == "client.py: bad.png: [Errno 2] No such file or directory: 'bad.png'\n"
