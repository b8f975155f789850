"""The files that DeepSpeed itself writes and reads, whose layout only it knows: Muon's state, and state on NVMe.

They are pickled by torch. Loading creates only tensors, plain containers and the few classes of DeepSpeed's own state: a file
that names anything else, such as a function to call, is refused, and none of its code runs.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from megatronish.errors import ConfigError


def _by_value(member: Enum) -> tuple[type[Enum], tuple[Any]]:
    """Pickle a member as a call of its class with its value."""
    return type(member), (member.value,)


class DeepSpeedFiles:
    """A checkpoint engine for DeepSpeed, with the interface of its own.

    classes: those that may be loaded in addition to torch's own. `written` lists the files since it was cleared. Disk errors
    are kept in `error` and not raised, because the other ranks still wait for this one in collectives.
    """

    name = "DeepSpeedFiles"

    def __init__(self, classes: Sequence[Callable[..., Any]]) -> None:
        self._classes: list[Any] = list(classes)
        # Python 3.11.0 to 3.11.3 pickle enums as a call of `getattr`, which is refused when the file is loaded.
        for each in self._classes:
            if isinstance(each, type) and issubclass(each, Enum):
                copyreg.pickle(each, _by_value)
        self.written: list[Path] = []
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file."""
        try:
            torch.save(state_dict, path)
            self.written.append(Path(path))
        except OSError as error:
            self.error = self.error or error
        except RuntimeError as error:  # of torch's zip writer, when the disk is full
            self.error = self.error or OSError(f"{path}: {error}")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load a file that `save` wrote. Raises ConfigError if it names any other class or function, or is truncated."""
        try:
            with torch.serialization.safe_globals(self._classes):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            lines = str(error).strip().splitlines()
            raise ConfigError(
                f"{path} was refused: it is damaged, or holds objects that no checkpoint of megatronish has and that might run code "
                f"({' '.join(lines[-3:])[:300]}). Use a checkpoint of your own."
            ) from None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def create(self, info: Any) -> None:
        """Do nothing: the folder exists already."""

    def commit(self, info: Any) -> bool:
        """Do nothing: the checkpoint is committed by its manifest."""
        return True

    def is_decoupled(self) -> bool:
        """Whether files are written in the background."""
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this data-parallel rank writes the replicated state."""
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        """Whether a view is written with the full tensor that it belongs to."""
        return True
