"""Arrow record batches to plain NumPy columns, shared by the CSV and Parquet readers.

The buffers are read directly: Arrow's own `to_numpy` imports pandas where it is installed, which takes longer than
reading 100,000 requests ten times.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from perfsim.traffic.check import Checker, RawColumns
from perfsim.traffic.chunk import Floats
from perfsim.traffic.layout import Layout

if TYPE_CHECKING:
    import pyarrow as pa

# Arrow's names where they differ from NumPy's; int8 to uint64 are the same.
_NUMPY_NAMES = {"double": "float64", "float": "float32", "halffloat": "float16"}
_NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


class BatchConverter:
    """Record batches of one file, in order, to `RawColumns`; remembers where the clock of a dated trace starts."""

    def __init__(self, layout: Layout, *, checker: Checker) -> None:
        self._layout = layout
        self._checker = checker
        self._origin_ns: int | None = None

    def raw(self, batch: pa.RecordBatch) -> RawColumns:
        """The columns of `batch` as float64 and lists; empty cells become NaN or None."""
        column = {key: batch.column(name) for key, name in self._layout.columns.items()}
        return RawColumns(
            prompt_tokens=_floats(column["prompt_tokens"]),
            output_tokens=_floats(column["output_tokens"]),
            arrival_s=self._seconds(column["arrival_s"]) if "arrival_s" in column else None,
            priority=_floats(column["priority"]) if "priority" in column else None,
            hash_block_ids=self._ids(column["hash_block_ids"]) if "hash_block_ids" in column else None,
            hash_block_tokens=_floats(column["hash_block_tokens"]) if "hash_block_tokens" in column else None,
            session_id=column["session_id"].to_pylist() if "session_id" in column else None,
            adapter=column["adapter"].to_pylist() if "adapter" in column else None,
        )

    def _seconds(self, array: pa.Array) -> Floats:
        scale = self._layout.seconds_per_unit
        if scale is not None:
            values = _floats(array)
            return values if scale == 1.0 else values * scale
        # Differences of int64 nanoseconds are exact; a float64 Unix time would keep 0.2 us only.
        ticks = _buffer(array, "int64") * _NANOSECONDS[array.type.unit]
        missing = _missing(array)
        if self._origin_ns is None and not missing.all():
            self._origin_ns = int(ticks[np.argmin(missing)])
        return np.where(missing, np.nan, (ticks - (self._origin_ns or 0)) / 1e9)

    def _ids(self, array: pa.Array) -> list[list[int] | None]:
        kind = str(array.type)
        if kind == "null":
            return [None] * len(array)
        if kind == "string":
            return [self._parsed(text, index) for index, text in enumerate(array.to_pylist())]
        if not len(array):
            return []
        offsets = _buffer(array.offsets, str(array.offsets.type))
        start, stop = int(offsets[0]), int(offsets[-1])
        values = array.values.slice(start, stop - start)
        bounds = offsets - start
        if values.null_count:
            hole = int(np.argmax(_missing(values)))
            raise self._error(int(np.searchsorted(bounds, hole, side="right")) - 1, "an id is empty")
        ids = _buffer(values, str(values.type)).tolist()
        lists = [ids[low:high] for low, high in pairwise(bounds.tolist())]
        if not array.null_count:
            return lists
        return [None if absent else one for absent, one in zip(_missing(array).tolist(), lists, strict=True)]

    def _parsed(self, text: str | None, index: int) -> list[int] | None:
        if text is None:
            return None
        try:
            return [int(part) for part in text.strip("[] ").replace(",", " ").split()]
        except ValueError:
            raise self._error(index, "expected whole numbers separated by spaces, such as 0 1 2") from None

    def _error(self, index: int, message: str) -> InputError:
        return self._checker.error(self._checker.rows + index + 1, "hash_block_ids", message)


def _buffer(array: pa.Array, dtype: str) -> NDArray[Any]:
    """The values of a fixed-width array, undefined where missing; a view that keeps the array's memory alive."""
    data = array.buffers()[1]
    kind = np.dtype(dtype)
    if data is None or not len(array):
        return np.zeros(len(array), dtype=kind)
    return np.frombuffer(data, dtype=kind, count=len(array), offset=array.offset * kind.itemsize)


def _missing(array: pa.Array) -> NDArray[np.bool_]:
    bitmap = array.buffers()[0]
    if not array.null_count or bitmap is None:
        return np.zeros(len(array), dtype=np.bool_)
    valid = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little")
    return np.logical_not(valid[array.offset : array.offset + len(array)])


def _floats(array: pa.Array) -> Floats:
    name = str(array.type)
    if name == "null":
        return np.full(len(array), np.nan)
    values = _buffer(array, _NUMPY_NAMES.get(name, name)).astype(np.float64, copy=False)
    return np.where(_missing(array), np.nan, values) if array.null_count else values
