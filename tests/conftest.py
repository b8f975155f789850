"""Initializes the test process as a launcher does, before torch is imported, and runs fast tests first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))  # built by make install

import pytest
from hypothesis import settings

from megatronish.launch.process import has_gpu, tune_allocator

if not has_gpu():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
tune_allocator()
settings.register_profile("same every time", derandomize=True)  # --hypothesis-profile default looks for new cases
settings.load_profile("same every time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests, then tests of several processes, then slow ones."""

    def cost(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("slow") else 1 if item.get_closest_marker("distributed") else 0

    items.sort(key=cost)


@pytest.fixture(autouse=True)
def _sigpipe_as_python_starts() -> Iterator[None]:
    """Programs that write for `| head` give SIGPIPE its default action; ranks forked by later tests would die of it."""
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)
