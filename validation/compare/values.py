"""Values of a column as Python values and as text, the same whatever types a writer chose."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column with its values instead of codes of a dictionary."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes as text, which some writers leave unmarked; other bytes stay bytes."""
    import pyarrow as pa

    kind, types = column.type, pa.types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        try:
            return column.cast("large_string" if types.is_large_binary(kind) else "string")
        except pa.ArrowException:
            return column
    return column


def value_text(value: Any) -> str:
    """A value as text, the same however a column is stored.

    >>> [value_text(value) for value in (4.0, 4, Decimal("4.00"), 0.5, Decimal("0.50"), True, None, "4.0")]
    ['4', '4', '4', '0.5', '0.5', 'true', 'null', '4.0']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal) and value.is_finite():
        value = int(value) if value == value.to_integral_value() else value.normalize()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**64:
        return str(int(value))
    return "null" if value is None else str(value)


def values_of(column: pa.ChunkedArray | pa.Array) -> list[Any]:
    """Python values of a column; single-precision numbers are read as the decimals that they print as."""
    import pyarrow as pa

    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        own = np.float32 if pa.types.is_float32(column.type) else np.float16
        return [None if value is None else float(str(own(value))) for value in column.to_pylist()]
    return list(column.to_pylist())
