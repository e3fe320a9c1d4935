"""The rules every recorded request must obey, whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from perfsim.traffic.chunk import MAX_ARRIVAL_S, MAX_TOKENS, Floats, RequestChunk
from perfsim.traffic.labels import Labels
from perfsim.traffic.layout import Layout, file_name

MAX_PRIORITY = 10**9


@dataclass(frozen=True, slots=True)
class RawColumns:
    """Numbers as read, float64[n] with NaN for an empty cell, so that one set of rules judges all formats.

    float64 holds every integer below 2**53 exactly, far beyond the largest legal count.
    """

    prompt_tokens: Floats
    output_tokens: Floats
    arrival_s: Floats | None = None
    priority: Floats | None = None
    hash_block_ids: list[list[int] | None] | None = None
    hash_block_tokens: Floats | None = None
    numbers: Sequence[int] | None = None  # of the records in the file, where skipped lines make gaps
    session_id: Sequence[object] | None = None  # numbers or names, None where there is none
    adapter: Sequence[object] | None = None


class Checker:
    """Turns raw columns into chunks, in file order; remembers the row number and the last arrival between calls.

    `unit` is the word for a record in messages: "row" (data row, the header not counted) or "line", 1-based.
    """

    def __init__(self, path: Path, *, layout: Layout, unit: str = "row") -> None:
        self._path = path
        self._layout = layout
        self._unit = unit
        self._rows = 0
        self._numbers: Sequence[int] | None = None
        self._last_arrival = 0.0
        self._block_tokens = layout.hash_block_tokens or 0
        self._sessions = Labels(self, "session_id")
        self._adapters = Labels(self, "adapter", in_order=True)

    @property
    def rows(self) -> int:
        """Records accepted so far."""
        return self._rows

    def error(self, number: int, column: str, message: str) -> InputError:
        """The error for the record with 1-based `number`; `column` is perfsim's name, the message shows the file's."""
        name = self._layout.columns.get(column, column)
        return InputError(f"{file_name(self._path)}: {self._unit} {number}, column '{name}': {message}")

    def chunk(self, raw: RawColumns) -> RequestChunk:
        """The requests of `raw`; raises InputError for the first bad value of the first bad column."""
        count = len(raw.prompt_tokens)
        self._numbers = raw.numbers
        for column, values in (("prompt_tokens", raw.prompt_tokens), ("output_tokens", raw.output_tokens)):
            self._whole(column, values, low=1, high=MAX_TOKENS)
        if raw.priority is not None:
            # An empty priority is the default one; NaN would not survive the conversion to integers.
            priority = np.where(np.isnan(raw.priority), 0.0, raw.priority)
            self._whole("priority", priority, low=-MAX_PRIORITY, high=MAX_PRIORITY)
        arrival = np.zeros(count) if raw.arrival_s is None else self._arrivals(raw.arrival_s)
        hashes = None
        if raw.hash_block_ids is not None and any(ids is not None for ids in raw.hash_block_ids):
            hashes = raw.hash_block_ids
            self._blocks(hashes, prompt=raw.prompt_tokens, tokens=raw.hash_block_tokens)
        session = self._sessions.numbers(raw.session_id)
        adapter = self._adapters.numbers(raw.adapter)
        self._rows += count
        return RequestChunk(
            arrival_s=arrival,
            prompt_tokens=raw.prompt_tokens.astype(np.int64),
            output_tokens=raw.output_tokens.astype(np.int64),
            priority=None if raw.priority is None else priority.astype(np.int64),
            hash_block_ids=hashes,
            hash_block_tokens=0 if hashes is None else self._block_tokens,
            session_id=session,
            adapter=adapter,
        )

    def number(self, index: int) -> int:
        """The 1-based number in the file of the record at `index` of the chunk that is being checked."""
        return self._rows + index + 1 if self._numbers is None else self._numbers[index]

    def _first(self, bad: NDArray[np.bool_], column: str, message: Callable[[int], str]) -> None:
        if bad.any():
            index = int(np.argmax(bad))
            raise self.error(self.number(index), column, message(index))

    def _whole(self, column: str, values: Floats, *, low: int, high: int) -> None:
        good = (values >= low) & (values <= high) & (values == np.floor(values))
        expected = f"expected a whole number from {low} to {high}"
        self._first(~good, column, lambda i: f"{expected}, got {_number(values[i])}")

    def _arrivals(self, arrival: Floats) -> Floats:
        self._first(
            ~((arrival >= 0) & (arrival <= MAX_ARRIVAL_S)),
            "arrival_s",
            lambda i: (
                f"expected seconds from the start of the trace, 0 to {MAX_ARRIVAL_S:g}, got {_number(arrival[i])}"
            ),
        )
        before = np.concatenate(([self._last_arrival], arrival[:-1]))
        self._first(
            arrival < before,
            "arrival_s",
            lambda i: f"arrivals must not decrease, but {arrival[i]:.9g} s follows {before[i]:.9g} s; sort the trace",
        )
        if len(arrival):
            self._last_arrival = float(arrival[-1])
        return arrival

    def _blocks(self, hashes: list[list[int] | None], *, prompt: Floats, tokens: Floats | None) -> None:
        known = np.array([ids is not None for ids in hashes])
        if tokens is not None:
            self._whole("hash_block_tokens", np.where(known, tokens, 1.0), low=1, high=MAX_TOKENS)
            if not self._block_tokens:
                self._block_tokens = int(tokens[np.argmax(known)])
            self._first(
                known & (tokens != self._block_tokens),
                "hash_block_tokens",
                lambda i: f"expected {self._block_tokens} as in the rows before, got {_number(tokens[i])}",
            )
        block = self._block_tokens
        counts = np.array([0 if ids is None else len(ids) for ids in hashes])
        needed = np.ceil(prompt / block)
        self._first(
            known & (counts != needed),
            "hash_block_ids",
            lambda i: (
                f"expected {int(needed[i])} block ids for {int(prompt[i])} prompt tokens in blocks of {block}, "
                f"got {counts[i]}"
            ),
        )


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN or an empty value"
    return f"{value:.12g}"
