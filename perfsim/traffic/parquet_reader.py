"""Parquet traces, one record batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from perfsim.errors import InputError
from perfsim.traffic.arrow_columns import BatchConverter
from perfsim.traffic.check import Checker
from perfsim.traffic.chunk import CHUNK_REQUESTS, HASHED_CHUNK_REQUESTS, RequestChunk
from perfsim.traffic.layout import LABELS, Layout, file_name, find_layout, first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def read_parquet(path: Path, *, need_arrivals: bool) -> Iterator[RequestChunk]:
    """The requests of a Parquet trace: arrival_s, prompt_tokens, output_tokens and optionally priority,
    hash_block_ids (list of integers), hash_block_tokens, session_id and adapter; or the requests.parquet of a run.

    Raises InputError on a truncated or corrupt file, wrong columns or types, and every value that `Checker` rejects.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = file_name(path)
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            layout = find_layout(schema.names, where=where, need_arrivals=need_arrivals)
            _check_types(schema, layout=layout, where=where)
            checker = Checker(path, layout=layout)
            converter = BatchConverter(layout, checker=checker)
            hashed = "hash_block_ids" in layout.columns and not pa.types.is_null(
                schema.field(layout.columns["hash_block_ids"]).type
            )
            size = HASHED_CHUNK_REQUESTS if hashed else CHUNK_REQUESTS
            names = list(layout.columns.values())
            batches = by_arrival(file, names) if layout.unordered else file.iter_batches(batch_size=size, columns=names)
            for batch in batches:
                for start in range(0, batch.num_rows, size):
                    yield checker.chunk(converter.raw(batch.slice(start, size)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where}: expected a Parquet file, but it is truncated or corrupt ({first_line(error)})"
        ) from None


def by_arrival(file: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a run's requests.parquet, which are in order of completion, in order of arrival.

    A row group's statistics say how early its rows arrived, so rows are handed out as soon as no later group can hold
    an earlier one: what is kept in memory is a row group and the requests that were in flight at its end.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = file.schema_arrow.names.index("arrival_s")
    groups = file.metadata.num_row_groups
    later = [-math.inf] * groups + [math.inf]
    for group in reversed(range(groups)):
        statistics = file.metadata.row_group(group).column(column).statistics
        earliest = statistics.min if statistics is not None and statistics.has_min_max else -math.inf
        later[group] = min(earliest, later[group + 1])
    kept: list[pa.Table] = []
    for group in range(groups):
        kept.append(file.read_row_group(group, columns=list({*names, "arrival_s", "request_index"})))
        rows = pa.concat_tables(kept).sort_by([("arrival_s", "ascending"), ("request_index", "ascending")])
        ready = pc.sum(pc.less(rows["arrival_s"], later[group + 1])).as_py() or 0
        yield from rows.slice(0, ready).select(names).to_batches()
        kept = [rows.slice(ready)]


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _check_types(schema: pa.Schema, *, layout: Layout, where: str) -> None:
    import pyarrow as pa

    types = pa.types
    for key, name in layout.columns.items():
        kind = schema.field(name).type
        if key in LABELS:
            good = types.is_null(kind) or types.is_integer(kind) or types.is_floating(kind) or _is_text(kind)
            expected = "numbers or text"
        elif key == "hash_block_ids":
            good = types.is_null(kind) or (
                (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type)
            )
            expected = "a list of integers"
        elif key == "arrival_s" and layout.seconds_per_unit is None:
            good, expected = types.is_timestamp(kind), "timestamps"
        else:
            good = types.is_integer(kind) or types.is_floating(kind)
            good = good or (types.is_null(kind) and key in ("priority", "hash_block_tokens"))
            expected = "numbers"
        if not good:
            raise InputError(f"{where}: column '{name}': expected {expected}, found type {kind}")
