"""A small server on this machine with the hub's face: commits, ETags, redirects, ranges; and what goes wrong there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one folder as one repository; weights by way of a redirect, as the hub does."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.whole: list[str] = []  # files that were fetched whole
        self.parts: list[str] = []  # files of which parts were read
        self.ranges: list[tuple[int, int]] = []  # of weights, from the first byte to the one after the last
        self.lock = threading.Lock()
        self.ignores_ranges = False
        self.cuts = 0  # so many answers to come end in the middle
        self.cuts_after = 1 << 60  # bytes of weights; after these all answers end in the middle
        self.refuses = 0  # so many answers to come are 503
        self.gone = False  # the commit
        self.private: str | None = None  # the token without which there is no such repository
        self.sent = 0  # bytes of weights
        self.posted: list[tuple[str, str | None]] = []  # paths, with the token

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """`resolve` with ETags, commits and ranges; all else is not found."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def do_POST(self) -> None:
        """Repositories are made, and files of commits put into the folder."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((self.path, self.headers.get("Authorization")))
        repository = f"{self.server.endpoint}/{REPOSITORY}"
        if self.server.refuses > 0:
            self._send(403, b'{"error": "not yours"}', {}, send=True)
            return
        answer: dict[str, Any] = {"url": repository, "name": REPOSITORY}
        if self.path.endswith("/preupload/main"):
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in files]
            answer = {"files": modes}
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = self.server.folder / line["value"]["path"]
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            answer = {"commitUrl": f"{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        elif self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, send=True)

    def log_message(self, *_arguments: object) -> None:
        """Tests do not want the log."""

    def _answer(self, *, send: bool) -> None:
        if self.path.startswith(f"/api/models/{REPOSITORY}"):
            files = [{"rfilename": path.name} for path in sorted(self.server.folder.iterdir())]
            answer = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": files}).encode()
            self._send(200, answer, {"Content-Type": "application/json"}, send)
            return
        match = re.fullmatch(rf"/{REPOSITORY}/resolve/(?:main|{COMMIT})/([\w.-]+)", self.path)
        stored = re.fullmatch(r"/stored/([\w.-]+)\?signed=yes", self.path)
        name = (match or stored or [None, None])[1]
        if (
            match
            and self.server.private
            and self.headers.get("Authorization") != f"Bearer {self.server.private}"
        ):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"}, send)
            return
        path = self.server.folder / name if name else None
        if path is None or not path.is_file() or self.server.gone:
            code = "EntryNotFound" if match else "RepoNotFound"
            self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, send)
            return
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        if match and path.suffix in (".safetensors", ".gguf"):
            there = f"{self.server.endpoint}/stored/{path.name}?signed=yes"
            linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content)), "Location": there}
            self._send(302, b"", headers | linked, send)
            return
        self._content(path, content, headers, send)

    def _content(self, path: Path, content: bytes, headers: dict[str, str], send: bool) -> None:
        hub = self.server
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        with hub.lock:
            if hub.refuses > 0:
                hub.refuses -= 1
                self._send(503, b"", {}, send)
                return
        if wanted is None or hub.ignores_ranges:
            if send:
                hub.whole.append(path.name)
            self._send(200, content, headers, send)
            return
        begin, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1) + 1, len(content))
        if begin >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"}, send)
            return
        with hub.lock:
            hub.parts.append(path.name)
            hub.ranges.append((begin, end))
            hub.sent += end - begin
            cut = hub.cuts > 0 or hub.sent > hub.cuts_after
            hub.cuts -= 1
        more = {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}
        self._send(206, content[begin:end], headers | more, send, cut=cut)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], send: bool, *, cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
