"""What benchmark clients save about the requests they sent: vLLM's and GuideLLM's JSON files.

vLLM (`vllm bench serve --save-result --save-detailed`, vllm/benchmarks/serve.py of 0.32): one object with parallel
lists `input_lens`, `output_lens` (0 where the request failed) and `start_times` (seconds of a monotonic clock).

GuideLLM (report version 2, guidellm 0.8.1: benchmark/schemas and schemas/base/request_stats.py): `benchmarks`, each
with `requests.successful`, a list of objects with `prompt_tokens`, `output_tokens`, `request_start_time` (Unix seconds)
and `info.conversation_id`.

Requests that failed or were cut off are left out: how long they would have been is not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.errors import InputError
from perfsim.traffic.check import Checker, RawColumns
from perfsim.traffic.chunk import CHUNK_REQUESTS, Floats, RequestChunk
from perfsim.traffic.layout import Layout, file_name, shown

# Both are read whole; generated texts make up most of them.
MAX_BYTES = 2 << 30
_VLLM = {"arrival_s": "start_times", "prompt_tokens": "input_lens", "output_tokens": "output_lens"}
_GUIDELLM = {
    "arrival_s": "request_start_time", "prompt_tokens": "prompt_tokens", "output_tokens": "output_tokens",
    "session_id": "conversation_id",
}  # fmt: skip


def read_benchmark(path: Path, *, need_arrivals: bool, benchmark: int | None = None) -> Iterator[RequestChunk]:
    """The requests of a benchmark's JSON file, in order of sending, time 0 at the first.

    Raises InputError for anything else, for a vLLM result without per-request lists, for a GuideLLM report of several
    benchmarks when `benchmark` does not say which, and for what `Checker` rejects.
    """
    where = file_name(path)
    content = _load(path, where=where)
    if isinstance(content.get("benchmarks"), list):
        records = _guidellm(content["benchmarks"], benchmark, where=where)
        layout, unit = Layout(_GUIDELLM), "request"
    elif benchmark is not None:
        raise InputError(f"{where}: benchmark = {benchmark} chooses in a GuideLLM report, which this is not")
    else:
        records = _vllm(content, where=where, need_arrivals=need_arrivals)
        layout, unit = Layout(_VLLM), "entry"
    checker = Checker(path, layout=layout, unit=unit)
    kept = [row for row in records if row[3] is not None]
    start = np.array([row[0] for row in kept], dtype=np.float64)
    if need_arrivals:
        order = np.argsort(start, kind="stable").tolist()
        start = start[order] - start[order[0]] if order else start
        kept = [kept[index] for index in order]
    for first in range(0, len(kept), CHUNK_REQUESTS):
        part = kept[first : first + CHUNK_REQUESTS]
        sessions = [row[4] for row in part]
        yield checker.chunk(
            RawColumns(
                prompt_tokens=_column(part, 2),
                output_tokens=_column(part, 3),
                arrival_s=start[first : first + CHUNK_REQUESTS] if need_arrivals else None,
                session_id=None if all(label is None for label in sessions) else sessions,
                numbers=[row[1] for row in part],
            )
        )


# (start, number in the file from 1, prompt tokens, output tokens or None where it failed, session)
_Row = tuple[float, int, Any, Any, str | None]


def _load(path: Path, *, where: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{where}: larger than {MAX_BYTES >> 30} GiB; expected it without generated texts")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{where}: expected the JSON of a benchmark; JSON Lines end in .jsonl") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a JSON object saved by vLLM's or GuideLLM's benchmark")
    return content


def _vllm(content: dict[str, Any], *, where: str, need_arrivals: bool) -> list[_Row]:
    needed = [name for key, name in _VLLM.items() if need_arrivals or key != "arrival_s"]
    missing = [name for name in needed if not isinstance(content.get(name), list)]
    if missing:
        hint = " (vllm bench serve saves it with --save-detailed)" if "total_input_tokens" in content else ""
        raise InputError(
            f"{where}: the list '{missing[0]}' is missing{hint}; expected the JSON of vllm bench serve or GuideLLM"
        )
    columns = [content[name] for name in _VLLM.values() if name in needed]
    if len({len(column) for column in columns}) > 1:
        sizes = ", ".join(f"{name} {len(content[name])}" for name in needed)
        raise InputError(f"{where}: expected lists of equal length, got {sizes}")
    starts = content["start_times"] if need_arrivals else [0.0] * len(columns[0])
    rows = enumerate(zip(starts, content["input_lens"], content["output_lens"], strict=True), 1)
    return [
        (_time(start, number, where), number, prompt, None if output == 0 else output, None)
        for number, (start, prompt, output) in rows
    ]


def _guidellm(benchmarks: list[Any], chosen: int | None, *, where: str) -> list[_Row]:
    if not benchmarks:
        raise InputError(f"{where}: holds no benchmarks; expected at least one")
    if chosen is None and len(benchmarks) > 1:
        raise InputError(
            f"{where}: holds {len(benchmarks)} benchmarks; choose one with workload.benchmark = 0 to "
            f"{len(benchmarks) - 1}"
        )
    if chosen is not None and chosen >= len(benchmarks):
        raise InputError(f"{where}: workload.benchmark = {chosen}, but it holds {len(benchmarks)}, counted from 0")
    one = benchmarks[chosen or 0]
    requests = one.get("requests") if isinstance(one, dict) else None
    done = requests.get("successful") if isinstance(requests, dict) else None
    if not isinstance(done, list) or not all(isinstance(request, dict) for request in done):
        raise InputError(f"{where}: expected a list requests.successful in each benchmark, as GuideLLM saves it")
    rows: list[_Row] = []
    for number, request in enumerate(done, 1):
        info = request.get("info")
        session = info.get("conversation_id") if isinstance(info, dict) else None
        start = _time(request.get("request_start_time"), number, where)
        output = request.get("output_tokens")
        rows.append((start, number, request.get("prompt_tokens"), math.nan if output is None else output, session))
    return rows


def _time(value: object, number: int, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: request {number}: expected the time it was sent in seconds, got {shown(value)}")
    return float(value)


def _column(rows: list[_Row], index: int) -> Floats:
    """Counts as float64; what is no number becomes NaN, which the checker reports."""
    values = (row[index] for row in rows)
    return np.array(
        [value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan for value in values],
        dtype=np.float64,
    )
