"""A small model hub on loopback: the endpoints that the hub library uses, and the ways in which a hub can fail."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LFS_FROM = 1000  # bytes; larger files are listed as LFS objects, as the hub does


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed in the middle is what some tests are about."""


@dataclass
class LoopbackHub:
    """Serves ``files`` as repository ``name``. Everything it was asked is in ``requests``.

    ``cut_after``: how many bytes of a file's body are sent before the connection is cut, for the next ``cuts``
    answers; with ``stall`` it stays open and silent instead, until ``go_on`` is set. ``status``: answer every request
    with this code. ``listing``: extra raw entries of the listing.
    """

    name: str
    files: dict[str, bytes]
    requests: list[Request] = field(default_factory=list)
    status: int = 0
    error_code: str = ""
    cut_after: int = 0
    cuts: int = 0
    listing: list[dict[str, Any]] = field(default_factory=list)
    commit: str = COMMIT
    corrupt: bool = False
    ignore_range: bool = False
    tree_page: int = 1000
    garbage: bool = False
    stall: bool = False
    resume_status: int = 0  # answers requests with a Range instead of their content
    go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self) -> list[tuple[str, str | None]]:
        """File and Range header of each GET of a file's contents, in order."""
        gets = [request for request in self.requests if request.method == "GET" and "/resolve/" in request.path]
        return [(request.path.rsplit(f"/resolve/{self.commit}/", 1)[-1], request.range) for request in gets]

    def tree(self) -> list[dict[str, Any]]:
        return [_entry(path, data) for path, data in sorted(self.files.items())] + self.listing


def oid(data: bytes) -> str:
    """The name the hub gives to contents: SHA-256 for LFS, the git blob id else."""
    if len(data) >= LFS_FROM:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid(data)}
    if len(data) >= LFS_FROM:
        entry |= {"oid": "1" * 40, "lfs": {"oid": oid(data), "size": len(data), "pointerSize": 130}}
    return entry


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            headers = self.headers
            hub.requests.append(Request(self.command, path, headers["Range"], headers["Authorization"]))
            if hub.status:
                return self.answer(hub.status, b"{}", {"X-Error-Code": hub.error_code} if hub.error_code else {})
            if hub.garbage:
                return self.answer(200, b"<html>Welcome to the hotel", {})
            if path in (f"/api/models/{hub.name}", f"/api/models/{hub.name}/revision/main"):
                return self.json({"id": hub.name, "sha": hub.commit, "siblings": []})
            if path == f"/api/models/{hub.name}/tree/{hub.commit}":
                return self.tree(int(url.query.rpartition("page=")[2]) if "page=" in url.query else 0)
            path = path.replace("/resolve/main/", f"/resolve/{hub.commit}/")
            prefix = f"/{hub.name}/resolve/{hub.commit}/"
            if path.startswith(prefix) and path[len(prefix) :] in hub.files:
                return self.file(hub.files[path[len(prefix) :]])
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound" if "/api/" in path else "EntryNotFound"})

        def json(self, value: object, headers: dict[str, str] | None = None) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

        def tree(self, page: int) -> None:
            entries, start = hub.tree(), page * hub.tree_page
            more = {}
            if start + hub.tree_page < len(entries):
                more["Link"] = f'<{hub.url}{urlsplit(self.path).path}?page={page + 1}>; rel="next"'
            self.json(entries[start : start + hub.tree_page], more)

        def file(self, data: bytes) -> None:
            start = 0
            if self.headers["Range"] and not hub.ignore_range:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = data[start:]
            if hub.corrupt and self.command == "GET":
                body = body[:-1] + bytes([body[-1] ^ 1])
            status = hub.resume_status if start and hub.resume_status else 206 if start else 200
            self.answer(status, body, headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cuts and "/resolve/" in self.path and len(body) > hub.cut_after:
                hub.cuts -= 1
                self.wfile.write(body[: hub.cut_after])
                self.wfile.flush()
                if hub.stall:
                    hub.go_on.wait()
                    self.wfile.write(body[hub.cut_after :])
                    return
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(body)

    return Handler
