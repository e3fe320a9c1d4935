"""Figures in hand-written text, taken from the results of sections so that they do not go stale.

`{section > key > key}` is the number at that place of `results/section.json`, `{calibration/network > median}` one of a
file of coefficients. In a list, a key `name=x`, or `name=x, kind=y`, chooses the entry with these values. Shares are
shown as percent, those called `bias` with their sign, whole numbers as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from perfsim.errors import InputError, nearest
from validation.report.markdown import percent

_PLACE = re.compile(r"\{([^{}\n]*)\}")
SEPARATOR = " > "


def filled(text: str, everything: Mapping[str, Any], *, source: str) -> str:
    """The text with its figures; InputError naming `source` and the line for a place that no results have."""

    def figure(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.start()) + 1
        return _shown(found[1], everything, where=f"{source}, line {line}: {{{found[1]}}}")

    return _PLACE.sub(figure, text)


def _shown(place: str, everything: Mapping[str, Any], *, where: str) -> str:
    value: Any = everything
    keys = place.split(SEPARATOR)
    for key in keys:
        value = _at(value, key, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        below = _names(value)
        more = f"; it goes on with {', '.join(below[:8])}" if below else ""
        raise InputError(f"{where}: expected a number there{more}")
    return f"{value:,}" if isinstance(value, int) else percent(value, sign=keys[-1] == "bias")


def _at(value: Any, key: str, where: str) -> Any:
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(value, list):
        wanted = dict(part.partition("=")[::2] for part in key.split(", "))
        chosen = [one for one in value if all(str(one.get(name)) == text for name, text in wanted.items())]
        if len(chosen) == 1:
            return chosen[0]
        raise InputError(f"{where}: expected one entry with {key}, found {len(chosen)}")
    raise InputError(f"{where}: nothing called '{key}'{nearest(key, _names(value))}")


def _names(value: Any) -> list[str]:
    return [str(name) for name in value] if isinstance(value, Mapping) else []
