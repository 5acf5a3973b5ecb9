"""A hub on loopback: what huggingface_hub asks for as it fetches a model, with ranges, counts and faults."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves the files of `folder` as the model `model`; after `budget` bytes of files the line is dead.

    `etag` is what every file's is, where it is not its own. `requests` are all there were, `fetched` the files sent.
    """

    folder: Path
    model: str = "org/tiny"
    budget: int | None = None
    etag: str | None = None
    requests: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    url: str = ""


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    hub = FakeHub(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        if path := self._file():
            self._headers(200, path, 0, path.stat().st_size)

    def do_GET(self) -> None:
        if (path := self._file()) is None:
            return
        data = path.read_bytes()
        start, stop = self._range(len(data))
        self._headers(206 if "Range" in self.headers else 200, path, start, stop)
        if start or "Range" not in self.headers:  # else a header is looked at
            self.hub.fetched.append(path.name)
        body = data[start:stop]
        if self.hub.budget is not None:
            body = body[: self.hub.budget]
            self.hub.budget -= len(body)
            self.close_connection = True
        self.hub.bytes_sent += len(body)
        self.wfile.write(body)

    def _file(self) -> Path | None:
        """`/org/name/resolve/REVISION/file`, or an answer as the hub gives it."""
        self.hub.requests.append(self.path)
        parts = self.path.split("/")
        if "/".join(parts[1:3]) == "org/gated":
            self._refuse("GatedRepo", 403)
        elif "/".join(parts[1:3]) != self.hub.model:
            self._refuse("RepoNotFound")
        elif parts[4] not in ("main", COMMIT):
            self._refuse("RevisionNotFound")
        elif not (self.hub.folder / parts[5]).is_file():
            self._refuse("EntryNotFound")
        else:
            return self.hub.folder / parts[5]
        return None

    def _refuse(self, code: str, status: int = 404) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _range(self, size: int) -> tuple[int, int]:
        if "Range" not in self.headers:
            return 0, size
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        return int(first), min(size, int(last) + 1) if last else size

    def _headers(self, status: int, path: Path, start: int, stop: int) -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", self.hub.etag or f'"{hashlib.sha1(path.read_bytes()).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{path.stat().st_size}")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""
