"""A web server on the loopback interface that serves a folder of shards, with faults, and as the Hugging Face hub."""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

STALL_SECONDS = 0.5


@dataclass
class Behaviour:
    """faults: the chance that a request meets one of `kinds`. ranges: whether byte ranges are honoured.

    `requests` lists (path, Range header, Authorization header) of all that were answered or broken.
    """

    folder: Path
    faults: float = 0.0
    kinds: tuple[str, ...] = ("500", "503", "reset", "truncate", "reset later")
    ranges: bool = True
    etags: bool = True
    commit: str | None = None  # the folder holds the data sets OWNER/NAME of a hub, at this commit
    random: random.Random = field(default_factory=lambda: random.Random(0))
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    refuse: int | None = None  # a status for every file


@contextmanager
def shard_server(folder: Path, **options: object) -> Iterator[tuple[str, Behaviour]]:
    """Serves `folder`; gives the base URL and the behaviour, which may be changed while it runs."""
    behaviour = Behaviour(folder, **options)  # type: ignore[arg-type]

    class Handler(_Handler):
        served = behaviour

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Behaviour

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        served, path = self.served, self.path.split("?")[0]
        served.requests.append((path, self.headers.get("Range"), self.headers.get("Authorization")))
        fault = served.random.choice(served.kinds) if served.random.random() < served.faults else None
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault == "reset":
            self._reset()
        elif served.commit is not None and path.startswith(("/api/", "/datasets/")):
            self._hub(path, fault)
        elif served.refuse is not None or not (served.folder / path.lstrip("/")).is_file():
            self.send_error(served.refuse or 404)
        else:
            self._file(path, fault)

    def do_POST(self) -> None:
        self.do_GET()

    def _hub(self, path: str, fault: str | None) -> None:
        """What `huggingface_hub` requests of a data set: description, tree, information about paths, files."""
        served = self.served
        found = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+))?(?:/(.+))?)?", path)
        if found is None or not (served.folder / found[1]).is_dir():
            self.send_error(404)
            return
        root, kind, inner = served.folder / found[1], found[2], found[4] or ""
        commit = [("X-Repo-Commit", str(served.commit))]
        if kind == "resolve":
            if (root / inner).is_file():
                self._file(f"{found[1]}/{inner}", fault, commit)
            else:
                self._body(404, b"", [*commit, ("X-Error-Code", "EntryNotFound")], None)
            return
        answer: Any
        if kind == "tree":
            answer = [self._entry(root, path) for path in sorted((root / inner).rglob("*"))]
        elif kind == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            answer = [self._entry(root, root / path) for path in asked if (root / path).exists()]
        else:
            siblings = [{"rfilename": path.relative_to(root).as_posix()} for path in sorted(root.rglob("*.*"))]
            answer = {"id": found[1], "sha": served.commit, "siblings": siblings, "tags": [], "private": False}
            answer |= {"downloads": 0, "likes": 0}
        self._body(200, json.dumps(answer).encode(), [("Content-Type", "application/json")], None)

    def _entry(self, root: Path, path: Path) -> dict[str, Any]:
        kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
        return {"type": kind, "path": path.relative_to(root).as_posix(), "size": size, "oid": "0"}

    def _file(self, path: str, fault: str | None, more: list[tuple[str, str]] | None = None) -> None:
        content = (self.served.folder / path.lstrip("/")).read_bytes()
        headers = [*(more or [])]
        if self.served.etags:
            headers.append(("ETag", f'"{hash(content):x}"'))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.served.ranges:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers.append(("Content-Range", f"bytes {first}-{last}/{len(content)}"))
            self._body(206, content[first : last + 1], headers, fault)
        else:
            self._body(200, content, headers, fault)

    def _body(self, status: int, body: bytes, headers: list[tuple[str, str]], fault: str | None) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.served.random.randrange(len(body) + 1) if fault else len(body)
        self.wfile.write(body[:cut])
        if fault == "stall":
            self.wfile.flush()
            time.sleep(STALL_SECONDS)
        self.close_connection = True
        if fault == "reset later":
            self._reset()

    def _reset(self) -> None:
        """Closes with RST instead of FIN."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
