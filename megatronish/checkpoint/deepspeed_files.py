"""The files that DeepSpeed writes and reads itself, where it alone knows their layout: Muon's state, and what is on NVMe.

They are torch's pickles. Only tensors, plain containers and the few classes that DeepSpeed keeps its own state in are made
from them: a file that names anything else, such as a function to call, is refused and nothing of it runs.
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
    """How to make a member again: its class called with its value."""
    return type(member), (member.value,)


class DeepSpeedFiles:
    """Stands in for DeepSpeed's checkpoint engine, whose methods these are.

    classes: those that may be made besides torch's own. `written` lists the files since it was cleared. An error of the disk is
    kept in `error` and not raised: the ranks still have collectives to call together when one of them fails.
    """

    name = "DeepSpeedFiles"

    def __init__(self, classes: Sequence[Callable[..., Any]]) -> None:
        self._classes: list[Any] = list(classes)
        # By themselves enums of Python 3.11.0 to 3.11.3 are pickled as a call of `getattr`, which is refused at reading.
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
        """What `save` wrote. Raises ConfigError for a file that asks for any other class or function, or is torn."""
        try:
            with torch.serialization.safe_globals(self._classes):
                return torch.load(path, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            told = str(error).strip().splitlines()
            raise ConfigError(
                f"{path} was refused: it is torn, or holds what no checkpoint of megatronish does, which might run code "
                f"({' '.join(told[-3:])[:300]}). Use a checkpoint of your own."
            ) from None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def create(self, info: Any) -> None:
        """Nothing: the folder is made by others."""

    def commit(self, info: Any) -> bool:
        """Nothing: the checkpoint is committed by its manifest."""
        return True

    def is_decoupled(self) -> bool:
        """Whether files are written later."""
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this data-parallel rank writes what all of them hold."""
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        """Whether a view is written with all of the tensor that it is one of."""
        return True
