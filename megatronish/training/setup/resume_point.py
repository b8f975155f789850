"""Which checkpoint a run resumes from: the first allowed one whose files are all as they were written.

Each rank reads a share of the files, so that a checkpoint is read once, whatever the number of ranks. The first rank decides,
and all ranks resume from the same checkpoint. Damaged checkpoints are reported and renamed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatronish.checkpoint.manifest import DamagedCheckpointError, FileRecord, first_few
from megatronish.checkpoint.store import DAMAGED, CheckpointStore, no_good_checkpoint, step_of
from megatronish.launch.consensus import Consensus
from megatronish.launch.rendezvous import Rendezvous
from megatronish.training.setup.preparation import Prepared, continue_from

REPORTED_BYTES = 5_000_000_000  # checking more than this takes several seconds, and is reported


def choose_resume_point(run: Prepared, rendezvous: Rendezvous) -> Prepared:
    """The run, as all ranks resume it. Raises UserError as `choose_checkpoint` and `continue_from` do."""
    chosen = choose_checkpoint(run.store, run.config.megatronish.train.resume, rendezvous)
    return run if chosen is None or chosen == run.resume_from else continue_from(run, chosen)


def choose_checkpoint(store: CheckpointStore, resume: str, rendezvous: Rendezvous) -> Path | None:
    """The checkpoint to resume from, None to start from step 0. Every rank of the rendezvous calls it.

    store: of the run; resume: see `store.wanted`. Raises ConfigError, with the faults of each, if there are checkpoints and
    none of them is good.
    """
    consensus = Consensus(rendezvous, "resume")
    wanted = [str(path) for path in store.wanted(resume)] if rendezvous.rank == 0 else []
    refused: dict[Path, list[str]] = {}
    chosen: Path | None = None
    for candidate in map(Path, consensus.agree(wanted, lambda lists: lists[0])):
        faults = consensus.agree(_faults_of_share(store, candidate, rendezvous), _merge)
        if not faults:
            chosen = candidate
            break
        refused[candidate] = faults
    consensus.leave()
    if refused and chosen is None:
        raise no_good_checkpoint(refused)
    if chosen is not None and refused and rendezvous.rank == 0:
        _report(refused, chosen, store)
    return chosen


def shares(files: Mapping[str, FileRecord], count: int) -> list[list[str]]:
    """The files divided among `count` readers: the largest first, each to the reader with the fewest bytes so far."""
    taken: list[list[str]] = [[] for _ in range(count)]
    bytes_of = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = bytes_of.index(min(bytes_of))
        taken[least].append(name)
        bytes_of[least] += files[name].bytes
    return taken


def _faults_of_share(store: CheckpointStore, candidate: Path, rendezvous: Rendezvous) -> list[str]:
    """The faults that this rank finds: of the folder, and of the contents of its share of the files."""
    try:
        manifest = store.manifest(candidate)
    except DamagedCheckpointError as error:
        return [str(error)]
    if rendezvous.rank == 0 and manifest.bytes > REPORTED_BYTES:
        print(f"checking {candidate}: {manifest.bytes / 1e9:.1f} GB", flush=True)
    return store.faults(candidate, shares(manifest.files, rendezvous.world_size)[rendezvous.rank])


def _merge(found: list[Any]) -> list[str]:
    """Each fault once, in the order of the ranks."""
    return list(dict.fromkeys(fault for faults in found for fault in faults))


def _report(refused: Mapping[Path, list[str]], chosen: Path, store: CheckpointStore) -> None:
    """On the first rank: print which checkpoints are not used, and rename the damaged ones."""
    lines = [f"WARNING: cannot resume from {path}: {first_few(faults)}" for path, faults in refused.items()]
    for path, faults in refused.items():
        if store.is_damaged(path, faults):
            store.set_aside(path)
            lines.append(f"WARNING: it is kept as {DAMAGED}{path.name}; remove it after inspection")
    lost = max(map(step_of, refused)) - step_of(chosen)
    again = f"; {lost} steps are trained again" if lost > 0 else ""
    print("\n".join([*lines, f"WARNING: resuming from {chosen} instead{again}"]), file=sys.stderr, flush=True)
