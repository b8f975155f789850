"""The server with the official client, invalid requests, and clients that disconnect."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import types
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn

from megatronish.data.tokenizers.tokenizer import ByteTokenizer
from megatronish.errors import UserError
from megatronish.inference.batch import generate
from megatronish.inference.load import load_for_inference
from megatronish.inference.sampling import Sampling
from megatronish.inference.server import scheduler as scheduler_module
from megatronish.inference.server.admission import read_api_key
from megatronish.inference.server.app import Limits, create_app
from megatronish.inference.server.scheduler import Scheduler


@contextlib.contextmanager
def serving(loaded, *, slowly=0.0, api_key=None, limits=None, **options):
    """A server on a free port of this machine; yields its address and its scheduler."""
    scheduler = Scheduler(loaded, **options)
    if slowly:
        step = scheduler.batch.step

        def slow_step():
            time.sleep(slowly)
            step()

        scheduler.batch.step, scheduler.batch.eod_id = slow_step, None
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(scheduler, "tiny", api_key=api_key, limits=limits)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", scheduler
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def loaded(run):
    return load_for_inference(run.folder, "cpu")


@pytest.fixture(scope="module")
def server(loaded):
    with serving(loaded, slots=4, max_waiting=100) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server + "/v1", api_key="none", max_retries=0) as found:
        yield found


def expected(model, prompt, count, seed, sampling=None):
    draw = torch.Generator().manual_seed(seed)
    ids = list(generate(model, [256, *prompt.encode()], count, sampling or Sampling(0.9), 256, draw))
    return ids, ByteTokenizer().decode(ids)


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    assert httpx.get(server + "/health").json() == {"status": "ok"}


def test_completions_equal_generation(client, model):
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0.9, "seed": 5}
    done = client.completions.create(prompt=["def", "the x"], n=2, **options)
    written = [expected(model, p, 12, seed) for p in ("def", "the x") for seed in (5, 6)]
    assert [choice.text for choice in done.choices] == [text for _, text in written]
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert done.usage.prompt_tokens == 4 + 6
    assert done.usage.completion_tokens == sum(len(ids) for ids, _ in written)
    for choice, (ids, _) in zip(done.choices, written):
        assert choice.finish_reason == ("length" if len(ids) == 12 else "stop")
    ids = client.completions.create(prompt=[256, *b"def"], **options)
    assert ids.choices[0].text == written[0][1], "ids are used unchanged"


def test_streamed_equals_complete(client):
    options = {"model": "tiny", "prompt": "def", "max_tokens": 15, "seed": 3, "n": 2, "logprobs": 2}
    complete = client.completions.create(**options)
    texts, finishes, tokens, usage = ["", ""], [None, None], [[], []], None
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in complete.choices]
    assert finishes == [choice.finish_reason for choice in complete.choices]
    assert tokens == [choice.logprobs.tokens for choice in complete.choices]
    assert usage == complete.usage
    scores = complete.choices[0].logprobs
    assert all(value <= 0 for value in scores.token_logprobs) and all(len(best) <= 2 for best in scores.top_logprobs)


def test_chat_with_stop_and_log_probabilities(client, loaded):
    options = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 8, "max_tokens": 10}
    free = client.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    text, content = free.choices[0].message.content, free.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode(errors="replace") == text
    assert all(len(token.top_logprobs) == 3 for token in content)
    prompt = "User: x\nAssistant:"
    assert free.usage.prompt_tokens == 1 + len(prompt)
    assert text == expected(loaded.model, prompt, 10, 8, Sampling(1.0))[1]
    stop = text[2]
    stopped = client.chat.completions.create(**options, stop=["never there", stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True)]
    assert pieces[0].role == "assistant" and "".join(piece.content or "" for piece in pieces) == text


def test_concurrent_streams(server, model):
    """More than there are slots: each has the text of a single request."""
    prompts = [f"p{i}" for i in range(20)]

    async def one(client, prompt, seed):
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=20, temperature=0.9, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone():
        async with openai.AsyncOpenAI(base_url=server + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt, seed) for seed, prompt in enumerate(prompts)))

    assert asyncio.run(everyone()) == [expected(model, p, 20, seed)[1] for seed, p in enumerate(prompts)]


COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b'{"prompt": ', 400, "JSON"),
        (b"\xff\xfe", 400, ""),
        (b"[]", 400, ""),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"prompt": "x", "max_tokens": "9"}, 400, "max_tokens"),
        ({"prompt": "x", "temperature": -0.5}, 400, "temperature"),
        ({"prompt": "x", "temperature": True}, 400, "temperature"),
        ({"prompt": "x", "top_p": 0}, 400, "top_p"),
        ({"prompt": "x", "n": 1000}, 400, "n: "),
        ({"prompt": "x", "stop": ""}, 400, "stop"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
        ({"prompt": "x", "echo": True}, 400, "echo is not supported"),
        ({"prompt": "x" * 40}, 400, "the prompt has 41 tokens, but the model's context is 32"),
        ({"prompt": [1, 99999]}, 400, "prompt ids 1..99999 are outside 0..256"),
        ({"prompt": []}, 400, "the prompt is empty"),
        ({"prompt": ["x"] * 65}, 400, "65 prompts in one request"),
        (json.dumps({"prompt": "x" * 10_000_000}).encode(), 413, "larger than 1,048,576 bytes"),
    ],
)
def test_bad_requests(server, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(server + COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]
    assert httpx.get(server + "/health").status_code == 200


def test_rejected_requests(server):
    wrong_type = httpx.post(server + COMPLETIONS, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert wrong_type.status_code == 415
    assert httpx.get(server + "/nowhere").status_code == 404
    assert httpx.get(server + COMPLETIONS).status_code == 405
    elsewhere = httpx.get(server + "/v1/models", headers={"Host": "evil.example"})
    assert elsewhere.status_code == 403 and "evil.example" in elsewhere.json()["error"]["message"]
    chat = httpx.post(
        server + "/v1/chat/completions", json={"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    )
    assert chat.status_code == 400 and "only text can be read" in chat.text

    def endless():
        for _ in range(40):
            yield b" " * 65536

    unsized = httpx.post(server + COMPLETIONS, content=endless(), headers={"Content-Type": "application/json"})
    assert unsized.status_code == 413


def test_an_api_key(loaded):
    with serving(loaded, api_key="secret") as (address, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx.get(address + "/v1/models", headers=headers)
            assert answer.status_code == 401 and "Bearer KEY" in answer.text
        assert httpx.get(address + "/metrics").status_code == 401
        assert httpx.get(address + "/health").status_code == httpx.get(address + "/").status_code == 200
        with openai.OpenAI(base_url=address + "/v1", api_key="secret", max_retries=0) as client:
            assert client.models.list().data[0].id == "tiny"


def test_page_loads_nothing_else(server):
    page = httpx.get(server + "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text and "chat/completions" in page.text


def until(condition):
    """Wait for another thread."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.01)


