"""The adapter for lm-eval: results equal those of the model, for one request or many.

If lm_eval is not installed, one test creates an environment with it, without dependencies of other tasks, and runs this file
there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from launchers import evaluate_tasks
from megatronish.data.tokenizers.tokenizer import ByteTokenizer
from megatronish.errors import UserError
from megatronish.model.transformer import Transformer
from tests.environments import make_environment
from tests.inference.conftest import Run

INSTALLED = importlib.util.find_spec("lm_eval") is not None
if INSTALLED or TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from megatronish.inference import harness
    from megatronish.inference.harness import HarnessModel
needs_harness = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed: test_where_lm_eval_is runs this")
# lm_eval and the packages that it imports.
PACKAGES = [
    "lm_eval",
    "datasets",
    "dill",
    "multiprocess",
    "pandas",
    "python-dateutil",
    "sacrebleu",
    "portalocker",
    "tabulate",
    "colorama",
    "lxml",
    "pytablewriter",
    "typepy",
    "mbstrdecoder",
    "dataproperty",
    "msgfy",
    "tabledata",
    "logbook",
    "six",
    "chardet",
    "pathvalidate",
    "pytz",
    "more_itertools",
    "sqlitedict",
    "dominate",
]


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.skipif(INSTALLED, reason="lm_eval is here: the other tests run")
def test_where_lm_eval_is(tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv", *PACKAGES)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "6 passed, 1 skipped" in done.stdout, (done.stdout + done.stderr)[-6000:]


PAIRS = [
    ("the layer norm of", " x"),
    ("the layer norm of", " attention is all"),
    ("", "you need"),
    ("a", "b"),
    ("the layer norm of ", "x"),
    ("is all you need " * 5, "def"),  # longer than the context of 32
    ("a", "c"),
]


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


@torch.no_grad()
def by_hand(model: Transformer, ids: list[int], scored: int) -> tuple[float, bool]:
    """log p of the last `scored` ids after those before them, and whether each is the best."""
    ids = ids[-(model.config.seq_length + 1) :]
    logits = model(torch.tensor([ids[:-1]]))[0, -scored:]
    wanted = torch.tensor(ids[-scored:])
    return logits.log_softmax(-1)[range(scored), wanted].sum().item(), bool((logits.argmax(-1) == wanted).all())


@needs_harness
def test_loglikelihoods(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, tokenizer = HarnessModel(model, ByteTokenizer()), ByteTokenizer()
    found = adapter.loglikelihood(instances("loglikelihood", PAIRS))
    for (context, continuation), (nats, greedy) in zip(PAIRS, found, strict=True):
        scored = len(continuation) + (len(context) - len(context.rstrip()))  # blanks go to the continuation
        ids = ([256] if not context else []) + tokenizer.encode(context + continuation).tolist()
        expected, best = by_hand(model, ids, scored)
        assert nats == pytest.approx(expected, rel=1e-5)
        assert greedy == best
    monkeypatch.setitem(harness.MAX_LOGITS, "cpu", 1)  # one row at a time
    alone = adapter.loglikelihood(instances("loglikelihood", PAIRS))
    assert [nats for nats, _ in alone] == pytest.approx([nats for nats, _ in found], rel=1e-5)
    assert any(greedy for _, greedy in adapter.loglikelihood(instances("loglikelihood", best_continuations(model))))


def best_continuations(model: Transformer) -> list[tuple[str, str]]:
    """Contexts with the byte that the model finds best, where that is a character."""
    contexts = ["the layer", "norm of", "def", "return", "is all"]
    with torch.no_grad():
        best = [int(model(torch.tensor([list(text.encode())]))[0, -1].argmax()) for text in contexts]
    found = [(text, chr(byte)) for text, byte in zip(contexts, best, strict=True) if byte < 128]
    assert found, "no best byte is a character: choose other contexts"
    return found


@needs_harness
def test_rows_that_share_their_tokens_are_computed_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = HarnessModel(model, ByteTokenizer())
    seen: list[int] = []
    logits = adapter._logits
    monkeypatch.setattr(adapter, "_logits", lambda batch: seen.append(len(batch)) or logits(batch))
    adapter.loglikelihood(instances("loglikelihood", [("answer: ", letter) for letter in "ABCD"] + [("answer:", " A")]))
    assert sum(seen) == 1  # the blank moves to the continuation, and the last letter is not read
    seen.clear()
    adapter.loglikelihood(instances("loglikelihood", [("answer:", two) for two in ("AB", "AC", "DC")]))
    assert sum(seen) == 2


@needs_harness
def test_rolling_log_likelihoods(model: Transformer) -> None:
    """100 bytes through a context of 32: each is scored once."""
    text = "attention is all you need\n" * 4
    (found,) = HarnessModel(model, ByteTokenizer()).loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    ids = [256, *text.encode()]
    expected = by_hand(model, ids[:33], 32)[0]
    for start in range(32, 96, 32):
        expected += by_hand(model, ids[start : start + 33], 32)[0]
    expected += by_hand(model, ids[-33:], 8)[0]
    assert len(text) == 104
    assert found == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def greedy_text(model: Transformer, context: str, count: int) -> str:
    """What greedy decoding writes, up to the end of a document."""
    ids = list(context.encode())
    start = len(ids)
    for _ in range(count):
        best = int(model(torch.tensor([ids]))[0, -1].argmax())
        if best == 256:
            break
        ids.append(best)
    return ByteTokenizer().decode(ids[start:])


@needs_harness
def test_generation(model: Transformer) -> None:
    adapter = HarnessModel(model, ByteTokenizer())
    texts = {
        context: greedy_text(model, context, 12) for context in ("the layer", "def", "is all", "you need", "(y)", "x")
    }
    settings: dict[str, Any] = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    asked = [(context, settings) for context in texts]
    assert adapter.generate_until(instances("generate_until", asked)) == list(texts.values())
    context, longest = max(texts.items(), key=lambda item: len(item[1]))
    stop = longest[3:5]
    assert stop
    (stopped,) = adapter.generate_until(instances("generate_until", [(context, {**settings, "until": [stop]})]))
    assert stopped == longest[: longest.index(stop)]
    with pytest.raises(UserError, match="num_beams have no counterpart"):
        adapter.generate_until(instances("generate_until", [("x", {"num_beams": 4})]))
    with pytest.raises(UserError, match="has 40 tokens; 1 to 32 can be scored"):
        adapter.loglikelihood(instances("loglikelihood", [("a", "b" * 40)]))


@needs_harness
def test_texts_begin_with_the_token_of_an_imported_model(model: Transformer) -> None:
    """A beginning of a text, where the tokenizer has one, comes before every context, once."""
    tokenizer, plain = ByteTokenizer(), HarnessModel(model, ByteTokenizer())
    tokenizer.bos_id = 7
    adapter = HarnessModel(model, tokenizer)
    assert adapter.tok_encode("ab") == [7, 97, 98] and plain.tok_encode("ab") == [97, 98]
    found = adapter.loglikelihood(instances("loglikelihood", [("the", " x"), ("", "def")]))
    expected = [by_hand(model, [7, *b"the x"], 2), by_hand(model, [7, *b"def"], 3)]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    (rolling,) = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", [("def",)]))
    assert rolling == pytest.approx(expected[1][0], rel=1e-5)
    (text,) = adapter.generate_until(instances("generate_until", [("is all", {"until": [], "max_gen_toks": 8})]))
    assert text == greedy_text(model, "\x07is all", 8)


TASK = """
task: little_choice
dataset_path: json
dataset_kwargs:
  data_files: FILE
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
"""


@needs_harness
def test_a_task_from_the_command_line(
    run: Run, model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracy on local questions is that of choosing by hand; the network is not needed."""
    import lm_eval.tasks

    questions = [
        {"question": text, "choices": [" x", " of the", "norm", " (y)"], "answer": number % 4}
        for number, text in enumerate(["the layer", "return def", "all you need", "attention", "is +", "norm of the"])
    ]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(tmp_path / "q.json")))
    right = 0
    for question in questions:
        prefix = question["question"]
        options = [
            by_hand(model, list(f"{prefix} {choice}".encode()), len(choice) + 1)[0] for choice in question["choices"]
        ]
        right += max(range(4), key=options.__getitem__) == question["answer"]
    words = ["--checkpoint", str(run.folder), "--tasks-dir", str(tmp_path), "--tasks"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", *words, "little_choice"])
    evaluate_tasks.main()
    written = json.loads((run.folder / "tasks.json").read_text())
    assert written["results"]["little_choice"]["acc,none"] == pytest.approx(right / len(questions))
    assert "little_choice" in capsys.readouterr().out
    indexed = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # the others take many seconds
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, **_: indexed(include_path=include_path))
    monkeypatch.setattr(sys, "argv", ["evaluate_tasks.py", *words, "nothing_like_it"])
    with pytest.raises(SystemExit) as stop:
        evaluate_tasks.main()
    assert stop.value.code == 2 and "--tasks nothing_like_it: no such task" in capsys.readouterr().err
