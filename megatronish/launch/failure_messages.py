"""What is said when ranks have stopped working together: who, where, and the likely cause. Pure functions of what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatronish.launch.rank_status import Standing
from megatronish.launch.rendezvous import Place, ranks_text

MOST_GROUPS = 8
SLOW_GAP = 0.2  # of the time: how much less than the others a slow rank waits


def ended(place: Place, standings: Mapping[int, Standing]) -> str:
    """A rank's process is gone without a word."""
    return _message(
        f"{place} has ended without a word{_at(standings.get(place.rank))}",
        standings,
        {place.rank},
        "it was killed (out of memory: see `dmesg`; kill -9), it crashed (its stack file says where), or its machine is gone",
    )


def silent(places: Sequence[Place], seconds: float, standings: Mapping[int, Standing]) -> str:
    """Ranks whose heartbeats have stopped."""
    ranks = {place.rank for place in places}
    who = str(places[0]) if len(places) == 1 else f"{ranks_text(ranks)}, first {places[0]},"
    verb = "has" if len(places) == 1 else "have"
    return _message(
        f"{who} {verb} sent no heartbeat for {seconds:.0f} s{_at(standings.get(places[0].rank))}",
        standings,
        ranks,
        "the process is stopped (SIGSTOP, a debugger) or hangs in native code, or its machine is frozen or cut off",
    )


def stuck(places: Sequence[Place], seconds: float, standings: Mapping[int, Standing]) -> str:
    """Every rank answers and none has moved."""
    waiting = {rank for rank, standing in standings.items() if standing.collective}
    absent = sorted(set(standings) - waiting)
    if len(standings) == 1:
        (rank, standing), *_ = standings.items()
        head = f"{places[rank]} has not moved for {seconds:.0f} s{_at(standing)}"
        cause = "a device, a file system or a lock that does not answer"
    elif absent and waiting:
        first = standings[min(waiting)]
        who = str(places[absent[0]]) if len(absent) == 1 else f"{ranks_text(absent)}, first {places[absent[0]]},"
        verb = "has" if len(absent) == 1 else "have"
        head = (
            f"{who} {verb} not come to {first.collective} at step {first.step}, where {ranks_text(waiting)} "
            f"wait{'s' if len(waiting) == 1 else ''}; nothing has moved for {seconds:.0f} s"
        )
        cause = "that rank waits for a file, a lock or a device, or took another branch than the others"
    elif absent:
        head = f"no rank has moved for {seconds:.0f} s"
        cause = "devices or a file system that do not answer; on GPUs, a collective that a rank did not join"
    elif len({(standing.collective, standing.place) for standing in standings.values()}) > 1:
        head = f"ranks wait in different collectives, and nothing has moved for {seconds:.0f} s"
        cause = "ranks took different branches, or one is a collective ahead of the others"
    else:
        head = f"all ranks are in the same collective, and it has not ended for {seconds:.0f} s"
        cause = "the network between them, or groups that differ from rank to rank"
    return _message(head, standings, set(), cause)


def collective_failed(place: Place, text: str, standings: Mapping[int, Standing]) -> str:
    """Communication failed on a rank while every process lives."""
    return _message(
        f"communication failed on {place}{_at(standings.get(place.rank))}: {text}",
        standings,
        set(),
        "the network, or a rank that another one waited for longer than the process group allows",
    )


def failed(place: Place, text: str, standing: Standing | None) -> str:
    """A rank ended with an error of its own: a message, or a traceback."""
    when = f" at step {standing.step} ({standing.phase})" if standing else ""
    return f"{place} failed{when}:{chr(10) if chr(10) in text else ' '}{text}"


def slow(
    places: Sequence[Place], before: Mapping[int, Standing], now: Mapping[int, Standing], enough: int
) -> dict[int, str]:
    """Notes on slow ranks: those that wait in collectives far less than the others wait, between two moments.

    enough: samples of each rank that a judgement needs.
    """
    shares = {}
    for rank, standing in now.items():
        earlier = before.get(rank)
        samples = standing.samples - (earlier.samples if earlier else 0)
        if samples >= enough:
            shares[rank] = (standing.waits - (earlier.waits if earlier else 0)) / samples
    notes = {}
    for rank, share in shares.items():
        others = sorted(value for other, value in shares.items() if other != rank)
        if not others:
            break
        usual = others[len(others) // 2]
        if usual - share > SLOW_GAP:
            notes[rank] = (
                f"{places[rank]} is slow: it waits for others {share:.0%} of the time, they wait {usual:.0%} of theirs. "
                f"Without it a step would take about {usual - share:.0%} less. Is something else running on its machine?"
            )
    return notes


def _at(standing: Standing | None) -> str:
    if standing is None:
        return ""
    where = f"in {standing.collective}, " if standing.collective else ""
    return f" (last seen {where}{standing.place or standing.phase}, step {standing.step}, {standing.phase})"


def _message(head: str, standings: Mapping[int, Standing], named: set[int], cause: str) -> str:
    """The head, then where the other ranks stand, equal ones together, then the likely cause."""
    groups: dict[tuple[int, str, str, str], list[int]] = {}
    for rank, standing in sorted(standings.items()):
        if rank not in named:
            groups.setdefault((standing.step, standing.phase, standing.collective, standing.place), []).append(rank)
    lines = [
        f"  {ranks_text(ranks)}: step {step}, {phase}, {f'in {collective}, ' if collective else ''}{place or 'no line of ours'}"
        for (step, phase, collective, place), ranks in list(groups.items())[:MOST_GROUPS]
    ]
    if len(groups) > MOST_GROUPS:
        lines.append(f"  and {len(groups) - MOST_GROUPS} more places")
    return "\n".join([head, *lines, f"Likely cause: {cause}."])
