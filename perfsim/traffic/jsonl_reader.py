"""JSON Lines traces: one object per line, read in blocks of lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from perfsim.errors import InputError
from perfsim.traffic.check import Checker, RawColumns
from perfsim.traffic.chunk import Floats, RequestChunk
from perfsim.traffic.layout import AZURE, LABELS, Layout, file_name, find_layout, shown

# At 50 bytes for the shortest legal line a block never exceeds the largest chunk.
BLOCK_BYTES = 2 << 20
# A million block ids are 8 MB of text; a longer line is no trace and must not fill the memory.
MAX_LINE_BYTES = 16 << 20

Record = dict[str, Any]


def read_jsonl(path: Path, *, need_arrivals: bool) -> Iterator[RequestChunk]:
    """The requests of a JSON Lines trace, one object per line.

    Keys: arrival_s, prompt_tokens, output_tokens and optionally priority, hash_block_ids (a list of integers),
    hash_block_tokens, session_id and adapter; or Mooncake's timestamp (ms), input_length, output_length, hash_ids (512
    tokens per id). Raises InputError naming the line (1-based, blank lines counted) of the first thing that is wrong.
    """
    where = file_name(path)
    parser = _Parser(where, need_arrivals=need_arrivals)
    checker: Checker | None = None
    try:
        with path.open("rb") as file:
            for first, lines in _line_blocks(file, where=where):
                records, numbers = parser.records(lines, first=first)
                if not records:
                    continue
                if checker is None:
                    checker = Checker(path, layout=parser.layout, unit="line")
                yield checker.chunk(_raw(records, numbers, layout=parser.layout, checker=checker))
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None


def _line_blocks(file: BinaryIO, *, where: str) -> Iterator[tuple[int, list[bytes]]]:
    """(1-based number of the first line, lines) per block of the file."""
    number, rest = 1, b""
    while block := file.read(BLOCK_BYTES):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE_BYTES:
            raise InputError(
                f"{where}: line {number + len(lines)}: longer than {MAX_LINE_BYTES >> 20} MiB; expected one JSON object"
            )
        yield number, lines
        number += len(lines)
    yield number, [rest]


class _Parser:
    """Lines to JSON objects with known keys; remembers which sets of keys were already found good."""

    def __init__(self, where: str, *, need_arrivals: bool) -> None:
        self.layout = Layout({})
        self._where = where
        self._need_arrivals = need_arrivals
        self._seen: set[tuple[str, ...]] = set()

    def records(self, lines: list[bytes], *, first: int) -> tuple[list[Record], list[int]]:
        """The objects of `lines`, whose first is line `first`, and the line number of each; blank lines are skipped."""
        decode = json.JSONDecoder().decode
        records, numbers = [], []
        for number, line in enumerate(lines, first):
            text = line.strip()
            if not text:
                continue
            try:
                record = decode(text.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):  # bad JSON, bad UTF-8, a number of 5,000 digits, or very deep nesting
                raise InputError(f"{self._where}: line {number}: expected a JSON object, got {_text(text)}") from None
            if not isinstance(record, dict):
                raise InputError(f"{self._where}: line {number}: expected a JSON object, got {_text(text)}")
            keys = tuple(record)
            if keys not in self._seen:
                self._learn(keys, where=f"{self._where}: line {number}")
            records.append(record)
            numbers.append(number)
        return records, numbers

    def _learn(self, keys: tuple[str, ...], *, where: str) -> None:
        found = find_layout(keys, where=where, need_arrivals=self._need_arrivals)
        if found.seconds_per_unit == AZURE.seconds_per_unit:
            raise InputError(f"{where}: Azure's dated columns are read from CSV only; expected arrival_s in seconds")
        if self._seen and found.seconds_per_unit != self.layout.seconds_per_unit:
            raise InputError(f"{where}: expected the same keys as the lines before, got {shown(', '.join(keys))}")
        # Optional keys may come and go from line to line: remember every one that was met.
        columns = {**self.layout.columns, **found.columns}
        self.layout = Layout(columns, found.seconds_per_unit, found.hash_block_tokens)
        self._seen.add(keys)


def _raw(records: list[Record], numbers: list[int], *, layout: Layout, checker: Checker) -> RawColumns:
    columns: dict[str, Any] = {"numbers": numbers}
    for key, name in layout.columns.items():
        values = [record.get(name) for record in records]
        if key in LABELS:
            columns[key] = values
            continue
        read = _id_lists if key == "hash_block_ids" else _floats
        columns[key] = read(values, key=key, numbers=numbers, checker=checker)
    scale = layout.seconds_per_unit
    if scale is not None and scale != 1.0 and "arrival_s" in columns:
        columns["arrival_s"] = columns["arrival_s"] * scale
    return RawColumns(**columns)


def _floats(values: list[Any], *, key: str, numbers: list[int], checker: Checker) -> Floats:
    kinds = set(map(type, values))
    if not kinds <= {int, float}:
        for number, value in zip(numbers, values, strict=True):
            if value is not None and type(value) not in (int, float):  # bool is an int to isinstance
                raise checker.error(number, key, f"expected a number, got {shown(value)}")
        values = [math.nan if value is None else value for value in values]
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:  # an integer beyond 1e308: any illegal value will do, the checker rejects it
        return np.array([value if abs(value) < 10**300 else math.inf for value in values], dtype=np.float64)


def _id_lists(values: list[Any], *, key: str, numbers: list[int], checker: Checker) -> list[list[int] | None]:
    for number, ids in zip(numbers, values, strict=True):
        if ids is not None and not (type(ids) is list and set(map(type, ids)) <= {int}):
            raise checker.error(number, key, f"expected a list of whole numbers, got {shown(ids)}")
    return values


def _text(line: bytes) -> str:
    return shown(line[:80].decode("utf-8", errors="replace"))
