"""Requests of a measured run as a trace that perfsim replays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike


def write_trace(
    folder: Path, *, arrival_s: ArrayLike, prompt_tokens: ArrayLike, output_tokens: ArrayLike,
    hash_block_ids: Sequence[Sequence[int]] | None = None, hash_block_tokens: int = 0,
) -> Path:  # fmt: skip
    """A Parquet file in `folder` with one row per request, in order of time; its name follows from what is in it.

    Equal `hash_block_ids`, one for every `hash_block_tokens` tokens of a prompt, are equal tokens up to there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = {
        "arrival_s": np.asarray(arrival_s, dtype=np.float64),
        "prompt_tokens": np.asarray(prompt_tokens, dtype=np.int64),
        "output_tokens": np.asarray(output_tokens, dtype=np.int64),
    }
    digest = hashlib.sha256(b"".join(column.tobytes() for column in numbers.values()))
    table = pa.table(numbers)
    if hash_block_ids is not None:
        digest.update(repr([tuple(ids) for ids in hash_block_ids]).encode())
        ids = pa.array([list(ids) for ids in hash_block_ids], pa.list_(pa.int64()))
        table = table.append_column("hash_block_ids", ids)
        table = table.append_column("hash_block_tokens", pa.array([hash_block_tokens] * len(table), pa.int64()))
    path = folder / f"{digest.hexdigest()[:16]}.parquet"
    pq.write_table(table, path)
    return path
