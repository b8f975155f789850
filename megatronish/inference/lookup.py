"""Guesses of the tokens that come next, from what stands behind the same words earlier in the text.

"Prompt lookup decoding" (Saxena 2023): speculative decoding (Leviathan et al. 2023) whose draft costs nothing. A guess is
kept only where the model draws the same token, so that the text is the one it would have written without.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2  # ids that must occur again for a guess; the longest match wins


class PromptLookup:
    """Remembers where every run of 2 and 3 ids was seen last; `push` extends the text by one id."""

    def __init__(self, ids: Sequence[int], count: int) -> None:
        """count: the most ids of a guess."""
        self._count = count
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # a run -> the place behind it
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """`token` follows: from now on it is what stood behind the runs before it."""
        for length in range(SHORTEST, LONGEST + 1):
            if len(self._ids) >= length:
                self._behind[tuple(self._ids[-length:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, limit: int) -> list[int]:
        """Up to `limit` ids that may come next, empty where the last ids are new."""
        for length in range(LONGEST, SHORTEST - 1, -1):
            place = self._behind.get(tuple(self._ids[-length:]))
            if place is not None and len(self._ids) >= length:
                return self._ids[place : place + max(0, min(limit, self._count))]
        return []
