"""Trace files by extension; everything that can be wrong with a file before its first row."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from perfsim.errors import InputError
from perfsim.traffic.benchmark_reader import read_benchmark
from perfsim.traffic.chunk import RequestChunk
from perfsim.traffic.csv_reader import read_csv
from perfsim.traffic.jsonl_reader import read_jsonl
from perfsim.traffic.layout import file_name
from perfsim.traffic.parquet_reader import read_parquet

_BENCHMARK = ".json"
_READERS: dict[str, Callable[..., Iterator[RequestChunk]]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
_EXPECTED = "expected a CSV (.csv), JSON Lines (.jsonl), Parquet (.parquet) or benchmark's JSON (.json) file"


def read_trace(path: Path, *, need_arrivals: bool = True, benchmark: int | None = None) -> Iterator[RequestChunk]:
    """The requests recorded in `path`, in file order, chunk by chunk.

    `benchmark` chooses one of several in a report of GuideLLM. Without `need_arrivals` the recorded times are not read
    and `arrival_s` is zero: for lengths under another arrival process. The iterator raises InputError where the first
    bad record is, so a caller that must know before it starts has to read to the end.
    """
    reader = _READERS.get(path.suffix.lower())
    where = file_name(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}; {_EXPECTED}") from None
    except ValueError:
        raise InputError(f"{where!r}: not a file name; {_EXPECTED}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{where}: is a directory; {_EXPECTED}")
    if not stat.S_ISREG(mode):
        raise InputError(f"{where}: is not a regular file; {_EXPECTED}")
    if path.suffix.lower() == _BENCHMARK:
        reader = partial(read_benchmark, benchmark=benchmark)
    elif benchmark is not None:
        raise InputError(f"{where}: benchmark = {benchmark} chooses in a GuideLLM report, which is a .json file")
    if reader is None:
        raise InputError(f"{where}: unknown extension '{path.suffix}'; {_EXPECTED}")
    _check_content(path, binary=reader is read_parquet)
    return _not_empty(reader(path, need_arrivals=need_arrivals), where=where)


def _check_content(path: Path, *, binary: bool) -> None:
    where = file_name(path)
    try:
        with path.open("rb") as file:
            head = file.read(1 << 12)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    if binary:
        if not head.startswith(b"PAR1"):
            raise InputError(f"{where}: expected a Parquet file, but it does not start with the bytes PAR1")
    elif head.startswith(b"PAR1"):
        raise InputError(f"{where}: is a Parquet file; expected text, or the extension .parquet")
    elif b"\0" in head or head.startswith(b"\x1f\x8b"):
        raise InputError(f"{where}: is a binary or compressed file; expected plain UTF-8 text")


def _not_empty(chunks: Iterator[RequestChunk], *, where: str) -> Iterator[RequestChunk]:
    empty = True
    for chunk in chunks:
        if len(chunk):
            empty = False
            yield chunk
    if empty:
        raise InputError(f"{where}: empty trace; expected at least one request")
