"""The error tree: every mistake a user can make ends in one of these, and the CLI prints it as one line.

Exit codes follow the class: 2 for bad input, 3 for a scenario that is valid but cannot run.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class PerfsimError(Exception):
    """Base of all errors that are the user's to fix; `exit_code` is what the CLI returns."""

    exit_code = 1


class InputError(PerfsimError):
    """Something the user wrote is wrong: an unknown key, a wrong unit, a broken file."""

    exit_code = 2


class InfeasibleError(PerfsimError):
    """The scenario is well formed but cannot run; `binding` names the constraint that kills it."""

    exit_code = 3

    def __init__(self, message: str, *, binding: str) -> None:
        super().__init__(message)
        self.binding = binding


def nearest(name: str, valid: Collection[str]) -> str:
    """`; did you mean 'x'?` for the valid name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name.lower(), [v.lower() for v in valid], n=1, cutoff=0.4)
    if not close:
        return ""
    original = next(v for v in valid if v.lower() == close[0])
    return f"; did you mean '{original}'?"
