"""What every request passes first: who asks, how much is sent, and the count of answers."""

from __future__ import annotations

import asyncio
import hmac

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatronish.inference.server.metrics import Metrics

LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}
OPEN = {"/", "/health"}  # no secret is there, and a page must load before it can ask for the key
REFUSED_BYTES, REFUSED_SECONDS = (
    1 << 26,
    5.0,
)  # of a refused request are read; then the connection is closed on its sender
KNOWN = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}


def error_body(
    status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(content, status, headers=headers)


class Guard:
    """ASGI middleware: the key or the host, the media type, the size of the body, metrics."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, body_bytes: int, metrics: Metrics) -> None:
        self._app, self._api_key, self._body_bytes, self._metrics = app, api_key, body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal, replayed = self._refusal(scope), receive
            if scope["method"] == "POST":
                # A refused body is read, too: a client that writes to a closed connection may never see the answer.
                try:
                    async with asyncio.timeout(None if refusal is None else REFUSED_SECONDS):
                        body = await self._body(receive)
                except TimeoutError:
                    body = None
                refusal = refusal or (self._too_large() if body is None else None)
                replayed = _replay(body or b"", receive)
            await (refusal or self._app)(scope, replayed, counting)
        finally:
            path = scope["path"] if scope["path"] in KNOWN else "other"
            self._metrics.requests.labels(path, str(status)).inc()

    async def _body(self, receive: Receive) -> bytes | None:
        """What is sent, or None where it is too much, which is read and dropped up to a limit of its own."""
        body, read = bytearray(), 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            read += len(part)
            if read <= self._body_bytes:
                body += part
            if read > REFUSED_BYTES or not message.get("more_body", False):
                return bytes(body) if read <= self._body_bytes else None

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self._api_key is None:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if name.lower() not in LOOPBACK:
                return error_body(403, f"without an API key only this machine is served, not the host {host!r}")
        elif scope["path"] not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not hmac.compare_digest(given, self._api_key.encode()):
                return error_body(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body_bytes:
            return self._too_large()
        # A form of another web site cannot send this type without asking first.
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return error_body(415, "send JSON, with `Content-Type: application/json`")
        return None

    def _too_large(self) -> JSONResponse:
        return error_body(
            413, f"the request is larger than {self._body_bytes:,} bytes", headers={"Connection": "close"}
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and then what comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
