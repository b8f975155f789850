"""A web server on the loopback interface that serves a folder of shards and misbehaves as told."""

from __future__ import annotations

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
    redirect_to: str | None = None
    random: random.Random = field(default_factory=lambda: random.Random(0))
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)  # fixed JSON answers by path
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
        elif path in served.answers:
            self._body(200, served.answers[path], [("Content-Type", "application/json")], None)
        elif served.redirect_to is not None:
            self.send_response(302)
            self.send_header("Location", served.redirect_to + path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif served.refuse is not None or not (served.folder / path.lstrip("/")).is_file():
            self.send_error(served.refuse or 404)
        else:
            self._file(path, fault)

    def _file(self, path: str, fault: str | None) -> None:
        content = (self.served.folder / path.lstrip("/")).read_bytes()
        headers = []
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
