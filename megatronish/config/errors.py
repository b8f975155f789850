"""What the user has to mend. Apart from the models: importing pydantic costs a tool of a second a tenth of it."""


class UserError(ValueError):
    """Something the user has to mend; its text is the whole message, so launchers print it without a traceback."""


class ConfigError(UserError):
    """A run description the user has to mend."""
