"""Facts that a table leaves to another one of its study: found beside it by columns, whatever the file is called."""

from __future__ import annotations

from validation.compare.columns import typed
from validation.compare.table import Table, read_table


def companion(table: Table, columns: frozenset[str]) -> Table | None:
    """The first table (by name) in the folder of `table` that has all `columns`; None when there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in sorted(table.path.resolve().parent.glob("*.parquet")):
        try:
            names = set(pq.read_schema(path).names)
        except (pa.ArrowException, OSError):
            continue
        if columns <= names:
            return typed(read_table(path), columns)
    return None
