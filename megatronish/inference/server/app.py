"""The HTTP side: routes, limits, errors in OpenAI's form. What is asked is checked here, and written by the scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import orjson
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from megatronish.errors import UserError
from megatronish.inference.batch import Request as Wish
from megatronish.inference.chat_format import Message
from megatronish.inference.prompt import Prompt, encode_prompt
from megatronish.inference.sampling import Sampling
from megatronish.inference.server.admission import Guard, error_body
from megatronish.inference.server.protocol import ChatRequest, Common, CompletionRequest
from megatronish.inference.server.replies import ChatReply, CompletionReply, Reply
from megatronish.inference.server.scheduler import Busy, Event, Job, Scheduler

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True)
class Limits:
    """seconds: for a whole request; body_bytes: of what is sent."""

    seconds: float = 300.0
    body_bytes: int = 1 << 20


class TimedOut(Exception):
    """A request took longer than Limits.seconds."""


def create_app(
    scheduler: Scheduler, model_name: str, *, api_key: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """The application; it starts the scheduler and closes it. Without api_key it answers only requests that name this
    machine itself as their host, so that no web page elsewhere can send any (DNS rebinding)."""
    limits = limits or Limits()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(title="megatronish", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    _add_errors(app)
    _add_pages(app, scheduler)
    tokenising = asyncio.Semaphore(2)  # long texts take seconds, and only so many cores

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model_name, started)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise HTTPException(404, f"there is no model {name!r}, only {model_name!r}")
        return _model_card(model_name, started)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async with tokenising:
            prompts = await asyncio.to_thread(_prompts, scheduler, body)
        reply = CompletionReply(model_name, scheduler.tokenizer, prompts, body.logprobs is not None)
        tokens = body.max_tokens or DEFAULT_COMPLETION_TOKENS
        return await _answer(scheduler, limits, request, body, reply, prompts, tokens, body.logprobs)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        async with tokenising:
            prompt = await asyncio.to_thread(scheduler.format.prompt, _messages(body))
        if body.top_logprobs is not None and not body.logprobs:
            raise UserError("top_logprobs needs logprobs: true")
        reply = ChatReply(model_name, scheduler.tokenizer, [prompt], bool(body.logprobs))
        tokens = body.max_completion_tokens or body.max_tokens or scheduler.max_context
        best = (body.top_logprobs or 0) if body.logprobs else None
        stops = scheduler.format.stop_texts
        return await _answer(scheduler, limits, request, body, reply, [prompt], tokens, best, stops)

    app.add_middleware(Guard, api_key=api_key, body_bytes=limits.body_bytes, metrics=scheduler.metrics)
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
    async def metrics() -> Response:
        return Response(scheduler.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    """Every error as OpenAI's clients expect it."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_body(400, f"{place}: {first['msg']}" if place else first["msg"], place or None)

    @app.exception_handler(UserError)
    async def refused(_request: Request, error: UserError) -> JSONResponse:
        return error_body(400, str(error))

    @app.exception_handler(Busy)
    async def busy(_request: Request, error: Busy) -> JSONResponse:
        return error_body(429, str(error), headers={"Retry-After": "1"})

    @app.exception_handler(TimedOut)
    async def late(_request: Request, error: TimedOut) -> JSONResponse:
        return error_body(504, str(error))

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        return error_body(error.status_code, str(error.detail))


def _model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "megatronish"}


def _messages(body: ChatRequest) -> list[Message]:
    # "developer" is OpenAI's newer word for "system"; templates know the old one.
    return [Message(role="system" if m.role == "developer" else m.role, content=m.text) for m in body.messages]


def _prompts(scheduler: Scheduler, body: CompletionRequest) -> list[Prompt]:
    prompts = body.prompts
    if len(prompts) > 64:
        raise UserError(f"{len(prompts)} prompts in one request: give at most 64")
    return [encode_prompt(scheduler.tokenizer, p) if isinstance(p, str) else Prompt(p) for p in prompts]


async def _answer(
    scheduler: Scheduler,
    limits: Limits,
    request: Request,
    body: Common,
    reply: Reply,
    prompts: list[Prompt],
    max_tokens: int,
    logprobs: int | None,
    stops: tuple[str, ...] = (),
) -> Response:
    """Check and queue every choice of every prompt, then stream or collect what is written."""
    sampling = Sampling(
        1.0 if body.temperature is None else body.temperature,
        body.top_k or 0,
        1.0 if body.top_p is None else body.top_p,
        body.min_p or 0.0,
        1.0 if body.repetition_penalty is None else body.repetition_penalty,
    )
    seed = secrets.randbelow(2**62) if body.seed is None else body.seed % 2**62
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    loop, stop = asyncio.get_running_loop(), (*body.stops, *stops)
    jobs: list[Job] = []
    for prompt in prompts:
        for choice in range(body.n or 1):
            draw = torch.Generator(scheduler.device).manual_seed(seed + choice)  # type: ignore[arg-type]
            wish = Wish(
                prompt.ids,
                max_tokens,
                sampling,
                draw,
                prompt.first_ids,
                logprobs=logprobs,
                stop_ids=scheduler.format.stop_ids,
            )
            scheduler.check(wish, stop)

            def send(event: Event, number: int = len(jobs)) -> None:
                # The loop is closed where the server ends first: nobody waits then.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(events.put_nowait, (number, event))

            jobs.append(Job(wish, prompt, stop, send))
    reply.expect(len(jobs), body.n or 1)
    scheduler.submit(jobs)
    arriving = _arriving(scheduler, jobs, events, limits.seconds)
    if body.stream:
        return StreamingResponse(_stream(arriving, reply, body.include_usage), media_type="text/event-stream")
    collecting = asyncio.ensure_future(_collect(arriving, reply))
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        return Response(orjson.dumps(collecting.result()), media_type="application/json")
    finally:
        for task in (collecting, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await collecting


async def _arriving(
    scheduler: Scheduler, jobs: list[Job], events: asyncio.Queue[tuple[int, Event]], seconds: float
) -> AsyncIterator[tuple[int, Event]]:
    """The events of all jobs as they come. Whoever stops listening cancels them. Raises TimedOut."""
    left, deadline = len(jobs), time.monotonic() + seconds
    try:
        while left:
            try:
                number, event = await asyncio.wait_for(events.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise TimedOut(f"the request took longer than {seconds:g} s") from None
            left -= event.is_last
            yield number, event
    finally:
        if left:
            for job in jobs:
                scheduler.cancel(job)


async def _stream(
    arriving: AsyncIterator[tuple[int, Event]], reply: Reply, include_usage: bool
) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(arriving) as events:  # type: ignore[type-var]
        try:
            for chunk in reply.opening():
                yield _line(chunk)
            async for number, event in events:
                if event.error is not None:
                    yield _line({"error": {"message": event.error, "type": "server_error"}})
                    return
                if (told := reply.chunk(number, event)) is not None:
                    yield _line(told)
        except TimedOut as error:
            yield _line({"error": {"message": str(error), "type": "timeout"}})
            return
    if include_usage:
        yield _line(reply.usage_chunk())
    yield b"data: [DONE]\n\n"


def _line(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def _collect(arriving: AsyncIterator[tuple[int, Event]], reply: Reply) -> dict[str, Any]:
    async with contextlib.aclosing(arriving) as events:  # type: ignore[type-var]
        async for number, event in events:
            if event.error is not None:
                raise HTTPException(500, event.error)
            reply.chunk(number, event)
    return reply.whole()


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
