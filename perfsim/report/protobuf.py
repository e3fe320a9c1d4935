"""The wire format of Protocol Buffers, one message or a whole column of equal-shaped messages at a time.

Source: https://protobuf.dev/programming-guides/encoding/. A row of a column has a fixed width, so NumPy can write all
of them at once: numbers are padded to the width of the largest with continuation bits, which every parser accepts.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Part = bytes | Bytes

_VARINT, _FIXED64, _LENGTH = 0, 1, 2


def varint(value: int) -> bytes:
    """Seven bits per byte, least significant first; `value` must not be negative."""
    if value < 0:
        raise ValueError(f"{value} has no unsigned encoding")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field: an int as varint, a float as double, text and bytes (also sub-messages) with their length."""
    if isinstance(value, int):
        return varint(number << 3 | _VARINT) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | _FIXED64) + struct.pack("<d", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | _LENGTH) + varint(len(data)) + data


def integers(number: int, values: NDArray[np.int64]) -> list[Part]:
    """The field `number` of every row; `values` must not be negative."""
    if values.size and int(values.min()) < 0:
        raise ValueError("a negative number has no unsigned encoding")
    width = max(1, -(-int(values.max(initial=0)).bit_length() // 7))
    shifted = values[:, None] >> (7 * np.arange(width))
    encoded = (shifted & 0x7F).astype(np.uint8)
    encoded[:, :-1] |= 0x80
    return [varint(number << 3 | _VARINT), encoded]


def doubles(number: int, values: NDArray[np.float64]) -> list[Part]:
    """The field `number` of every row, as a double."""
    raw = np.ascontiguousarray(values, dtype="<f8").view(np.uint8).reshape(-1, 8)
    return [varint(number << 3 | _FIXED64), raw]


def message(number: int, parts: list[Part]) -> list[Part]:
    """A sub-message `number` in every row."""
    size = sum(len(part) if isinstance(part, bytes) else part.shape[1] for part in parts)
    return [varint(number << 3 | _LENGTH) + varint(size), *parts]


def table(count: int, parts: list[Part]) -> bytes:
    """`count` rows, one after the other: constant parts repeat, columns give a row each."""
    columns = [
        np.broadcast_to(np.frombuffer(part, np.uint8), (count, len(part))) if isinstance(part, bytes) else part
        for part in parts
    ]
    return np.concatenate(columns, axis=1).tobytes() if count else b""
