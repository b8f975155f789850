"""Sampling of the next token from logits: repetition penalty, temperature, top-k, top-p, min-p.

The order is that of transformers' logits processors: top-p applies to the distribution after temperature and top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatronish.errors import UserError

# Below this the best token has all the probability unless logits tie within 1e-4; smaller values underflow in fp32.
LOWEST_TEMPERATURE = 1e-6
# Top-p sorts only the most likely tokens, and all if these do not sum to p: sorting 100,000 takes milliseconds.
FIRST_SORTED = 512


@dataclass(frozen=True)
class Sampling:
    """temperature: logits are divided by it (0: greedy); top_k: only the k best tokens (0: all); top_p: only the fewest
    best tokens whose probabilities sum to at least p (1: all; Holtzman et al. 2020, section 3.1); min_p: only tokens of
    at least min_p times the best one's probability (0: all; Nguyen et al. 2024); repetition_penalty: positive logits of
    tokens that occur in prompt or text are divided by it, negative ones multiplied (1: none; Keskar et al. 2019).

    Raises UserError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature} must be a number of at least 0 (0 takes the best token)")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p {self.min_p} must be at least 0 (0 keeps all tokens) and at most 1")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise UserError(
                f"repetition penalty {self.repetition_penalty} must be a number above 0 (1 changes nothing)"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken without random numbers."""
        return self.temperature < LOWEST_TEMPERATURE or self.top_k == 1


GREEDY = Sampling(temperature=0.0)


def penalized(logits: Tensor, sampling: Sampling, seen: Sequence[int]) -> Tensor:
    """logits [V] with the repetition penalty on the ids in `seen`; in fp32 where there is one."""
    if sampling.repetition_penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    logits = logits.float().clone()
    chosen = logits[ids]
    penalty = sampling.repetition_penalty
    logits[ids] = torch.where(chosen < 0, chosen * penalty, chosen / penalty)
    return logits


def filtered_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..., V] -> fp32 logits [..., V] of the distribution drawn from, up to a constant; -inf for the excluded.

    Tokens that tie with the k-th best are kept by top-k. The best token is always kept.
    """
    logits = logits.float()
    # The best logit becomes 0, so that a small temperature sends the others to -inf and nothing to +inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, LOWEST_TEMPERATURE)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p < 1.0:
        logits = _top_p(logits, sampling.top_p)
    if sampling.min_p > 0.0:
        # The best token's logit is 0, and that of a share p of its probability ln p.
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits


def _top_p(logits: Tensor, top_p: float) -> Tensor:
    total = logits.logsumexp(-1, keepdim=True)
    for count in (FIRST_SORTED, logits.shape[-1]):
        count = min(count, logits.shape[-1])
        if count < logits.shape[-1]:
            ordered, order = logits.topk(count, dim=-1)
        else:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = (ordered - total).exp()
        mass = probabilities.cumsum(-1)
        if count == logits.shape[-1] or bool((mass[..., -2] >= top_p).all()):
            break
    kept = mass - probabilities < top_p
    kept[..., 0] = True
    return torch.full_like(logits, -math.inf).scatter(-1, order, ordered.masked_fill(~kept, -math.inf))


def choose(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None, seen: Sequence[int] = ()
) -> Tensor:
    """Draw one token from each row of logits [b, V]: int64 [b], on the device of the logits.

    generator: on the same device (default: the global one). seen: the ids that the repetition penalty applies to, the
    same for each row. Raises UserError if the largest logit of a row is non-finite, as for a damaged or
    diverged model.
    """
    if seen and sampling.repetition_penalty != 1.0:
        logits = torch.stack([penalized(row, sampling, seen) for row in logits])
    if sampling.is_greedy:
        ids = _best(logits)
        _check_finite(logits.gather(-1, ids[:, None]))
        return ids
    _check_finite(logits.amax(-1))
    probabilities = filtered_logits(logits, sampling).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _best(logits: Tensor) -> Tensor:
    """The argmax of each row, the index of NaN if there is one. NumPy takes a tenth of torch's time on CPUs."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(np.asarray(logits.detach().float().numpy().argmax(-1)))


def _check_finite(best: Tensor) -> None:
    if not bool(best.isfinite().all()):
        raise UserError(
            "the model's logits are non-finite: its weights are damaged, training diverged, or fp16 overflowed. "
            "Use another checkpoint or --dtype fp32."
        )
