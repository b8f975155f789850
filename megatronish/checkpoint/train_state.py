"""The training state without tensors: counters, and the settings that the checkpoint was made with."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatronish.checkpoint.paths import STATE_FILE
from megatronish.config.run import BatchPlan, RunConfig
from megatronish.errors import ConfigError

STREAMS_FILE = "streams-rank-{:05d}.json"
# What must be unchanged for a run to resume, and what may have changed; with names for messages.
RUN = {"optimizer": "optimizer", "dtype": "training dtype", "seed": "train.seed"}
LAYOUT = {
    "data_size": "data-parallel ranks",
    "zero_stage": "ZeRO stage",
    "tensor": "tensor-parallel ranks",
    "pipeline": "pipeline stages",
    "sequence": "sequence-parallel ranks",
}


@dataclass(frozen=True)
class TrainState:
    """The state of a run after `step` optimizer steps.

    It has no random states: dropout is seeded by (seed, step, rank), the data order by (seed, sample).
    """

    step: int  # optimizer steps done
    samples: int  # samples consumed over all ranks
    tokens: int  # tokens trained on over all ranks
    best_loss: float | None  # lowest validation loss so far, nats per token
    data_size: int  # data-parallel ranks
    zero_stage: int
    optimizer: str
    dtype: str
    seed: int
    data_identity: str  # hash of the contents of the data that the samples are counted in
    data_order: dict[str, str] = field(
        default_factory=dict
    )  # settings that determine the order; empty in old checkpoints
    tensor: int = 1  # tensor-parallel ranks
    pipeline: int = 1  # pipeline stages
    sequence: int = 1  # sequence-parallel ranks
    skipped: int = 0  # steps done without an update: the learning rate's schedule does not count them
    left_out: list[list[int]] = field(default_factory=list)  # samples [first, stop) that are not trained on
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)  # finite losses of the last steps, from which spikes are detected

    @classmethod
    def start(
        cls, config: RunConfig, plan: BatchPlan, data_identity: str, data_order: dict[str, str] | None = None
    ) -> TrainState:
        """The state before the first step."""
        ds = config.deepspeed
        return cls(
            step=0,
            samples=0,
            tokens=0,
            best_loss=None,
            data_size=plan.data_size,
            zero_stage=ds.zero_optimization.stage,
            optimizer=ds.optimizer.type,
            dtype=ds.dtype,
            seed=config.megatronish.train.seed,
            data_identity=data_identity,
            tensor=config.megatronish.parallel.tensor,
            pipeline=config.megatronish.parallel.pipeline,
            sequence=config.megatronish.parallel.sequence,
            data_order=data_order or {},
        )

    def advance(self, samples: int, tokens: int, updated: bool = True) -> TrainState:
        """The state one step later; without an update its samples are skipped and its tokens not counted."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + (tokens if updated else 0),
            skipped=self.skipped + (not updated),
        )

    def leaves_out(self, samples: int) -> bool:
        """Whether any of the next `samples` samples is to be left out, and with it their step."""
        return any(first < self.samples + samples and self.samples < stop for first, stop in self.left_out)

    def save(self, folder: Path) -> None:
        """Write folder/state.json."""
        (folder / STATE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TrainState:
        """Read folder/state.json. Raises ConfigError if it is missing or invalid."""
        path = folder / STATE_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            # Older files have one more word in the name of this setting.
            order = {
                re.sub(r"^samples of the \w+ run$", "samples of the run", name): value
                for name, value in raw.get("data_order", {}).items()
            }
            return cls(
                **{item.name: raw[item.name] for item in fields(cls) if item.name in raw} | {"data_order": order}
            )
        except FileNotFoundError:
            raise ConfigError(f"{folder}: no {STATE_FILE}; this is not a checkpoint of megatronish.") from None
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: cannot be read ({error!r}); use an older checkpoint.") from None

    def continue_as(self, fresh: TrainState, where: Path, *, moves: bool) -> TrainState:
        """This state in the layout of `fresh`, the state that the run would start with.

        moves: whether another layout can load the optimizer state of the checkpoint `where`. Raises ConfigError, with both
        values and the fix, for another layout if not, and always for another optimizer, dtype, seed or dataset.
        """
        for name, words in (*(() if moves else LAYOUT.items()), *RUN.items()):
            saved, now = getattr(self, name), getattr(fresh, name)
            if saved != now:
                why = "" if name in RUN else ", and its optimizer state cannot be moved to another layout"
                raise ConfigError(
                    f"{where} was saved with {words} {saved}, this run has {now}{why}. Start with {saved} to continue it, "
                    "or begin afresh with --train.resume never and another --train.save_dir."
                )
        self._check_data(fresh, where)
        return replace(self, **{name: getattr(fresh, name) for name in LAYOUT})

    def moved(self, fresh: TrainState) -> str:
        """The differences between the layout of this state and that of `fresh`; '' if there are none."""
        return ", ".join(
            f"{words} {getattr(self, name)} -> {getattr(fresh, name)}"
            for name, words in LAYOUT.items()
            if getattr(self, name) != getattr(fresh, name)
        )

    def _check_data(self, fresh: TrainState, where: Path) -> None:
        if self.data_identity != fresh.data_identity:
            raise ConfigError(
                f"{where} was saved on another dataset (SHA-256 {self.data_identity[:12]}..., this run reads "
                f"{fresh.data_identity[:12]}...): another --data.path, or files that were replaced under the same one. Give the old "
                "data to continue it, or begin afresh with --train.resume never and another --train.save_dir."
            )
        differing = [
            f"{name} {self.data_order.get(name, 'not set')} (this run: {fresh.data_order.get(name, 'not set')})"
            for name in {**self.data_order, **fresh.data_order}
            if self.data_order.get(name) != fresh.data_order.get(name)
        ]
        if self.data_order and differing:
            raise ConfigError(
                f"{where} counted its samples in another order: {', '.join(differing)}. Set that back to continue it, or begin "
                "afresh with --train.resume never and another --train.save_dir."
            )


def save_streams(folder: Path, rank: int, states: dict[str, Any] | None) -> None:
    """Write the positions of a data-parallel rank in streamed text, if there is any."""
    if states is not None:
        path = folder / STREAMS_FILE.format(rank)
        path.write_text(json.dumps(states, separators=(",", ":")) + "\n", encoding="utf-8")


def load_streams(folder: Path, rank: int) -> dict[str, Any] | None:
    """What `save_streams` wrote, or None. Raises ConfigError if it cannot be read."""
    path = folder / STREAMS_FILE.format(rank)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error!r}); use an older checkpoint.") from None
