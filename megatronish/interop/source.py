"""What the tools that hand a model on share: which folder a path means, and what is wrong with it in words for its user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatronish.checkpoint.store import CheckpointStore
from megatronish.checkpoint.weights import CONFIG_FILE
from megatronish.errors import UserError


def model_folder(path: Path, which: str) -> Path:
    """The folder of a model: an imported one itself, of a run its checkpoint `which` ("latest" or "best").

    Raises ConfigError where there is none.
    """
    return path if (path / CONFIG_FILE).is_file() else CheckpointStore.find(path, which)


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """What checkpoint/weights.py says of files that do not fit (ValueError) ends a tool as a mistake of its user's."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
