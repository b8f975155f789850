"""Models in EleutherAI's evaluation harness (https://github.com/EleutherAI/lm-evaluation-harness).

Needs lm_eval, which `pip install 'megatronish[eval]'` brings: import this module only where it is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatronish.data.tokenizers.tokenizer import Tokenizer
from megatronish.errors import UserError
from megatronish.inference.evaluate import LOGITS_CPU, LOGITS_CUDA
from megatronish.inference.generate import generate
from megatronish.inference.sampling import Sampling
from megatronish.inference.stream import TextStream
from megatronish.model.transformer import Transformer

MAX_NEW_TOKENS = 256
_READ = frozenset({"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k"})
TokenRequest = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, continuation ids


class HarnessModel(TemplateLM):
    """A Transformer as the harness asks for one: log-likelihoods of continuations, and text until a stop string.

    Rows of like length are scored together; continuations of one token that share a context, as of multiple choice,
    cost one row. Greedy unless a task samples, then from `seed`.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, seed: int = 1234) -> None:
        super().__init__()
        if tokenizer.eod_id is None:
            raise UserError("the tokenizer has no end-of-document token, which tasks begin texts with")
        self.model = model.eval()
        self.text = tokenizer
        self.seed = seed
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        assert self.text.eod_id is not None, "checked at the start"
        return self.text.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored behind."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads."""
        return self.model.config.seq_length

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.text.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, behind the token that the model begins every text with, where it has one."""
        ids: list[int] = self.text.encode(string).tolist()
        leads = add_special_tokens is not False and self.text.bos_id is not None
        return [self.prefix_token_id, *ids] if leads else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) of each request, in order. A context too long for the
        model loses its beginning. Raises UserError for a continuation that is empty or longer than the model's context."""
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
        """Rows of like length together, so many that their logits fit."""
        elements = LOGITS_CUDA if self._device.type == "cuda" else LOGITS_CPU
        batches: list[list[tuple[int, ...]]] = []
        for row in sorted(rows, key=lambda ids: (-len(ids), ids)):
            room = max(1, elements // (len(batches[-1][0]) * self.model.config.vocab_size)) if batches else 0
            if len(batches[-1] if batches else ()) >= room:
                batches.append([])
            batches[-1].append(row)
        return batches

    @torch.inference_mode()
    def _logits(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """[rows, longest, V]; what stands behind the end of a row is padding, which nothing before it reads."""
        tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits: torch.Tensor = self.model(tokens.to(self._device))
        return logits

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts behind `prefix_token_id`, in disjoint windows of the model's context."""
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
        hook, self.cache_hook.dbdict = self.cache_hook.dbdict, None  # a window's answer is not that of its text
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
        """Text behind each context up to a stop string, the end of a document, or the most tokens that a task allows.

        Raises UserError for settings of a task that have no counterpart here.
        """
        found = []
        for request in requests:
            context, settings = request.args
            text = self._text(context, settings)
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _text(self, context: str, settings: Mapping[str, Any]) -> str:
        if unknown := sorted(settings.keys() - _READ):
            raise UserError(f"the task's generation settings {', '.join(unknown)} have no counterpart here")
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        most = min(most, self.max_length - 1)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        sampling = Sampling(temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0))
        ids = self.tok_encode(context)[-(self.max_length - most) :] or [self.prefix_token_id]
        generator = torch.Generator(self._device).manual_seed(self.seed)
        stream, text = TextStream(self.text, ids), ""
        for token in generate(
            self.model, ids, most, sampling, self.eot_token_id, generator, vocab_size=self.text.vocab_size
        ):
            text += stream.push(token)
            if any(stop in text for stop in stops):
                break
        else:
            text += stream.finish()
        ends = [text.index(stop) for stop in stops if stop in text]
        return text[: min(ends)] if ends else text