def test_disconnected_client_frees_its_slot(loaded):
    with serving(loaded, slowly=0.2, slots=1) as (address, scheduler):
        body = {"prompt": "x", "max_tokens": 30, "temperature": 0}
        with httpx.stream("POST", address + COMPLETIONS, json={**body, "stream": True}) as answer:
            assert next(answer.iter_raw()).startswith(b"data: ")
            streamed = scheduler.running[0].text.generation
        until(lambda: not scheduler.running)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + COMPLETIONS, json=body, timeout=httpx.Timeout(30, read=0.5))
        until(lambda: not scheduler.running)
        assert (streamed.finish_reason, streamed.batch.running) == ("cancelled", [])
        assert 0 < len(streamed.new_ids) < 30
        assert httpx.post(address + COMPLETIONS, json={"prompt": "y", "max_tokens": 2}).status_code == 200


def test_full_queue_and_timeout(loaded):
    with serving(loaded, slowly=0.1, slots=1, max_waiting=1, limits=Limits(seconds=1.0)) as (address, scheduler):
        answers = []

        def ask():
            answers.append(httpx.post(address + COMPLETIONS, json={"prompt": "x", "max_tokens": 30, "temperature": 0}))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda count=number + 1: len(scheduler.running) + len(scheduler.waiting) == count)
        refused = httpx.post(address + COMPLETIONS, json={"prompt": "x"})
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [504, 504]
        assert "took longer than 1 s" in answers[0].json()["error"]["message"]
        metrics = httpx.get(address + "/metrics").text
        assert 'megatronish_requests_total{path="/v1/completions",status="504"} 2.0' in metrics
        assert "megatronish_refused_total 1.0" in metrics
        until(lambda: not scheduler.running)


def test_server_continues_after_a_failed_step(loaded):
    with serving(loaded, slots=2) as (address, scheduler):
        step, failures = scheduler.batch.step, iter([True])

        def failing():
            if next(failures, False):
                raise RuntimeError("out of memory")
            step()

        scheduler.batch.step = failing
        failed = httpx.post(address + COMPLETIONS, json={"prompt": "x", "max_tokens": 3})
        assert failed.status_code == 500 and failed.json()["error"]["message"] == "out of memory"
        assert httpx.post(address + COMPLETIONS, json={"prompt": "x", "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0.0.0.0", None), "--host 0.0.0.0: whoever reaches this address could use the model"),
        (("example.org", None), "Set an API key in MEGATRONISH_API_KEY"),
        (("127.0.0.1", Path("/nowhere/key")), "/nowhere/key: cannot be read"),
    ],
)
def test_address_needs_api_key(arguments, message, monkeypatch):
    monkeypatch.delenv("MEGATRONISH_API_KEY", raising=False)
    with pytest.raises(UserError, match=message):
        read_api_key(*arguments)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert read_api_key(host, None) is None
    monkeypatch.setenv("MEGATRONISH_API_KEY", "k")
    assert read_api_key("0.0.0.0", None) == "k"


@pytest.mark.parametrize("options", [{"slots": 0}, {"max_waiting": 0}, {"max_context": 0}])
def test_limits_below_one(loaded, options):
    with pytest.raises(UserError, match="must be at least 1"):
        Scheduler(loaded, **options)


def test_default_slots(loaded, monkeypatch):
    """A quarter of the free memory is for keys and values in fp32: 2 layers, 2 heads of 8, 32 tokens."""
    each = 2 * 2 * 2 * 8 * 32 * 4
    for free, slots in ((each, 1), (4 * 10.5 * each, 10), (1 << 40, 64)):
        memory = types.SimpleNamespace(available=free)
        monkeypatch.setattr(scheduler_module.psutil, "virtual_memory", lambda memory=memory: memory)
        assert Scheduler(loaded).slots == slots
    assert Scheduler(loaded).batch.cache_bytes == 64 * each
    assert Scheduler(loaded, max_context=16).batch.cache_bytes == 32 * each
    assert Scheduler(loaded, slots=3).slots == 3
