"""Errors that the user can fix, and how a program exits on one. Separate from config/, whose pydantic takes 0.1 s to import."""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Iterable, Iterator

OTHER_RANK_DELAY_SECONDS = 10.0  # launchers end the other ranks within 3 s after the first one exits


class UserError(ValueError):
    """An error that the user can fix. Its text is the complete message, so launchers print it without a traceback."""


class ConfigError(UserError):
    """An invalid run configuration."""


class DataError(UserError):
    """A problem with data; the message names the location, the values and the fix."""


@contextlib.contextmanager
def exit_on_user_error(is_first: bool = True, name: str = "") -> Iterator[None]:
    """Exit with status 2 on a UserError, and print its text to stderr without a traceback.

    The first rank prints it at once. Another rank, called `name`, waits OTHER_RANK_DELAY_SECONDS and prints its error only
    if the launcher has not ended it by then: in that case the first rank has not met the same error. Ctrl-C exits with
    status 130, as in a shell.
    """
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            print("\nstopped by Ctrl-C; the same command resumes from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)
    except UserError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(OTHER_RANK_DELAY_SECONDS)
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the closest known name, or '' if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
