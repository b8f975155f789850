"""How the next token is drawn from logits: temperature, then top-k, then top-p, then one draw.

The order is that of transformers' logits processors: top-p sees the probabilities that temperature and top-k left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatronish.config.base import UserError

# Below this the best token has all the probability unless logits tie within 1e-4; smaller values underflow in fp32.
LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """temperature: logits are divided by it (0: greedy); top_k: only the k best tokens (0: all); top_p: only the
    fewest best tokens whose probabilities sum to at least p (1: all; Holtzman et al. 2020, section 3.1).

    Raises UserError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature} must be a number of at least 0 (0 takes the best token)")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} must be at least 0 (0 keeps all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken without drawing."""
        return self.temperature < LOWEST_TEMPERATURE or self.top_k == 1


GREEDY = Sampling(temperature=0.0)


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
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        excluded = mass_before >= sampling.top_p  # never the first: nothing is before it
        excluded[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -math.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token from each row of logits [b, V]: int64 [b], on the device of the logits.

    generator: of the same device; the default one of the device without it. Raises UserError if a row's best logit is
    no finite number, which is a damaged or diverged model.
    """
    best = logits.amax(-1)
    if not bool(best.isfinite().all()):
        raise UserError(
            "the model's logits are not finite numbers: its weights are damaged, training diverged, or fp16 overflowed. "
            "Use another checkpoint or --dtype fp32."
        )
    if sampling.is_greedy:
        return logits.argmax(-1)
    probabilities = filtered_logits(logits, sampling).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
