"""Versions of an engine: how they are written, which is older, and which of those that were timed stands for one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from perfsim.spec.problems import describe

_VERSION = re.compile(r"v?\d{1,6}(\.\d{1,6}){0,5}([-.+]?[A-Za-z][\w.+-]{0,60})?\Z")


def checked(value: Any) -> Any:
    """The version as it was written; ValueError for anything else.

    A bare 0.20 is a number in YAML, the same as 0.2, so that a version has to be text.
    """
    if isinstance(value, bool | int | float):
        raise ValueError(f"expected a version in quotes such as '0.19.0', got the number {describe(value)}")
    if not isinstance(value, str) or not _VERSION.match(value):
        raise ValueError(f"expected a version such as '0.19.0', got {describe(value)}")
    return value


EngineVersion = Annotated[
    str, BeforeValidator(checked), Field(description="version of the engine, such as '0.19.0'; left out: the newest")
]


def age(version: str) -> tuple[int, ...]:
    """The numbers a version begins with, so that 0.5.14 is newer than 0.5.9; 1.3.0rc20 is 1.3.0, and 0.19 is 0.19.0."""
    found = re.match(r"v?((\d+)(\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def standing_for(asked: str | None, known: Iterable[str]) -> str:
    """Of the versions in `known`, the one whose kernels an engine of version `asked` is taken to run.

    The newest that is not newer; where all are newer, the oldest. Without a version the newest.
    """
    ordered = sorted(known, key=age)
    if asked is None:
        return ordered[-1]
    return next((version for version in reversed(ordered) if age(version) <= age(asked)), ordered[0])
