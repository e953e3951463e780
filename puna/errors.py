"""What goes wrong for a user, said so that the conversation can end there.

Every error of ours says what happened, names the value, says what is accepted, and gives the next step after
`hint:`. The command line prints exactly that, without a traceback, and exits with `exit_code`.
"""

import reprlib

_CROPPED = reprlib.Repr()
_CROPPED.maxstring = _CROPPED.maxother = _CROPPED.maxlong = 100


def shown(value: object) -> str:
    """What a stranger's file holds, for a message: cropped, control characters escaped."""
    return _CROPPED.repr(value)


class PunaError(Exception):
    """A mistake or a condition that the user can act upon.

    `message` says what happened and shows the value; `hint` is the next step.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(PunaError):
    """A setting is unknown, has the wrong type, or breaks a rule."""

    exit_code = 2


class ArtifactError(PunaError):
    """A directory is not the artifact that was asked for, or is damaged, or belongs to another configuration."""

    exit_code = 3


class DataError(PunaError):
    """The user's data cannot be used as it is."""

    exit_code = 4


class BusyError(PunaError):
    """So many requests wait that no more are taken; the same one may be sent again later."""

    exit_code = 6


class MissingExtra(PunaError):
    """A library that only some features need is not installed."""

    exit_code = 5

    def __init__(self, module: str, extra: str):
        super().__init__(
            f"this feature needs the Python package {module!r}, which is not installed",
            hint=f'pip install "puna[{extra}]"',
        )
