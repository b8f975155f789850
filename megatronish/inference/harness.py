"""Evaluation with EleutherAI's harness (https://github.com/EleutherAI/lm-evaluation-harness).

This module imports lm_eval, which `pip install 'megatronish[eval]'` installs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError
from megatronish.inference.batch import generate
from megatronish.inference.evaluate import MAX_LOGITS
from megatronish.inference.load import Loaded
from megatronish.inference.sampling import Sampling
from megatronish.inference.text import Prompt, TextGeneration
from megatronish.model.transformer import Transformer

MAX_NEW_TOKENS = 256
_SUPPORTED = frozenset({"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"})
TokenRequest = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, continuation ids


class HarnessModel(TemplateLM):
    """A Transformer with the interface of the harness: log-likelihoods of continuations, and generation up to a stop string.

    Requests are batched by length; continuations of one token that share a context, as in multiple choice, share a row.
    Greedy decoding unless a task samples, then with `seed`.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1234) -> None:
        super().__init__()
        if tokenizer.eod_id is None:
            raise UserError("the tokenizer has no end-of-document token, which the texts of tasks start with")
        self.model = model.eval()
        self.text = tokenizer
        self.seed = seed
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        assert self.text.eod_id is not None, "checked at the start"
        return self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def max_length(self) -> int:
        """The model's context in tokens."""
        return self.model.config.seq_length

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's cache of requests."""
        return self.text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, preceded by the BOS token of the model, if it has one."""
        ids: list[int] = self.text.encode(string).tolist()
        leads = add_special_tokens is not False and self.text.bos_id is not None
        return [self.prefix_token_id, *ids] if leads else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) of each request, in order. The context is truncated
        on the left. Raises UserError for a continuation that is empty or longer than the model's context."""
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"the continuation {texts[1][:60]!r} has {len(continuation)} tokens; 1 to {self.max_length} can be scored"
                )
            rows[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in self._batches(list(rows)):
            logits = self._logits(batch)
            for row, ids in enumerate(batch):
                for number in rows[ids]:
                    texts, _, continuation = requests[number]
                    part = logits[row, len(ids) - len(continuation) : len(ids)].float()
                    wanted = torch.tensor(continuation, device=part.device)
                    nats = part.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
                    answers[number] = (nats, bool((part.argmax(-1) == wanted).all()))
                    self.cache_hook.add_partial("loglikelihood", texts, answers[number])
        return answers

    def _batches(self, rows: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Batches of rows of similar length whose logits have at most MAX_LOGITS elements."""
        elements = MAX_LOGITS[self._device.type]
        batches: list[list[tuple[int, ...]]] = []
        for row in sorted(rows, key=lambda ids: (-len(ids), ids)):
            room = max(1, elements // (len(batches[-1][0]) * self.model.config.vocab_size)) if batches else 0
            if len(batches[-1] if batches else ()) >= room:
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.inference_mode()
    def _logits(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """[rows, longest, V]; shorter rows are padded on the right, which causal attention ignores."""
        tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits: torch.Tensor = self.model(tokens.to(self._device))
        return logits

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of complete texts after `prefix_token_id`, in disjoint windows of the model's context."""
        pieces: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                context, continuation = make_disjoint_window(window)
                pieces.append((("", text), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        hook, self.cache_hook.dbdict = self.cache_hook.dbdict, None  # the result of a window is not that of the text
        try:
            answers = self._loglikelihood_tokens(pieces)
        finally:
            self.cache_hook.dbdict = hook
        for owner, (nats, _) in zip(owners, answers, strict=True):
            totals[owner] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to a stop string, the end of a document, or the token limit of the task.

        Raises UserError for unsupported settings of a task.
        """
        found = []
        for request in requests:
            context, settings = request.args
            text = self._text(context, settings)
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _text(self, context: str, settings: Mapping[str, Any]) -> str:
        if unknown := sorted(settings.keys() - _SUPPORTED):
            raise UserError(f"the task's generation settings {', '.join(unknown)} have no counterpart here")
        until = settings.get("until") or []
        stop = [until] if isinstance(until, str) else [each for each in until if each]
        most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        most = min(most, self.max_length - 1)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        sampling = Sampling(temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))
        ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        generator = torch.Generator(self._device).manual_seed(self.seed)
        generation = generate(
            self.model, ids, most, sampling, self.eot_token_id, generator, vocab_size=self.text.vocab_size
        )
        return "".join(TextGeneration(generation, self.text, Prompt(ids), stop))


def evaluate_tasks(
    loaded: Loaded, tasks: list[str], tasks_dir: str | None, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """Results of tasks or groups by name, in the harness's form. tasks_dir: a folder of further tasks (YAML). limit:
    documents per task. Raises UserError for an unknown task."""
    manager = TaskManager(include_path=tasks_dir, include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):  # indexing the harness's own tasks takes seconds
        manager = TaskManager(include_path=tasks_dir)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UserError(
            f"--tasks {unknown[0]}: no such task; `lm-eval ls tasks` lists the names, --tasks-dir adds yours"
        )
    found: dict[str, Any] = simple_evaluate(
        model=HarnessModel(loaded.model, loaded.tokenizer),
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    return found
