"""Fuzzing of Cog's own server with predict.py in it: whatever is sent, it stays up, and says nothing about itself."""

import contextlib
import json
import re
import socket
import sys
import tempfile
import time
from pathlib import Path

from fuzz.child import ROOT, Result
from fuzz.processes import family, memory
from fuzz.requests import GONE, WEB, make

if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))  # the server is started as the tests start it

from cog_server import GOOD, PICTURE, Server
from file_server import FileServer, Resource

PATIENCE = 60.0  # seconds
CHECK_EVERY = 20  # cases between two looks at the answer to the good picture
MAX_ERROR = 1000
STATUSES = {
    100,
    *range(200, 207),
    307,
    308,
    400,
    404,
    405,
    406,
    408,
    409,
    411,
    413,
    414,
    415,
    417,
    422,
    426,
    431,
    501,
    505,
}


class Runner:
    """Cog's server and the cases that are sent to it. A server that broke a promise is replaced by a new one."""

    def __init__(self, seed: int):
        self.seed, self.web, self.server = seed, _web(), None
        self.sent = b""
        self.since = 0

    def run(self, number: int, file: Path | None = None) -> Result:
        """One case: number ``number``, or the request in ``file``."""
        self.sent = make(self.seed, number) if file is None else file.read_bytes()
        if self.server is None:
            self.start()
        start = time.monotonic()
        outcome, failure = "broken", ""
        try:
            outcome = self.send(json.loads(self.sent))
            self._check_health(always=file is not None or number == 0)
        except (AssertionError, OSError, ValueError) as error:
            failure = str(error) or repr(error)
            self._stop()
        return Result(outcome, failure, time.monotonic() - start)

    def content(self) -> bytes:
        return self.sent

    def memory(self) -> int:
        return sum(map(memory, family(self.server.process.pid))) if self.server else 0

    def close(self) -> None:
        if self.server:
            with contextlib.suppress(AssertionError):
                self._check_health(always=True)
        self._stop()
        self.web.__exit__()

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="convmixer-fuzz-")
        self.server = Server(Path(self.folder.name))
        self.first = self.server.output(image=GOOD)
        self.server.expect(self.first, PICTURE)
        self.since = 0

    def _stop(self) -> None:
        if self.server:
            self.server.kill()
            self.folder.cleanup()
            self.server = None

    def send(self, request: dict) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            answer = self._exchange(request)
            status = self._check_answer(answer, request)
            if status != "409" or not request["answered"]:  # another one is under way, or has left only now
                return status
            time.sleep(0.02)
        raise AssertionError("busy for ever, with no other request under way")

    def _exchange(self, request: dict) -> bytes:
        """The bytes that come back, up to the end of the first answer or of the connection."""
        answer = b""
        web = self.web.url("")
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=PATIENCE) as client:
            # A server may close while the rest of a request that it refuses is still being sent.
            with contextlib.suppress(ConnectionError):
                for i, part in enumerate(request["parts"]):
                    time.sleep(request["pause"] if i else 0)
                    client.sendall(
                        _in_one_piece(part.replace(WEB, web), len(web) - len(WEB)).encode("latin-1", "replace")
                    )
                if request["end"] == "half":
                    with contextlib.suppress(OSError):  # the server was first
                        client.shutdown(socket.SHUT_WR)
            if request["end"] == "leave":
                return b""
            with contextlib.suppress(ConnectionError):
                while not _is_whole(answer) and (more := client.recv(2**16)):
                    answer += more
        return answer

    def _check_answer(self, answer: bytes, request: dict) -> str:
        if not answer:
            assert not request["answered"], "no answer to a whole request"
            return "no answer"
        outcomes = []
        while answer:  # what followed a request may count as another one
            match = re.match(rb"HTTP/1\.[01] (\d{3})[^\r\n]*\r\n", answer)
            assert match, f"this is no HTTP: {answer[:100]!r}"
            head, _, rest = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            end = int(length[1]) if length and match[1] != b"100" else 0 if match[1] == b"100" else len(rest)
            outcomes.append(self._check_one(int(match[1]), head, rest[:end], sum(map(len, request["parts"]))))
            answer = rest[end:]
        return outcomes[-1]

    def _check_one(self, status: int, head: bytes, body: bytes, sent: int) -> str:
        assert status in STATUSES, f"status {status}: {body[:300]!r}"
        text = re.sub(r"base64,[\w+/=]+", "", body.decode())
        for secret in (str(ROOT), self.folder.name, "site-packages", "Traceback", 'File "', "/usr/", "/root"):
            assert secret not in text, f"the answer speaks of {secret}: {text[:300]}"
        if b"application/json" not in head.lower() or not body:
            return str(status)
        content = json.loads(body)
        error = content.get("error") or "" if isinstance(content, dict) else ""
        # Cog's own messages repeat the address that could not be fetched.
        assert len(error) < MAX_ERROR + sent, f"the error has {len(error)} characters: {error[:300]!r}"
        assert error.isprintable(), f"the error is not one line: {error[:300]!r}"
        is_prediction = isinstance(content, dict) and "status" in content and "id" in content
        return f"{status} {content['status']}" if is_prediction else str(status)

    def _check_health(self, always: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        while (status := self.server.status()) != "READY":
            assert self.server.process.poll() is None, f"the server has ended: {self._last_words()}"
            assert time.monotonic() < deadline, f"the server is not ready again: {status}; {self._last_words()}"
            time.sleep(0.01)
        assert "ended by itself" not in self._last_words(), f"the server had to be started again: {self._last_words()}"
        self.since += 1
        if always or self.since % CHECK_EVERY == 0:
            assert self.server.output(image=GOOD) == self.first, "the good picture gets another answer"

    def _last_words(self) -> str:
        lines = [line for line in self.server.log.read_text(errors="replace").splitlines() if "ended by itself" in line]
        return " ".join(lines)[-300:]


def _in_one_piece(text: str, difference: int) -> str:
    """The request with the Content-Length that it has, now that the web server's address stands in it."""
    if not difference or "web.invalid" in text or "\r\n\r\n" not in text or "http://127.0.0.1" not in text:
        return text
    head, _, body = text.partition("\r\n\r\n")
    return re.sub(r"(?m)^Content-Length: \d+$", f"Content-Length: {len(body)}", head) + "\r\n\r\n" + body


def _is_whole(answer: bytes) -> bool:
    """Whether there is an answer with as much body as it says."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    if length:
        return len(body) >= int(length[1])
    return b"transfer-encoding: chunked" in head.lower() and body.endswith(b"0\r\n\r\n")


def _web() -> FileServer:
    """A web server with a picture, and with answers that lead astray."""
    web = FileServer().__enter__()
    web.resources |= {
        "/picture.png": Resource(PICTURE),
        "/to-picture": Resource(redirect=web.url("/picture.png")),
        "/to-file": Resource(redirect="file:///etc/passwd"),
        "/to-gopher": Resource(redirect=f"gopher{GONE[4:]}/"),
        "/loop": Resource(redirect=web.url("/loop")),
        "/empty": Resource(),
        "/cut": Resource(PICTURE, cuts=[100] * 10**5),
        "/500": Resource(statuses=[500] * 10**5),
        "/noise": Resource(bytes(range(256)) * 40),
    }
    return web
