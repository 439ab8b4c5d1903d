"""docs/client.py against the real server, and against what a server in trouble does."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from cog_server import PATIENCE, PICTURE, ROOT, Server, encoded, noise
from file_server import FileServer, Resource

from docs.client import ServerError, classify

CLIENTS, PICTURES = 4, 12
# As the README shows it: another process, with nothing of this project but the client.
CODE = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from docs.client import classify
for path in sys.argv[3:]:
    print(json.dumps(classify(pathlib.Path(path).read_bytes(), sys.argv[2], top_k=3)))
"""

STRAY = b'{"status": "failed", "error": "Prediction failed: CancelationException: "}'
SAYS = {
    "503": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}",
    "hang up": b"",
    "cancel": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(STRAY), STRAY),
    "answer": b"",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), "--slots", 1)
    yield server
    server.kill()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def test_several_processes_at_once_get_their_own_answers(server, tmp_path):
    pictures = {}
    for index in range(CLIENTS * PICTURES):
        path = tmp_path / f"{index}.png"
        pictures[path] = encoded(noise(60 + index, 50, seed=index))
        path.write_bytes(pictures[path])
    paths = list(pictures)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, ROOT, url(server), *paths[first::CLIENTS]],
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for first in range(CLIENTS)
    ]
    for first, process in enumerate(processes):
        text, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        answers = [json.loads(line) for line in text.splitlines()]
        for path, answer in zip(paths[first::CLIENTS], answers, strict=True):
            server.expect(answer, pictures[path], 3)


def test_a_busy_server_is_asked_again(server):
    with FileServer() as web:
        release = threading.Event()
        web.resources["/held.png"] = Resource(PICTURE, pause=release)
        holder = threading.Thread(target=server.output, kwargs={"image": web.url("/held.png")})
        holder.start()
        server.wait_for("BUSY")
        with pytest.raises(ServerError, match=r"no answer from http\S+ within 0.2 seconds, at last: 409 .*capacity"):
            classify(PICTURE, url(server), within=0.2)
        timer = threading.Timer(0.1, release.set)
        timer.start()
        server.expect(classify(PICTURE, url(server)), PICTURE)
        holder.join()


def test_a_failed_prediction_is_told_in_the_servers_line(server):
    with pytest.raises(ServerError, match=r"^the picture cannot be read as a picture; supported formats are .*TGA$"):
        classify(b"no picture at all", url(server))


def test_a_file_that_is_too_large_gets_the_servers_line_at_once(server):
    """The server closes before it has read it all."""
    with pytest.raises(ServerError, match=r"^the server refuses the request: 413 "):
        classify(bytes(80 * 2**20), url(server), within=PATIENCE)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "127.0.0.1:{}/", "http://127.0.0.1:{}/", "HTTP://127.0.0.1:{}"])
def test_an_address_may_lack_its_scheme_and_have_a_slash(server, form):
    server.expect(classify(PICTURE, form.format(server.port)), PICTURE)


def test_a_wrong_input_is_not_sent_twice(server):
    with pytest.raises(ServerError, match=r"^the server refuses the request: 422 .*maximum of 100"):
        classify(PICTURE, url(server), top_k=101)


def test_a_server_that_is_still_starting_is_waited_for(server):
    """The port opens late, answers 503, hangs up, cancels the wrong request, and then leads to the real server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen = []

    def door() -> None:
        time.sleep(0.1)
        with socket.create_server(("127.0.0.1", port)) as listener:
            for what in SAYS:
                client, _ = listener.accept()
                seen.append(what)
                if SAYS[what]:
                    client.recv(1 << 20)
                    client.sendall(SAYS[what])
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 20):
                        pass
                elif what == "answer":
                    relay(client, server.port)
                client.close()

    thread = threading.Thread(target=door)
    thread.start()
    server.expect(classify(PICTURE, f"http://127.0.0.1:{port}"), PICTURE)
    thread.join(PATIENCE)
    assert seen == list(SAYS)


def relay(client: socket.socket, port: int) -> None:
    """Pass one request on, and its answer back."""
    with socket.create_connection(("127.0.0.1", port)) as server:

        def back() -> None:
            while content := server.recv(1 << 16):
                client.sendall(content)
            client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=back)
        thread.start()
        while content := client.recv(1 << 16):
            server.sendall(content)
        server.shutdown(socket.SHUT_WR)
        thread.join(PATIENCE)


def test_a_server_that_is_not_there_gets_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=r"^no answer from http\S+ within 0.2 seconds, at last: .*refused.*$"):
        classify(PICTURE, address, within=0.2)


def test_the_command_line(server, tmp_path):
    (tmp_path / "good.png").write_bytes(PICTURE)
    (tmp_path / "bad.png").write_bytes(b"?")
    command = [sys.executable, ROOT / "docs" / "client.py", "good.png", "bad.png", "--server", url(server)]
    environment = os.environ | {"no_proxy": "127.0.0.1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    best = server.classifier.classify(PICTURE)[0]
    assert run.returncode == 1
    assert run.stdout == f"good.png: {best.label}, {best.score:.2%}\n"
    (line,) = run.stderr.splitlines()
    assert line.startswith("client.py: bad.png: the picture cannot be read as a picture; supported formats are")
