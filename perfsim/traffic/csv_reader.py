"""CSV traces: Arrow reads blocks of typed columns; only a broken file is read again, slowly, to say where it breaks."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from perfsim.errors import InputError
from perfsim.traffic.arrow_columns import BatchConverter
from perfsim.traffic.check import Checker
from perfsim.traffic.chunk import CHUNK_REQUESTS, HASHED_CHUNK_REQUESTS, RequestChunk
from perfsim.traffic.layout import LABELS, Layout, file_name, find_layout, first_line, shown

if TYPE_CHECKING:
    import pyarrow as pa

# A row, block ids included, must fit in a block, and Arrow holds several blocks at once.
BLOCK_BYTES = 2 << 20
_NUMBER = re.compile(
    r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*|\s*-?(nan|inf|infinity)\s*", re.IGNORECASE | re.ASCII
)
_TEXT = ("hash_block_ids", *LABELS)
_ZONE = re.compile(r"(Z|[+-]\d\d:?\d\d)$")


def read_csv(path: Path, *, need_arrivals: bool) -> Iterator[RequestChunk]:
    """The requests of a comma-separated trace with a header line.

    Columns: arrival_s, prompt_tokens, output_tokens and optionally priority, hash_block_ids (whole numbers separated by
    spaces), hash_block_tokens, session_id and adapter; or Azure's TIMESTAMP, ContextTokens, GeneratedTokens. Raises
    InputError naming the data row (1-based, blank lines not counted) and column of the first thing that is wrong.
    """
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    where = file_name(path)
    names, first = _head(path, where=where)
    layout = find_layout(names, where=where, need_arrivals=need_arrivals)
    checker = Checker(path, layout=layout)
    converter = BatchConverter(layout, checker=checker)
    size = HASHED_CHUNK_REQUESTS if "hash_block_ids" in layout.columns else CHUNK_REQUESTS
    try:
        with pa_csv.open_csv(
            path,
            # Threads would only read ahead of the simulator, and one at a time keeps memory and order simple.
            read_options=pa_csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False, block_size=BLOCK_BYTES),
            convert_options=pa_csv.ConvertOptions(
                column_types=_types(names, layout=layout, first=first),
                include_columns=list(layout.columns.values()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        ) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, size):
                    yield checker.chunk(converter.raw(batch.slice(start, size)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        _explain(path, names=names, layout=layout)
        raise InputError(
            f"{where}: expected comma-separated text after row {checker.rows}: {first_line(error)}"
        ) from None


def _head(path: Path, *, where: str) -> tuple[list[str], list[str]]:
    """The column names and the first data row ([] when there is none)."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            # A header longer than this is no header; reading it whole could be reading a whole binary file.
            lines = file.read(1 << 16).splitlines()[:64]
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    rows = [row for row in csv.reader(lines) if row]
    if not rows:
        raise InputError(f"{where}: empty trace; expected a header line and at least one request")
    if not lines[0].strip():
        raise InputError(f"{where}: line 1 is blank; expected the header arrival_s,prompt_tokens,output_tokens")
    return [name.strip() for name in rows[0]], rows[1] if len(rows) > 1 else []


def _types(names: list[str], *, layout: Layout, first: list[str]) -> dict[str, pa.DataType]:
    import pyarrow as pa

    types = {name: pa.float64() for name in layout.columns.values()}
    for key in _TEXT:
        if key in layout.columns:
            types[layout.columns[key]] = pa.string()
    if layout.seconds_per_unit is None and "arrival_s" in layout.columns:
        # The 2023 traces have no zone, the 2024 ones end in +00:00; Arrow wants to know before it reads.
        column = names.index(layout.columns["arrival_s"])
        zoned = len(first) > column and _ZONE.search(first[column].strip())
        types[layout.columns["arrival_s"]] = pa.timestamp("ns", "UTC" if zoned else None)
    return types


def _explain(path: Path, *, names: list[str], layout: Layout) -> None:
    """Raise InputError for the first row that Arrow cannot have understood; return when none is found."""
    where = file_name(path)
    row = 0
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            for cells in csv.reader(file):
                if not cells:
                    continue
                if row:
                    _explain_row(cells, where=f"{where}: row {row}", names=names, layout=layout)
                row += 1
    except csv.Error:
        return  # a cell of more than 128 KiB: Arrow's own words will do
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    if row <= 1:
        raise InputError(f"{where}: empty trace; expected at least one request after the header line")


def _explain_row(cells: list[str], *, where: str, names: list[str], layout: Layout) -> None:
    if len(cells) != len(names):
        raise InputError(f"{where}: expected {len(names)} columns ({', '.join(names)}), got {len(cells)}")
    for key, name in layout.columns.items():
        text = cells[names.index(name)]
        if text == "" or key in _TEXT:
            continue
        if key == "arrival_s" and layout.seconds_per_unit is None:
            good, expected = _is_time(text), "a date and time such as 2023-11-16 18:17:03.9799600"
        else:
            good, expected = _NUMBER.fullmatch(text) is not None, "a number"
        if not good:
            raise InputError(f"{where}, column '{name}': expected {expected}, got {shown(text)}")


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text.strip())
    except ValueError:
        return False
    return True
