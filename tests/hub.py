"""A server on loopback that speaks the hub's protocol for one repository, with faults on demand."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from time import sleep
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY, COMMIT = "someone/gpt2-tiny", "0123456789abcdef0123456789abcdef01234567"
# Files that the hub keeps with Git LFS: named by SHA-256, and served by another host.
LARGE = (".parquet", ".safetensors")
PAGE = 3


@dataclass
class Fault:
    """What happens once, to the first request like `pattern` (method and path): a status, or a body that is wrong.

    cut: bytes after which the connection ends; reset: likewise, by a reset; short: bytes that are missing in header and
    body alike; slow: seconds for each piece of a KiB.
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: int | None = None
    short: int = 0
    slow: float = 0


class Hub:
    """A repository: folders by commit, the commit of main, the requests so far, and faults still to come.

    The API names datasets api/datasets/…, their files datasets/…; models have no such prefix there.
    """

    def __init__(self, folder: Path, repository: str, kind: str):
        self.repository, self.kind = repository, kind
        self.commits, self.main = {COMMIT: folder}, COMMIT
        self.asked: list[str] = []
        # The Authorization of each request for the content of a file.
        self.tokens: list[str | None] = []
        self.faults: list[Fault] = []
        self.address = ""
        self._lock = Lock()

    def count(self, pattern: str) -> int:
        """How many requests were like `pattern`."""
        return sum(fnmatchcase(request, pattern) for request in self.asked)

    def next_fault(self, request: str) -> Fault:
        with self._lock:
            self.asked.append(request)
            for fault in self.faults:
                if fnmatchcase(request, fault.pattern):
                    self.faults.remove(fault)
                    return fault
        return Fault("")


def _hash(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return sha256(content).hexdigest()
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.fault = self.hub.next_fault(f"{self.command} {path}")
        if self.fault.status:
            return self._send(self.fault.status, b"", self.fault.headers)
        if path.startswith("cdn/"):
            return self._send_content(Path("/", path.removeprefix("cdn/")))
        path = path.removeprefix(f"api/{self.hub.kind}s/").removeprefix("datasets/")
        match = re.fullmatch(r"(.+?)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        repository, what, revision, name = match.groups() if match else (path, "revision", "main", "")
        commit = self.hub.main if revision == "main" else revision
        if repository != self.hub.repository:
            return self._refuse("RepoNotFound")
        if commit not in self.hub.commits:
            return self._refuse("RevisionNotFound")
        if what == "revision":
            return self._send_json({"id": repository, "sha": commit, "tags": [], "siblings": []})
        if what == "tree":
            return self._send_page(self.hub.commits[commit], path, int(parse_qs(url.query).get("cursor", ["0"])[0]))
        return self._resolve(self.hub.commits[commit], name, {"X-Repo-Commit": commit})

    def _send_page(self, folder: Path, path: str, number: int) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        link = f'<{self.hub.address}/api/{self.hub.kind}s/{path}?cursor={number + PAGE}>; rel="next"'
        more = {"Link": link} if number + PAGE < len(files) else {}
        self._send_json([self._entry(file, folder) for file in files[number : number + PAGE]], more)

    def _entry(self, file: Path, folder: Path) -> dict:
        content, name = file.read_bytes(), file.relative_to(folder).as_posix()
        entry = {"type": "file", "path": name, "size": len(content), "oid": _hash(name, content)[:40]}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": _hash(name, content), "size": len(content), "pointerSize": 134}
        return entry

    def _resolve(self, folder: Path, name: str, commit: dict[str, str]) -> None:
        if not (folder / name).is_file():
            return self._refuse("EntryNotFound", commit)
        content = (folder / name).read_bytes()
        if self.hub.kind == "dataset" and name.endswith(LARGE):
            linked = {"X-Linked-Etag": f'"{_hash(name, content)}"', "X-Linked-Size": str(len(content))}
            # Another host, to which no token may go.
            port = urlsplit(self.hub.address).port
            return self._send(302, b"", {**commit, **linked, "Location": f"http://localhost:{port}/cdn{folder / name}"})
        return self._send_content(folder / name, commit | {"ETag": f'"{_hash(name, content)}"'})

    def _send_content(self, path: Path, headers: dict | None = None) -> None:
        content = path.read_bytes()
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.command == "GET":
            self.hub.tokens.append(self.headers.get("Authorization"))
        span = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if "Range" in self.headers else {}
        self._send(206 if span else 200, content[begin : len(content) - self.fault.short], {**(headers or {}), **span})

    def _refuse(self, code: str, headers: dict | None = None) -> None:
        self._send(404, b"", {"X-Error-Code": code, **(headers or {})})

    def _send_json(self, value: object, headers: dict | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = next((at for at in (self.fault.cut, self.fault.reset) if at is not None), len(content))
        step = 1024 if self.fault.slow else end + 1
        for start in range(0, end, step):
            self.wfile.write(content[start : min(end, start + step)])
            sleep(self.fault.slow)
        if self.fault.reset is not None:
            self.wfile.flush()
            sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *_) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_) -> None:
        """A client that was killed is no fault of the server."""


@contextmanager
def serve(folder: Path, repository: str = REPOSITORY, kind: str = "model") -> Iterator[Hub]:
    """Serve the files of `folder` as the only commit of a repository."""
    hub = Hub(folder, repository, kind)
    with _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()
