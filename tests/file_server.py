"""A web server on this machine that misbehaves on request."""

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Resource:
    """One file, and how the server gives it."""

    body: bytes = b""
    takes_ranges: bool = True
    cuts: list[int] = field(default_factory=list)  # the next answers end after so many bytes
    statuses: list[int] = field(default_factory=list)  # the next answers are these errors
    redirect: str | None = None
    pause: threading.Event | None = None  # the second half of the body waits for it
    headers: dict[str, str] = field(default_factory=dict)  # of every answer, beside its own


class FileServer:
    """Serves ``resources``, by path, while used as a context.

    ``requests`` has (path, Range header or None) of each GET, and ``heads`` the path of each HEAD.
    """

    def __init__(self):
        self.resources: dict[str, Resource] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.heads: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.files = self

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{path}"

    def refusal(self, path: str, headers) -> tuple[int, dict[str, str]] | None:
        """Status and headers of the answer to a request that gets no file."""
        return None if path in self.resources else (404, {})

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for resource in self.resources.values():
            if resource.pause:
                resource.pause.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.server.files.heads.append(self.path)
        self._answer()

    def do_GET(self):
        self.server.files.requests.append((self.path, self.headers.get("Range")))
        self._answer()

    def _answer(self):
        files = self.server.files
        if refusal := files.refusal(self.path, self.headers):
            return self._start(*refusal)
        resource = files.resources[self.path]
        if resource.statuses:
            return self.send_error(resource.statuses.pop(0))
        if resource.redirect:
            return self._start(302, {"Location": resource.redirect})
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first, length = int(wanted[1]) if wanted and resource.takes_ranges else 0, len(resource.body)
        if first and first >= length:
            return self.send_error(416)
        place = {"Content-Range": f"bytes {first}-{length - 1}/{length}"} if first else {}
        self._start(206 if first else 200, {"Content-Length": str(length - first)} | place | resource.headers)
        if self.command == "HEAD":
            return None
        body = resource.body[first:]
        body = body[: resource.cuts.pop(0)] if resource.cuts else body
        half = len(body) // 2 if resource.pause else len(body)
        self.wfile.write(body[:half])
        if resource.pause:
            resource.pause.wait(timeout=30)
            self.wfile.write(body[half:])
        return None

    def _start(self, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # the client was killed, which is what some tests do
            self.close_connection = True

    def log_message(self, *_):
        pass
