"""Names of sessions and adapters in a trace, whole numbers or text, as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from perfsim.errors import InputError
from perfsim.traffic.chunk import Ints
from perfsim.traffic.layout import shown

_DIGITS = 15  # results hold numbers as float64, exact below 2^53: a longer one is a name


class Reporter(Protocol):
    """Makes the error about a record."""

    def error(self, number: int, column: str, message: str) -> InputError: ...
    def number(self, index: int) -> int: ...


class Labels:
    """Turns the labels of one column into numbers, the same label always into the same number; none is -1.

    A whole number, also when written as text, is itself. A name is the first 52 bits of its BLAKE2 hash, so that
    nothing has to be remembered of a long trace; or, `in_order`, its place in the order of first appearance, and then a
    column holds either numbers or names.
    """

    def __init__(self, reporter: Reporter, column: str, *, in_order: bool = False) -> None:
        self._reporter = reporter
        self._column = column
        self._in_order = in_order
        self._seen: dict[str, int] = {}
        self._met_number = False

    def numbers(self, labels: Sequence[object] | None) -> Ints | None:
        """int64[n] for `labels`, or None when there is no label among them."""
        if labels is None:
            return None
        numbers = np.fromiter(map(self._number, range(len(labels)), labels), np.int64, len(labels))
        return numbers if (numbers >= 0).any() else None

    def _number(self, index: int, label: object) -> int:
        if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
            return -1
        whole = _whole(label)
        large = isinstance(label, int) and label > 0 and not isinstance(label, bool)
        if whole is None and not isinstance(label, str) and not large:
            raise self._error(index, f"expected a whole number from 0 or a name, got {shown(label)}")
        if not self._in_order:
            return _hashed(str(label)) if whole is None else whole
        if whole is None:
            whole = self._seen.setdefault(str(label), len(self._seen))
        else:
            self._met_number = True
        if self._met_number and self._seen:
            raise self._error(index, f"expected all numbers or all names, got {shown(label)} among the others")
        return whole

    def _error(self, index: int, message: str) -> InputError:
        return self._reporter.error(self._reporter.number(index), self._column, message)


def _whole(label: object) -> int | None:
    """The number that `label` is or spells, if it is whole, not negative and not too long."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None
    text = str(label).strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else None


def _hashed(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 12
