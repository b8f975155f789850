"""Latency and throughput of the server with concurrent streaming clients, lost streams, and growth of its memory.

Starts launchers/serve.py on a free port; each of `--clients` streams one completion after the other for `--seconds`. Prints
the number of completions, tokens per second, percentiles of the time to the first token and between tokens, and the server's
memory before and after. A stream is lost if it ends early or with another number of tokens than it reports.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Measured:
    """Counts, and seconds to the first token and between tokens, of all clients."""

    finished: int = 0
    tokens: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


async def run_client(
    number: int, http: httpx.AsyncClient, options: argparse.Namespace, end: float, measured: Measured
) -> None:
    """One completion after the other until `end`."""
    turn = 0
    while time.monotonic() < end:
        turn += 1
        body = {
            "prompt": f"{options.prompt} {number} {turn}",
            "max_tokens": options.new_tokens,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": 0,
        }
        try:
            await stream(http, body, measured)
        except httpx.HTTPError as error:
            measured.lost.append(f"{type(error).__name__}: {error}")


async def stream(http: httpx.AsyncClient, body: dict[str, Any], measured: Measured) -> None:
    """One streamed completion."""
    last, tokens, usage, done = time.perf_counter(), 0, None, False
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            measured.refused += 1
            await asyncio.sleep(float(response.headers["retry-after"]))
            return
        async for line in response.aiter_lines():
            done = done or line == "data: [DONE]"
            if not line or done:
                continue
            chunk = orjson.loads(line.removeprefix("data: "))
            if "error" in chunk:
                break
            if chunk.get("usage"):
                usage = chunk["usage"]["completion_tokens"]
            elif count := len(chunk["choices"][0]["logprobs"]["tokens"]):
                now = time.perf_counter()
                (measured.between if tokens else measured.first).append(now - last)
                last, tokens = now, tokens + count
    if done and usage == tokens:
        measured.finished += 1
        measured.tokens += tokens
    else:
        measured.lost.append(f"{tokens} tokens of {usage}, {'' if done else 'not '}ended")


async def run_clients(address: str, options: argparse.Namespace, seconds: float) -> tuple[Measured, float]:
    """All clients at once; their measurements, and the seconds that passed."""
    measured, start = Measured(), time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        clients = (run_client(n, http, options, start + seconds, measured) for n in range(options.clients))
        await asyncio.gather(*clients)
    return measured, time.monotonic() - start


def percentiles(seconds: list[float]) -> str:
    """Percentiles in milliseconds."""
    return ", ".join(f"p{p} {np.percentile(seconds, p) * 1e3:,.0f} ms" for p in (50, 95, 99)) if seconds else "none"


def start_server(options: argparse.Namespace, port: int) -> subprocess.Popen[bytes]:
    """The server, ready. Raises SystemExit if it does not start."""
    command = [sys.executable, str(ROOT / "launchers/serve.py"), "--checkpoint", options.checkpoint, "--port", str(port),
               "--slots", str(options.slots), "--max-waiting", str(options.clients), *options.server_options]  # fmt: skip
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("the server did not start")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return server
        except httpx.HTTPError:
            time.sleep(0.2)
    server.kill()
    raise SystemExit("the server did not answer within two minutes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/bench/serve.py", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="the model to serve")
    add("--clients", type=int, default=64, metavar="N", help="(64)")
    add("--seconds", type=float, default=60.0, metavar="S", help="(60)")
    add("--slots", type=int, default=64, metavar="N", help="(64)")
    add("--new-tokens", type=int, default=64, metavar="N", help="at most N tokens per completion (64)")
    add("--prompt", default="def f(x):", metavar="TEXT", help="the start of each prompt")
    add(
        "--server-options", nargs=argparse.REMAINDER, default=[], help="all following arguments: for launchers/serve.py"
    )
    options = parser.parse_args(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(options, port)
    try:
        address, memory = f"http://127.0.0.1:{port}", psutil.Process(server.pid).memory_info
        asyncio.run(run_clients(address, options, min(5.0, options.seconds)))  # warm-up
        before = memory().rss
        measured, seconds = asyncio.run(run_clients(address, options, options.seconds))
        counts = f"{measured.finished} completions, {len(measured.lost)} lost, {measured.refused} refused"
        rate = f"{measured.tokens / seconds:,.0f} tokens/s"
        print(f"{options.clients} clients for {seconds:.0f} s on {options.slots} slots: {counts}; {rate}")
        print(f"first token: {percentiles(measured.first)}")
        print(f"between tokens: {percentiles(measured.between)}")
        print(f"server memory: {before / 1e6:,.0f} MB before, {memory().rss / 1e6:,.0f} MB after")
        print("".join(f"lost: {line}\n" for line in measured.lost[:5]), end="")
        return 1 if measured.lost else 0
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
