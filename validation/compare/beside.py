"""Facts that a table leaves to another one of its study: found beside it by columns, whatever the file is called."""

from __future__ import annotations

from collections.abc import Iterator

from validation.compare.columns import typed
from validation.compare.table import Table, read_table


def companions(table: Table, columns: frozenset[str]) -> Iterator[Table]:
    """The tables in the folder of `table`, by name, that have all `columns`: runs of a study may lie in several."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in sorted(table.path.resolve().parent.glob("*.parquet")):
        try:
            names = set(pq.read_schema(path).names)
        except (pa.ArrowException, OSError):
            continue
        if columns <= names:
            yield typed(read_table(path), columns)
