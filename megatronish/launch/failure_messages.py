"""What is said when ranks have stopped working together: who, where, and the likely cause. Pure functions of what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatronish.launch.rank_status import RankStatus
from megatronish.launch.rendezvous import RankProcess, ranks_text

MOST_GROUPS = 8
SLOW_GAP = 0.2  # of the time: how much less than the others a slow rank waits


def process_ended(place: RankProcess, rank_statuses: Mapping[int, RankStatus]) -> str:
    """A rank's process is gone without a word."""
    return _message(
        f"{place} has ended without a word{_at(rank_statuses.get(place.rank))}",
        rank_statuses,
        {place.rank},
        "it was killed (out of memory: see `dmesg`; kill -9), it crashed (its stack file says where), or its machine is gone",
    )


def no_heartbeat(processes: Sequence[RankProcess], seconds: float, rank_statuses: Mapping[int, RankStatus]) -> str:
    """Ranks whose heartbeats have stopped."""
    ranks = {place.rank for place in processes}
    who = str(processes[0]) if len(processes) == 1 else f"{ranks_text(ranks)}, first {processes[0]},"
    verb = "has" if len(processes) == 1 else "have"
    return _message(
        f"{who} {verb} sent no heartbeat for {seconds:.0f} s{_at(rank_statuses.get(processes[0].rank))}",
        rank_statuses,
        ranks,
        "the process is stopped (SIGSTOP, a debugger) or hangs in native code, or its machine is frozen or cut off",
    )


def no_progress(processes: Sequence[RankProcess], seconds: float, rank_statuses: Mapping[int, RankStatus]) -> str:
    """Every rank answers and none has moved."""
    waiting = {rank for rank, rank_status in rank_statuses.items() if rank_status.collective}
    absent = sorted(set(rank_statuses) - waiting)
    if len(rank_statuses) == 1:
        (rank, rank_status), *_ = rank_statuses.items()
        head = f"{processes[rank]} has not moved for {seconds:.0f} s{_at(rank_status)}"
        cause = "a device, a file system or a lock that does not answer"
    elif absent and waiting:
        first = rank_statuses[min(waiting)]
        who = str(processes[absent[0]]) if len(absent) == 1 else f"{ranks_text(absent)}, first {processes[absent[0]]},"
        verb = "has" if len(absent) == 1 else "have"
        head = (
            f"{who} {verb} not come to {first.collective} at step {first.step}, where {ranks_text(waiting)} "
            f"wait{'s' if len(waiting) == 1 else ''}; nothing has moved for {seconds:.0f} s"
        )
        cause = "that rank waits for a file, a lock or a device, or took another branch than the others"
    elif absent:
        head = f"no rank has moved for {seconds:.0f} s"
        cause = "devices or a file system that do not answer; on GPUs, a collective that a rank did not join"
    elif len({(rank_status.collective, rank_status.place) for rank_status in rank_statuses.values()}) > 1:
        head = f"ranks wait in different collectives, and nothing has moved for {seconds:.0f} s"
        cause = "ranks took different branches, or one is a collective ahead of the others"
    else:
        head = f"all ranks are in the same collective, and it has not ended for {seconds:.0f} s"
        cause = "the network between them, or groups that differ from rank to rank"
    return _message(head, rank_statuses, set(), cause)


def collective_failed(place: RankProcess, text: str, rank_statuses: Mapping[int, RankStatus]) -> str:
    """Communication failed on a rank while every process lives."""
    return _message(
        f"communication failed on {place}{_at(rank_statuses.get(place.rank))}: {text}",
        rank_statuses,
        set(),
        "the network, or a rank that another one waited for longer than the process group allows",
    )


def rank_failed(place: RankProcess, text: str, rank_status: RankStatus | None) -> str:
    """A rank ended with an error of its own: a message, or a traceback."""
    when = f" at step {rank_status.step} ({rank_status.phase})" if rank_status else ""
    return f"{place} failed{when}:{chr(10) if chr(10) in text else ' '}{text}"


def slow_ranks(
    processes: Sequence[RankProcess], before: Mapping[int, RankStatus], now: Mapping[int, RankStatus], enough: int
) -> dict[int, str]:
    """Notes on slow ranks: those that wait in collectives far less than the others wait, between two moments.

    enough: samples of each rank that a judgement needs.
    """
    shares = {}
    for rank, rank_status in now.items():
        earlier = before.get(rank)
        samples = rank_status.samples - (earlier.samples if earlier else 0)
        if samples >= enough:
            shares[rank] = (rank_status.waits - (earlier.waits if earlier else 0)) / samples
    notes = {}
    for rank, share in shares.items():
        others = sorted(value for other, value in shares.items() if other != rank)
        if not others:
            break
        usual = others[len(others) // 2]
        if usual - share > SLOW_GAP:
            notes[rank] = (
                f"{processes[rank]} is slow: it waits for others {share:.0%} of the time, they wait {usual:.0%} of theirs. "
                f"Without it a step would take about {usual - share:.0%} less. Is something else running on its machine?"
            )
    return notes


def _at(rank_status: RankStatus | None) -> str:
    if rank_status is None:
        return ""
    where = f"in {rank_status.collective}, " if rank_status.collective else ""
    return f" (last seen {where}{rank_status.place or rank_status.phase}, step {rank_status.step}, {rank_status.phase})"


def _message(head: str, rank_statuses: Mapping[int, RankStatus], named: set[int], cause: str) -> str:
    """The head, then where the other ranks stand, equal ones together, then the likely cause."""
    groups: dict[tuple[int, str, str, str], list[int]] = {}
    for rank, rank_status in sorted(rank_statuses.items()):
        if rank not in named:
            groups.setdefault(
                (rank_status.step, rank_status.phase, rank_status.collective, rank_status.place), []
            ).append(rank)
    lines = [
        f"  {ranks_text(ranks)}: step {step}, {phase}, {f'in {collective}, ' if collective else ''}{place or 'no line of ours'}"
        for (step, phase, collective, place), ranks in list(groups.items())[:MOST_GROUPS]
    ]
    if len(groups) > MOST_GROUPS:
        lines.append(f"  and {len(groups) - MOST_GROUPS} more processes")
    return "\n".join([head, *lines, f"Likely cause: {cause}."])
