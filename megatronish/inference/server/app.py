"""The HTTP application: routes, deadlines, and errors in OpenAI's form."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

import orjson
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.responses import Response as HTTPResponse
from starlette.exceptions import HTTPException

from megatronish.errors import UserError
from megatronish.inference.batch import Request as GenerationRequest
from megatronish.inference.load import Loaded
from megatronish.inference.server.admission import AdmissionMiddleware, error_response
from megatronish.inference.server.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    ChatResponse,
    CommonRequest,
    CompletionRequest,
    CompletionResponse,
    Response,
)
from megatronish.inference.server.scheduler import RequestFailed, ScheduledRequest, Scheduler
from megatronish.inference.text import Prompt, TextDelta, encode_prompt

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
Output = tuple[int, TextDelta | RequestFailed]  # number of the choice, and what it produced


@dataclass(frozen=True)
class Limits:
    """seconds: for a complete request; body_bytes: of its body."""

    seconds: float = 300.0
    body_bytes: int = 1 << 20


class TimedOut(RequestFailed):
    """A request took longer than Limits.seconds."""

    status, kind = 504, "timeout"


def serve(loaded: Loaded, api_key: str | None, options: argparse.Namespace) -> None:
    """Serve a model until the process is stopped; `options` are those of launchers/serve.py. Raises UserError."""
    limits = Limits(options.timeout, options.max_body)
    scheduler = Scheduler(
        loaded,
        slots=options.slots,
        max_context=options.max_context,
        max_waiting=options.max_waiting,
        keep_prefixes=options.keep_prefixes,
        compiled=options.compile,
    )
    name, batch = options.model_name or loaded.info.run_dir.resolve().name, scheduler.batch
    print(
        f"{loaded.info.folder} as {name!r}: {scheduler.slots} slots of {batch.max_length:,} tokens, cache "
        f"{batch.cache_bytes / 1e6:,.0f} MB; http://{options.host}:{options.port}",
        file=sys.stderr,
    )
    app = create_app(scheduler, name, api_key=api_key, limits=limits)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=5)


def create_app(
    scheduler: Scheduler, model_name: str, *, api_key: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The application; it starts the scheduler and closes it. Without api_key it serves only requests whose Host header
    names this machine, so that no web page of another origin can send any (DNS rebinding)."""
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(title="megatronish", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "megatronish"}
    _add_error_handlers(app)
    _add_pages(app, scheduler)
    tokenizing = asyncio.Semaphore(2)  # long texts take seconds of CPU time
    tokenizer, answer = scheduler.tokenizer, partial(_answer, scheduler, limits.seconds)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise HTTPException(404, f"there is no model {name!r}, only {model_name!r}")
        return card

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> HTTPResponse:
        async with tokenizing:
            prompts = [
                await asyncio.to_thread(encode_prompt, tokenizer, each) if isinstance(each, str) else Prompt(each)
                for each in body.prompts
            ]
        response = CompletionResponse(model_name, tokenizer, prompts, body.n or 1, body.logprobs)
        return await answer(request, body, response, body.max_tokens or DEFAULT_COMPLETION_TOKENS, body.stops)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> HTTPResponse:
        async with tokenizing:
            prompt = await asyncio.to_thread(scheduler.format.prompt, [each.message for each in body.messages])
        response = ChatResponse(model_name, tokenizer, [prompt], body.n or 1, body.best)
        tokens = body.max_completion_tokens or body.max_tokens or scheduler.batch.max_length
        return await answer(request, body, response, tokens, (*body.stops, *scheduler.format.stop_texts))

    app.add_middleware(AdmissionMiddleware, api_key=api_key, body_bytes=limits.body_bytes, metrics=scheduler.metrics)
    return app


def _add_pages(app: FastAPI, scheduler: Scheduler) -> None:
    page = files("megatronish.inference.server").joinpath("chat.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = scheduler.alive
        return JSONResponse({"status": "ok" if alive else "the scheduler has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> HTTPResponse:
        return HTTPResponse(scheduler.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_response(400, f"{field}: {first['msg']}" if field else first["msg"], field or None)

    @app.exception_handler(UserError)
    async def rejected(_request: Request, error: UserError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(RequestFailed)
    async def failed(_request: Request, error: RequestFailed) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return error_response(error.status, str(error), headers=headers)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))


async def _answer(
    scheduler: Scheduler,
    seconds: float,
    request: Request,
    body: CommonRequest,
    response: Response,
    max_tokens: int,
    stop: tuple[str, ...],
) -> HTTPResponse:
    """Schedule every choice of every prompt, then stream or collect their output."""
    seed = secrets.randbelow(2**62) if body.seed is None else body.seed % 2**62
    queue: asyncio.Queue[Output] = asyncio.Queue()
    loop, scheduled = asyncio.get_running_loop(), list[ScheduledRequest]()

    def send(number: int, output: TextDelta | RequestFailed) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(queue.put_nowait, (number, output))

    for prompt in response.prompts:
        for choice in range(response.per_prompt):
            generation = GenerationRequest(
                prompt.ids,
                max_tokens,
                body.sampling,
                torch.Generator(scheduler.batch.device).manual_seed(seed + choice),
                prompt.first_ids,
                logprobs=response.logprobs,
                stop_ids=scheduler.format.stop_ids,
            )
            scheduled.append(ScheduledRequest(generation, prompt, stop, partial(send, len(scheduled))))
    scheduler.submit(scheduled)
    outputs = _outputs(scheduler, scheduled, queue, seconds)
    if body.stream:
        return StreamingResponse(_stream(outputs, response, body.include_usage), media_type="text/event-stream")
    collecting = asyncio.ensure_future(_collect(outputs, response))
    disconnecting = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({collecting, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return HTTPResponse(status_code=499)  # the client has disconnected
        return HTTPResponse(orjson.dumps(collecting.result()), media_type="application/json")
    finally:
        for task in (collecting, disconnecting):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await collecting


async def _outputs(
    scheduler: Scheduler, scheduled: list[ScheduledRequest], queue: asyncio.Queue[Output], seconds: float
) -> AsyncIterator[tuple[int, TextDelta]]:
    """The output of all requests as it arrives; closing the iterator early cancels them. Raises RequestFailed."""
    running, deadline = len(scheduled), time.monotonic() + seconds
    try:
        while running:
            try:
                number, output = await asyncio.wait_for(queue.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise TimedOut(f"the request took longer than {seconds:g} s") from None
            if isinstance(output, RequestFailed):
                raise output
            running -= output.finish_reason is not None
            yield number, output
    finally:
        if running:
            for each in scheduled:
                scheduler.cancel(each)


async def _stream(
    outputs: AsyncIterator[tuple[int, TextDelta]], response: Response, include_usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events."""
    async with contextlib.aclosing(outputs) as arriving:  # type: ignore[type-var]
        try:
            for chunk in response.opening():
                yield _event(chunk)
            async for number, delta in arriving:
                if (added := response.add(number, delta)) is not None:
                    yield _event(added)
        except RequestFailed as error:
            yield _event({"error": {"message": str(error), "type": error.kind}})
            return
    if include_usage:
        yield _event(response.usage_chunk())
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _collect(outputs: AsyncIterator[tuple[int, TextDelta]], response: Response) -> dict[str, Any]:
    async with contextlib.aclosing(outputs) as arriving:  # type: ignore[type-var]
        async for number, delta in arriving:
            response.add(number, delta)
    return response.complete()


async def _disconnected(request: Request) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
