"""A lock that keeps two jobs from using the same run directory. The first rank holds it until it exits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatronish.errors import ConfigError

LOCK_FILE = ".lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # errors of file systems without locks
WAIT_SECONDS = 3.0  # for the previous process of a job that is being restarted to exit


@contextlib.contextmanager
def hold_run_dir(run_dir: Path, is_first: bool, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Lock a run directory, which is created if missing. Does nothing on ranks other than the first.

    The lock is one of the kernel (fcntl): it is released whenever the process exits, works over NFS and is not inherited by
    data loader processes. On file systems without locks, the record of the holder in the file counts while its process is
    alive. Raises ConfigError if another job holds the lock, with its process, and if the folder cannot be written.
    """
    if not is_first:
        yield
        return
    path, deadline = run_dir / LOCK_FILE, time.monotonic() + wait_seconds
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"train.save_dir {run_dir} cannot be written: {error.strerror}. Choose another --train.save_dir."
        ) from None
    try:
        while not _take(file):
            if time.monotonic() > deadline:
                raise ConfigError(_refusal(run_dir, _record(file)))
            time.sleep(0.1)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_own_record()).encode(), 0)
        yield
        os.ftruncate(file, 0)
    finally:
        os.close(file)


def _take(file: int) -> bool:
    """Whether this process now holds the lock; without locks, whether the recorded holder is gone."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in NO_LOCKS:
            return not _lives(_record(file))
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise


def _own_record() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _record(file: int) -> dict[str, Any]:
    """The record of the holder; {} if there is none."""
    try:
        content = json.loads(os.pread(file, 4096, 0))
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _lives(record: dict[str, Any]) -> bool:
    """Whether the process of a record may be alive: not if it is of this host and does not exist."""
    if not record or record == _own_record():
        return False
    if record.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(record["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return False
    except PermissionError:
        pass  # it belongs to another user
    return record.get("started") == _start_of(int(record["pid"]))


def _start_of(pid: int) -> str:
    """Start time of a process of this host in clock ticks since boot; '' if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _refusal(run_dir: Path, record: dict[str, Any]) -> str:
    holder = f"process {record['pid']} on {record['host']}" if {"pid", "host"} <= record.keys() else "another process"
    return (
        f"train.save_dir {run_dir} is in use: {holder} trains there, and two jobs would overwrite each other's checkpoints. Wait for "
        f"it, stop it, or choose another --train.save_dir. (If it is certainly gone, with its machine, remove {run_dir / LOCK_FILE}.)"
    )
