"""The messages of the watchdog: which rank failed, where the ranks wait, and the likely cause. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatronish.launch.rank_status import RankStatus
from megatronish.launch.rendezvous import RankProcess, ranks_text

MAX_GROUPS = 8
SLOW_GAP = 0.2  # a rank is slow if its share of time in collectives is this much below the median of the others


def process_ended(process: RankProcess, statuses: Mapping[int, RankStatus]) -> str:
    """A process ended without reporting an error."""
    return _message(
        f"{process} ended without an error message{_last_seen(statuses.get(process.rank))}",
        statuses,
        {process.rank},
        "it was killed (out of memory: see `dmesg`; kill -9), it crashed (see its stack file), or its machine is down",
    )


def no_heartbeat(processes: Sequence[RankProcess], seconds: float, statuses: Mapping[int, RankStatus]) -> str:
    """No heartbeats arrive from these ranks."""
    ranks = {process.rank for process in processes}
    return _message(
        f"{_named(processes)} {'has' if len(ranks) == 1 else 'have'} sent no heartbeat for {seconds:.0f} s"
        f"{_last_seen(statuses.get(processes[0].rank))}",
        statuses,
        ranks,
        "the process is stopped (SIGSTOP, a debugger) or hangs in native code, or its machine is frozen or unreachable",
    )


def no_progress(processes: Sequence[RankProcess], seconds: float, statuses: Mapping[int, RankStatus]) -> str:
    """Heartbeats arrive from every rank, and none makes progress."""
    waiting = {rank for rank, status in statuses.items() if status.collective}
    absent = sorted(set(statuses) - waiting)
    if len(statuses) == 1:
        (rank, status), *_ = statuses.items()
        head = f"{processes[rank]} has made no progress for {seconds:.0f} s{_last_seen(status)}"
        cause = "a device, a file system or a lock that does not respond"
    elif absent and waiting:
        first = statuses[min(waiting)]
        head = (
            f"{_named([processes[rank] for rank in absent])} {'has' if len(absent) == 1 else 'have'} not reached "
            f"{first.collective} at step {first.step}, where {ranks_text(waiting)} wait{'s' if len(waiting) == 1 else ''}; "
            f"no progress for {seconds:.0f} s"
        )
        cause = "that rank waits for a file, a lock or a device, or took another branch than the others"
    elif absent:
        head = f"no rank has made progress for {seconds:.0f} s"
        cause = "devices or a file system that do not respond; on GPUs, a collective that a rank did not join"
    elif len({(status.collective, status.location) for status in statuses.values()}) > 1:
        head = f"ranks wait in different collectives, with no progress for {seconds:.0f} s"
        cause = "ranks took different branches, or one is a collective ahead of the others"
    else:
        head = f"all ranks have waited in the same collective for {seconds:.0f} s"
        cause = "the network between them, or process groups that differ between ranks"
    return _message(head, statuses, set(), cause)


def collective_failed(process: RankProcess, text: str, statuses: Mapping[int, RankStatus]) -> str:
    """Communication failed on a rank while every process is alive."""
    return _message(
        f"communication failed on {process}{_last_seen(statuses.get(process.rank))}: {text}",
        statuses,
        set(),
        "the network, or a rank that another one waited for longer than the timeout of the process group",
    )


def rank_failed(process: RankProcess, text: str, status: RankStatus | None) -> str:
    """A rank failed with an error of its own. text: its message, or a traceback."""
    when = f" at step {status.step} ({status.phase})" if status else ""
    return f"{process} failed{when}:{chr(10) if chr(10) in text else ' '}{text}"


def slow_ranks(
    processes: Sequence[RankProcess],
    before: Mapping[int, RankStatus],
    now: Mapping[int, RankStatus],
    min_samples: int,
) -> dict[int, str]:
    """Notes by rank, for ranks that spent far less time waiting in collectives than the others between two moments.

    min_samples: ranks with fewer samples in that time are left out.
    """
    shares = {}
    for rank, status in now.items():
        earlier = before.get(rank)
        samples = status.samples - (earlier.samples if earlier else 0)
        if samples >= min_samples:
            shares[rank] = (status.waits - (earlier.waits if earlier else 0)) / samples
    notes = {}
    for rank, share in shares.items():
        others = sorted(value for other, value in shares.items() if other != rank)
        if not others:
            break
        median = others[len(others) // 2]
        if median - share > SLOW_GAP:
            notes[rank] = (
                f"{processes[rank]} is slow: it waits in collectives for {share:.0%} of the time, the others for "
                f"{median:.0%}. Without it a step would take about {median - share:.0%} less time. Check what else runs on its "
                "machine."
            )
    return notes


def _named(processes: Sequence[RankProcess]) -> str:
    if len(processes) == 1:
        return str(processes[0])
    return f"{ranks_text(process.rank for process in processes)} (first: {processes[0]})"


def _last_seen(status: RankStatus | None) -> str:
    if status is None:
        return ""
    collective = f"in {status.collective}, " if status.collective else ""
    return f" (last seen {collective}{status.location or status.phase}, step {status.step}, {status.phase})"


def _message(head: str, statuses: Mapping[int, RankStatus], named: set[int], cause: str) -> str:
    """The head, where the ranks that are not `named` are, grouped, and the likely cause."""
    groups: dict[tuple[int, str, str, str], list[int]] = {}
    for rank, status in sorted(statuses.items()):
        if rank not in named:
            groups.setdefault((status.step, status.phase, status.collective, status.location), []).append(rank)
    lines = [
        f"  {ranks_text(ranks)}: step {step}, {phase}, {f'in {collective}, ' if collective else ''}{location or 'no line of Python'}"
        for (step, phase, collective, location), ranks in list(groups.items())[:MAX_GROUPS]
    ]
    if len(groups) > MAX_GROUPS:
        lines.append(f"  and {len(groups) - MAX_GROUPS} more locations")
    return "\n".join([head, *lines, f"Likely cause: {cause}."])
