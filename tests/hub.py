"""A server on loopback that speaks the hub's protocol for one public model repository with one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

REPOSITORY, COMMIT = "someone/gpt2-tiny", "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of `folder` as REPOSITORY; yield the address and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            content = self._answer()
            self.wfile.write(content)

        def _answer(self) -> bytes:
            asked.append(f"{self.command} {self.path}")
            repository, _, rest = self.path.strip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            fault = (
                "RepoNotFound" if repository != REPOSITORY
                else "RevisionNotFound" if revision not in ("main", COMMIT)
                else "" if (folder / name).is_file()
                else "EntryNotFound"
            )  # fmt: skip
            content = b"" if fault else (folder / name).read_bytes()
            self.send_response(404 if fault else 200)
            self.send_header("Content-Length", str(len(content)))
            if fault:
                self.send_header("X-Error-Code", fault)
            if fault in ("", "EntryNotFound"):
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.end_headers()
            return content

        def log_message(self, *_) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
