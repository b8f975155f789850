"""What the user has to mend, and how a program ends on it. Apart from the models: pydantic costs a tool a tenth of a second."""

from __future__ import annotations

import contextlib
import difflib
import sys
import time
from collections.abc import Iterable, Iterator

OTHER_RANK_DELAY_SECONDS = 10.0  # launchers end the other ranks within 3 s of the first one's end


class UserError(ValueError):
    """Something the user has to mend; its text is the whole message, so launchers print it without a traceback."""


class ConfigError(UserError):
    """A run description the user has to mend."""


class DataError(UserError):
    """A problem with data that the user can fix; the message names the place, the values and the fix."""


@contextlib.contextmanager
def exit_on_user_error(is_first: bool = True, name: str = "") -> Iterator[None]:
    """End the program on a UserError: its text on stderr, exit status 2, no traceback.

    The first rank speaks for all: another, called `name`, says its error only if the launcher has not ended it
    OTHER_RANK_DELAY_SECONDS later, for then the first rank has not met with that error. Ctrl-C ends it with status 130, as a shell does.
    """
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            print("\nstopped by Ctrl-C; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        sys.exit(130)
    except UserError as error:
        if is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(OTHER_RANK_DELAY_SECONDS)
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest known name, or '' when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""
