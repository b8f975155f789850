"""The chat page in a browser: questions are sent, answers are shown, and nothing else is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatronish.checkpoint.paths import TOKENIZER_RECORD_FILE
from megatronish.checkpoint.weights import save_model
from megatronish.data.tokenizers.tokenizer import ByteTokenizer
from megatronish.inference.load import Loaded, load_for_inference
from megatronish.model.transformer import Transformer
from tests.inference.browser import Browser
from tests.inference.conftest import Run
from tests.inference.test_server import serving, until

TURNS = "[...document.querySelectorAll('.turn')].map((line) => [line.className, line.textContent])"
IDLE = "document.querySelector('#send').textContent === 'Send' && document.querySelector('.note')"


@pytest.fixture(scope="module")
def loaded(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The model of the other tests with room for a conversation."""
    config = run.config.megatronish.model.model_copy(update={"seq_length": 512})
    folder, tokenizer = tmp_path_factory.mktemp("page"), ByteTokenizer()
    save_model(folder, Transformer(config, seed=2).state_dict(), config)
    record = {"kind": "bytes", "eod_id": 256, "sha256": tokenizer.fingerprint}
    (folder / TOKENIZER_RECORD_FILE).write_text(json.dumps(record))
    return load_for_inference(folder, "cpu")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


def answer(address: str, messages: list[dict[str, str]]) -> str:
    """The greedy answer of the model, up to 12 tokens."""
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 12}
    found = httpx.post(address + "/v1/chat/completions", json=body, timeout=60).json()
    return str(found["choices"][0]["message"]["content"])


def fill(browser: Browser, selector: str, value: str) -> None:
    """Replace the value of a field, and move the focus away."""
    browser.value(f"document.querySelector('{selector}').select()")
    browser.type(value)
    browser.value("document.activeElement.blur()")


def test_a_conversation(loaded: Loaded, browser: Browser) -> None:
    with serving(loaded) as (address, _):
        browser.open(address)
        browser.until("document.querySelector('#model').textContent === 'tiny'")
        fill(browser, "#temperature", "0")
        fill(browser, "#tokens", "12")
        asked = "<img src=x onerror='throw 1'> & é 中"  # typed text and answers are text, never HTML
        browser.click("#text")
        browser.type(asked)
        browser.press_enter()
        browser.until(IDLE)
        messages = [{"role": "user", "content": asked}]
        first = answer(address, messages)
        assert first and browser.value(TURNS)[:2] == [["turn user", asked], ["turn assistant", first]]
        assert "tokens/s" in browser.value("document.querySelector('.note').textContent")
        assert browser.value("document.querySelector('#text').value") == ""
        assert browser.value("document.querySelectorAll('#log img').length") == 0

        browser.click("#text")
        browser.type("more")
        browser.click("#send")
        browser.until(f"document.querySelectorAll('.note').length === 2 && {IDLE}")
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
        assert browser.value(TURNS)[3:5] == [["turn user", "more"], ["turn assistant", answer(address, messages)]]

        browser.click("#clear")
        assert browser.value(TURNS) == []
        assert {url.removeprefix(address) for url in browser.requested if "favicon" not in url} == {
            "/",
            "/v1/models",
            "/v1/chat/completions",
        }
    assert [problem for problem in browser.problems if "404" not in problem] == []  # there is no favicon


def test_stopped_answer_frees_its_slot(loaded: Loaded, browser: Browser) -> None:
    with serving(loaded, slowly=0.05) as (address, scheduler):
        browser.open(address)
        browser.click("#text")
        browser.type("hi")
        browser.press_enter()
        browser.until("document.querySelector('.assistant')?.textContent.length > 3")  # it streams
        assert browser.value("document.querySelector('#send').textContent") == "Stop"
        assert scheduler.running
        browser.click("#send")
        browser.until(IDLE)
        assert browser.value(TURNS)[-1] == ["turn note", "stopped"]
        until(lambda: not scheduler.running)


def test_page_asks_for_the_key(loaded: Loaded, browser: Browser) -> None:
    with serving(loaded, api_key="secret") as (address, _):
        browser.open(address)
        browser.until("document.querySelector('.error')")
        assert "API key is missing or wrong" in browser.value("document.querySelector('.error').textContent")
        assert not browser.value("document.querySelector('#keybox').hidden")
        browser.click("#key")
        fill(browser, "#key", "secret")
        browser.until("document.querySelector('#model').textContent === 'tiny'")
