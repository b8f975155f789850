"""What precedes the application: the API key, or the host of the request; media type and size; the count of responses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatronish.errors import UserError
from megatronish.inference.server.metrics import ServerMetrics

KEY_VARIABLE = "MEGATRONISH_API_KEY"
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}
PUBLIC = {
    "/",
    "/health",
}  # without a key: nothing secret is there, and the page must load before it can ask for the key
# How much of the body of a rejected request is read, and for how long, before the connection is closed.
REJECTED_BYTES, REJECTED_SECONDS = 1 << 26, 5.0
PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}


def read_api_key(host: str, path: Path | None) -> str | None:
    """The API key of the file `path`, or of the environment. Raises UserError if `host` needs a key and there is none."""
    key = os.environ.get(KEY_VARIABLE)
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"--api-key-file {path}: cannot be read ({error.strerror})") from None
        if not key:
            raise UserError(f"--api-key-file {path}: is empty")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not key and not loopback:
        raise UserError(
            f"--host {host}: whoever reaches this address could use the model. Set an API key in {KEY_VARIABLE} or "
            "--api-key-file, or listen on 127.0.0.1"
        )
    return key or None


def error_response(
    status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(content, status, headers=headers)


class AdmissionMiddleware:
    """ASGI middleware that rejects requests before they are parsed, and counts all responses."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_bytes: int, metrics: ServerMetrics) -> None:
        self._app, self._api_key, self._body_bytes, self._metrics = app, api_key, body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            rejection, inner_receive = self._rejection(scope), receive
            if scope["method"] == "POST":
                # The body of a rejected request is read as well: otherwise the client may never read the response.
                try:
                    async with asyncio.timeout(None if rejection is None else REJECTED_SECONDS):
                        body = await self._body(receive)
                except TimeoutError:
                    body = None
                rejection = rejection or (self._too_large() if body is None else None)
                inner_receive = _replay(body or b"", receive)
            await (rejection or self._app)(scope, inner_receive, count)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requests.labels(path, str(status)).inc()

    async def _body(self, receive: Receive) -> bytes | None:
        """The body of a request, or None if it is too large; the rest of it is read and dropped up to REJECTED_BYTES."""
        body, read = bytearray(), 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            read += len(part)
            if read <= self._body_bytes:
                body += part
            if read > REJECTED_BYTES or not message.get("more_body", False):
                return bytes(body) if read <= self._body_bytes else None

    def _rejection(self, scope: Scope) -> JSONResponse | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._api_key is None:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if name.lower() not in LOOPBACK:
                return error_response(403, f"without an API key only this machine is served, not the host {host!r}")
        elif scope["path"] not in PUBLIC:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self._api_key.encode()):
                return error_response(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            return self._too_large()
        # A form on another web site cannot send this media type without a preflight request.
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return error_response(415, "send JSON, with `Content-Type: application/json`")
        return None

    def _too_large(self) -> JSONResponse:
        message = f"the request is larger than {self._body_bytes:,} bytes"
        return error_response(413, message, headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
