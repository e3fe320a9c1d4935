"""Writes `requests.parquet` while the simulation runs: one row per completed request, memory bounded by a row group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from perfsim.metrics.aggregate import time_per_output_token

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import pyarrow as pa

# Rows are regrouped to this size, so that the bytes of the file do not depend on how the simulator cuts its chunks.
ROWS_PER_GROUP = 1 << 17
_TIMES = ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s")
_COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")
_LABELS = ("session_id", "adapter")  # null where there is none
_DERIVED = ("ttft_s", "engine_ttft_s", "tpot_s", "e2e_s")


class ParquetSpool:
    """A Parquet file that grows by chunks of request columns and appears at `path` when it is complete.

    Columns: `request_index`, the engine's times and the token counts as recorded, and `ttft_s`, `engine_ttft_s`,
    `tpot_s` (null for one output token) and `e2e_s`; seconds; `session_id` and `adapter`, null for none. Rows are in
    order of completion. It can be replayed as a trace, without what prompts shared. `egress` is seconds from the engine
    to the client. Use it as a context manager: an exception leaves no file behind.
    """

    def __init__(self, path: str | Path, *, egress: float) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = Path(path)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._egress = egress
        self._schema = pa.schema(
            [pa.field("request_index", pa.int64(), nullable=False)]
            + [pa.field(name, pa.float64(), nullable=False) for name in _TIMES]
            + [pa.field(name, pa.int64(), nullable=False) for name in _COUNTS]
            + [pa.field(name, pa.float64(), nullable=name == "tpot_s") for name in _DERIVED]
            + [pa.field(name, pa.int64()) for name in _LABELS]
        )
        self._waiting: list[pa.Table] = []
        self._rows = 0
        # Nearly every value is distinct: dictionaries would be built and thrown away.
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd", use_dictionary=False)

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append the requests of one chunk."""
        import pyarrow as pa

        table = self._table(columns)
        self._waiting.append(table)
        self._rows += table.num_rows
        if self._rows < ROWS_PER_GROUP:
            return
        rows = pa.concat_tables(self._waiting)
        whole = self._rows - self._rows % ROWS_PER_GROUP
        self._write(rows.slice(0, whole))
        rest = rows.slice(whole)
        self._waiting, self._rows = ([rest] if rest.num_rows else []), rest.num_rows

    def close(self) -> None:
        """Write what is left and move the file into place."""
        import pyarrow as pa

        if self._waiting:
            self._write(pa.concat_tables(self._waiting))
        self._writer.close()
        self._partial.replace(self._path)

    def _write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.combine_chunks(), row_group_size=ROWS_PER_GROUP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if kind is None:
            self.close()
            return
        self._writer.close()
        self._partial.unlink(missing_ok=True)

    def _table(self, columns: Mapping[str, Any]) -> pa.Table:
        import pyarrow as pa

        times = {name: np.asarray(columns[name], dtype=np.float64) for name in _TIMES}
        counts = {name: np.asarray(columns[name], dtype=np.int64) for name in _COUNTS}
        first, finish = times["first_token_s"], times["finish_s"]
        output = counts["output_tokens"]
        derived = {
            "ttft_s": first + self._egress - times["arrival_s"],
            "engine_ttft_s": first - times["queued_s"],
            "tpot_s": pa.array(time_per_output_token(first, finish, output), mask=output <= 1),
            "e2e_s": finish + self._egress - times["arrival_s"],
        }
        index = {"request_index": np.asarray(columns["request_index"], dtype=np.int64)}
        numbers = {name: np.asarray(columns[name], dtype=np.int64) for name in _LABELS}
        labels = {name: pa.array(values, mask=values < 0) for name, values in numbers.items()}
        return pa.table({**index, **times, **counts, **derived, **labels}, schema=self._schema)
