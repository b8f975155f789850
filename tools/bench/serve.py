"""Latency and throughput of the server under many streaming clients, and whether anything is lost or leaks.

Starts launchers/serve.py on a free port, lets `--clients` stream one completion after the other for `--seconds`, and prints
requests, tokens a second, percentiles of the time to the first token and between tokens, and the server's memory at the
beginning and the end. A stream counts as lost when it ends without its last line or with other counts than it should.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson
import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Seen:
    """What the clients saw."""

    finished: int = 0
    tokens: int = 0
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


async def client(number: int, http: httpx.AsyncClient, options: argparse.Namespace, end: float, seen: Seen) -> None:
    """One completion after the other until the end."""
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
            await stream(http, body, seen)
        except httpx.HTTPError as error:
            seen.lost.append(f"{type(error).__name__}: {error}")


async def stream(http: httpx.AsyncClient, body: dict[str, object], seen: Seen) -> None:
    """One completion, read to its end."""
    last, tokens, usage, done = time.perf_counter(), 0, None, False
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 429:
            seen.refused += 1
            await asyncio.sleep(float(answer.headers["retry-after"]))
            return
        async for line in answer.aiter_lines():
            if not line:
                continue
            if line == "data: [DONE]":
                done = True
                continue
            chunk = orjson.loads(line.removeprefix("data: "))
            now = time.perf_counter()
            if chunk.get("usage"):
                usage = chunk["usage"]["completion_tokens"]
                continue
            if "error" in chunk:
                break
            count = len(chunk["choices"][0]["logprobs"]["tokens"])
            if count:
                (seen.between if tokens else seen.first).append(now - last)
                last = now
            tokens += count
    if done and usage == tokens:
        seen.finished += 1
        seen.tokens += tokens
    else:
        seen.lost.append(f"{tokens} tokens of {usage}, {'' if done else 'not '}ended")


async def attack(address: str, options: argparse.Namespace) -> tuple[Seen, float]:
    """All clients at once; what they saw and how long it took."""
    seen, start = Seen(), time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        end = start + options.seconds
        await asyncio.gather(*(client(number, http, options, end, seen) for number in range(options.clients)))
    return seen, time.monotonic() - start


def percentiles(seconds: list[float]) -> str:
    """Three of them, in milliseconds."""
    if len(seconds) < 2:
        return "too few"
    cut = statistics.quantiles(seconds, n=100)
    return f"p50 {cut[49] * 1e3:,.0f} ms, p95 {cut[94] * 1e3:,.0f} ms, p99 {cut[98] * 1e3:,.0f} ms"


def start_server(options: argparse.Namespace, port: int) -> subprocess.Popen[bytes]:
    """The server, ready. Raises SystemExit if it does not get so far."""
    command = [
        sys.executable,
        str(ROOT / "launchers/serve.py"),
        "--checkpoint",
        options.checkpoint,
        "--port",
        str(port),
    ]
    command += ["--slots", str(options.slots), "--max-waiting", str(options.clients), *options.server_options]
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
    add("--checkpoint", required=True, metavar="DIR", help="what to serve")
    add("--clients", type=int, default=64, metavar="N", help="(64)")
    add("--seconds", type=float, default=60.0, metavar="S", help="(60)")
    add("--slots", type=int, default=64, metavar="N", help="(64)")
    add("--new-tokens", type=int, default=64, metavar="N", help="of each completion, unless it ends itself (64)")
    add("--prompt", default="def f(x):", metavar="TEXT", help="what each begins with")
    add("--server-options", nargs=argparse.REMAINDER, default=[], help="all that follows goes to launchers/serve.py")
    options = parser.parse_args(arguments)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(options, port)
    try:
        address, process = f"http://127.0.0.1:{port}", psutil.Process(server.pid)
        warm_up = argparse.Namespace(**{**vars(options), "seconds": min(5.0, options.seconds)})
        asyncio.run(attack(address, warm_up))
        before = process.memory_info().rss
        seen, seconds = asyncio.run(attack(address, options))
        after = process.memory_info().rss
        print(
            f"{options.clients} clients for {seconds:.0f} s on {options.slots} slots: {seen.finished} completions, ",
            end="",
        )
        print(f"{len(seen.lost)} lost, {seen.refused} refused; {seen.tokens / seconds:,.0f} tokens/s")
        print(f"first token: {percentiles(seen.first)}")
        print(f"between tokens: {percentiles(seen.between)}")
        print(f"server memory: {before / 1e6:,.0f} MB before, {after / 1e6:,.0f} MB after")
        for line in seen.lost[:5]:
            print(f"lost: {line}")
        return 1 if seen.lost else 0
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
