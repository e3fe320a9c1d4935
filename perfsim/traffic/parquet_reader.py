"""Parquet traces, one record batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from perfsim.errors import InputError
from perfsim.traffic.arrow_columns import BatchConverter
from perfsim.traffic.check import Checker
from perfsim.traffic.chunk import CHUNK_REQUESTS, HASHED_CHUNK_REQUESTS, RequestChunk
from perfsim.traffic.layout import Layout, file_name, find_layout, first_line

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(path: Path, *, need_arrivals: bool) -> Iterator[RequestChunk]:
    """The requests of a Parquet trace: arrival_s, prompt_tokens, output_tokens and optionally priority,
    hash_block_ids (list of integers) and hash_block_tokens.

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
            for batch in file.iter_batches(batch_size=size, columns=list(layout.columns.values())):
                yield checker.chunk(converter.raw(batch))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where}: expected a Parquet file, but it is truncated or corrupt ({first_line(error)})"
        ) from None


def _check_types(schema: pa.Schema, *, layout: Layout, where: str) -> None:
    import pyarrow as pa

    types = pa.types
    for key, name in layout.columns.items():
        kind = schema.field(name).type
        if key == "hash_block_ids":
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
