"""`verify`'s ranks for tests, which may not compile in a fork."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megatronish.verify import ranks


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, group: bool = True) -> list[Any]:
    """``megatronish.verify.ranks.run_ranks`` in forks, which inherit what a test has patched and must not use torch.compile."""
    return ranks.run_ranks(world_size, _without_compiling, function, args, group=group, fork=True)


def _without_compiling(rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    graphs = _compiled_graphs()
    result = function(rank, *args)
    assert _compiled_graphs() == graphs, "a forked rank used torch.compile, whose workers may hang in a fork"
    return result


def _compiled_graphs() -> int:
    """The number of graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0
