"""Which checkpoint a run goes on from: the first of those it may whose every file is as it was written.

The ranks read the files together, each its share, so that a checkpoint is read once, however many ranks and machines there
are; the first rank decides, and all go on from the same one. One that is damaged is said so and set aside.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatronish.checkpoint.manifest import (
    DamagedCheckpointError,
    FileRecord,
    certainly_damaged,
    content_faults,
    listed,
    read_manifest,
    size_faults,
)
from megatronish.checkpoint.store import DAMAGED, CheckpointStore, none_good, step_of
from megatronish.launch.consensus import Consensus
from megatronish.launch.rendezvous import Rendezvous
from megatronish.training.setup.preparation import Prepared, continue_from

TELL_BYTES = 5_000_000_000  # more than these take several seconds to read


def choose_resume_point(run: Prepared, rendezvous: Rendezvous) -> Prepared:
    """The run as every rank of the rendezvous goes on with it. Raises UserError as `choose_checkpoint` and `continue_from` do."""
    train = run.config.megatronish.train
    chosen = choose_checkpoint(CheckpointStore(run.run_dir, train.keep_last), train.resume, rendezvous)
    return run if chosen is None or chosen == run.resume_from else continue_from(run, chosen)


def choose_checkpoint(store: CheckpointStore, resume: str, rendezvous: Rendezvous) -> Path | None:
    """The checkpoint to go on from, None to begin afresh. Every rank of the rendezvous calls it; store: of the run.

    resume: as `store.wanted` takes it. Raises ConfigError, with every checkpoint and what is wrong with it, when there are
    some and none is good.
    """
    consensus = Consensus(rendezvous, "resume")
    wanted = [str(path) for path in store.wanted(resume)] if rendezvous.rank == 0 else []
    refused: dict[str, list[str]] = {}
    chosen: Path | None = None
    for candidate in map(Path, consensus.agree(wanted, lambda lists: lists[0])):
        faults = consensus.agree(_own_share(candidate, rendezvous), _join)
        if not faults:
            chosen = candidate
            break
        refused[str(candidate)] = faults
    consensus.leave()
    if refused and chosen is None:
        raise none_good(refused)
    if chosen is not None and refused and rendezvous.rank == 0:
        _tell(refused, chosen, store)
    return chosen


def shares(files: Mapping[str, FileRecord], count: int) -> list[list[str]]:
    """The files divided among `count` readers: the largest first, each to the one with the fewest bytes so far."""
    taken: list[list[str]] = [[] for _ in range(count)]
    bytes_of = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        least = bytes_of.index(min(bytes_of))
        taken[least].append(name)
        bytes_of[least] += files[name].bytes
    return taken


def _own_share(candidate: Path, rendezvous: Rendezvous) -> list[str]:
    """What this rank finds wrong: with the folder, and in the files of its share."""
    try:
        manifest = read_manifest(candidate)
    except DamagedCheckpointError as error:
        return [str(error)]
    faults = size_faults(candidate, manifest)
    if not faults and rendezvous.rank == 0 and manifest.bytes > TELL_BYTES:
        print(f"checking {candidate}: {manifest.bytes / 1e9:.1f} GB", flush=True)
    return faults or content_faults(candidate, manifest, shares(manifest.files, rendezvous.world_size)[rendezvous.rank])


def _join(found: list[Any]) -> list[str]:
    """Each fault once, in the order of the ranks."""
    return list(dict.fromkeys(fault for faults in found for fault in faults))


def _tell(refused: Mapping[str, list[str]], chosen: Path, store: CheckpointStore) -> None:
    """On the first rank: say loudly what is lost, and set aside what is damaged."""
    lines = [f"WARNING: {path} cannot be gone on from: {listed(faults)}" for path, faults in refused.items()]
    for path in map(Path, refused):
        if certainly_damaged(path, refused[str(path)]):
            store.set_aside(path)
            lines.append(f"WARNING: it is kept as {DAMAGED}{path.name}; remove that when you have looked at it")
    lost = max(step_of(Path(path)) for path in refused) - step_of(chosen)
    again = f"; {lost} steps are trained again" if lost > 0 else ""
    print("\n".join([*lines, f"WARNING: going on from {chosen} instead{again}"]), file=sys.stderr, flush=True)
