"""Which documents train, validate and test: a pure function of their number and the fractions."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np

from megatronish.data.samples.permutation import keyed_permutation
from megatronish.errors import DataError


@dataclass(frozen=True)
class Split:
    """Document numbers of each part, int64, increasing and disjoint."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_documents(
    num_documents: int, validation_fraction: float, test_fraction: float = 0.0, salt: str = "validation"
) -> Split:
    """Documents drawn for validation and test by a fixed permutation of their numbers.

    Each gets the nearest number of documents, but at least one where its fraction is above 0, as long as
    training keeps one. The documents for validation do not depend on the test fraction, and a smaller fraction's are
    among those of a larger one. Raises ValueError unless 0 <= validation + test < 1.
    """
    fractions = (validation_fraction, test_fraction)
    if not (all(0.0 <= fraction < 1.0 for fraction in fractions) and sum(fractions) < 1.0):
        raise ValueError(
            f"validation fraction {validation_fraction} and test fraction {test_fraction} must be at least 0 and together below 1"
        )
    everything, nothing = np.arange(num_documents, dtype=np.int64), np.empty(0, dtype=np.int64)
    counts: list[int] = []
    for fraction in fractions:
        room = num_documents - 1 - sum(counts)
        wanted = max(1, round(num_documents * fraction)) if fraction > 0.0 else 0
        counts.append(max(0, min(wanted, room)))
    if not any(counts):
        return Split(everything, nothing, nothing)
    order = keyed_permutation(num_documents, "split", salt)
    validation, test, train = np.split(order, np.cumsum(counts))
    return Split(np.sort(train), np.sort(validation), np.sort(test))


def split_in_order(num_documents: int, ratios: str) -> Split:
    """Megatron's split: "969,30,1" gives the first 96.9 % of the documents to training, the next 3 % to validation.

    Ratios are of train, validation and test; what is not named is 0. Bounds are rounded as megatron-core rounds them
    (`BlendedMegatronDatasetConfig.split`). Raises DataError for any other text.
    """
    fields = ratios.split(",")
    numbers = [float(field) for field in fields if re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", field)]
    if len(numbers) != len(fields) or len(numbers) > 3 or not numbers[0] > 0 or not math.isfinite(sum(numbers)):
        raise DataError(
            f'data.split is "{ratios}"; write the shares of training, validation and test documents, such as "969,30,1"'
        )
    numbers += [0.0] * (3 - len(numbers))
    shares = (np.array(numbers) / np.sum(np.array(numbers))).tolist()
    bounds, total = [0], 0.0
    for share in shares:
        total = total + share
        bounds.append(round(total * float(num_documents)))
    parts = [np.arange(begin, max(begin, end), dtype=np.int64) for begin, end in itertools.pairwise(bounds)]
    return Split(*parts)
