"""Speculative decoding by prompt lookup: draft tokens copied from an earlier occurrence of the last n-gram.

"Prompt lookup decoding" (Saxena 2023) is speculative decoding (Leviathan et al. 2023) without a draft model. A draft token
is accepted only where the model samples the same token, so the output is the same as without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2  # lengths of the n-grams; the longest match wins


class PromptLookup:
    """Maps each n-gram of 2 and 3 ids to the position after its last occurrence; `push` appends an id to the text."""

    def __init__(self, ids: Sequence[int], count: int) -> None:
        """count: maximum number of draft tokens."""
        self._count = count
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> index of the id that followed it
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Append `token`, which becomes the continuation of the n-grams that precede it."""
        for length in range(SHORTEST, LONGEST + 1):
            if len(self._ids) >= length:
                self._next[tuple(self._ids[-length:])] = len(self._ids)
        self._ids.append(token)

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` draft tokens; none where the last n-gram is new."""
        for length in range(LONGEST, SHORTEST - 1, -1):
            index = self._next.get(tuple(self._ids[-length:]))
            if index is not None and len(self._ids) >= length:
                return self._ids[index : index + max(0, min(limit, self._count))]
        return []
