"""The one exception of the data path: input or files that the user can put right."""

from megatronish.config.errors import UserError


class DataError(UserError):
    """A problem with data that the user can fix; the message names the place, the values and the fix."""
