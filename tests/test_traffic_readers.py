"""Recorded traffic: the same requests whatever the file format, and what a workload does to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from perfsim import traffic
from perfsim.errors import InputError
from perfsim.spec.workload import ClosedLoop, PoissonArrivals, TraceWorkload
from perfsim.traffic import csv_reader, jsonl_reader, read_trace
from perfsim.traffic.chunk import RequestChunk

TRACES = Path(__file__).parents[1] / "workloads" / "traces"
FORMATS = ("csv", "jsonl", "parquet")

Request = dict[str, object]


def save(requests: list[Request], path: Path) -> Path:
    """Write `requests` in the format of the suffix of `path`; a value of None is an empty cell."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    elif path.suffix == ".csv":
        names = list(requests[0])
        lines = [",".join(names), *(",".join(_cell(request[name]) for name in names) for request in requests)]
        path.write_text("\n".join(lines) + "\n")
    else:
        types = {"hash_block_ids": pa.list_(pa.int32()), "arrival_s": pa.float64()}
        fields = [(name, types.get(name, pa.int32())) for name in requests[0]]
        pq.write_table(pa.Table.from_pylist(requests, schema=pa.schema(fields)), path)
    return path


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else repr(value)


def as_rows(chunks: list[RequestChunk]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for chunk in chunks:
        count = len(chunk)
        priority = [None] * count if chunk.priority is None else chunk.priority.tolist()
        hashes = chunk.hash_block_ids or [None] * count
        columns = chunk.arrival_s.tolist(), chunk.prompt_tokens.tolist(), chunk.output_tokens.tolist(), priority, hashes
        rows += zip(*columns, strict=True)
    return rows


@st.composite
def traces(draw: st.DrawFn) -> list[Request]:
    count = draw(st.integers(1, 30))
    block = draw(st.sampled_from([1, 16, 512]))
    arrivals = sorted(draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)))
    with_priority, with_hashes = draw(st.booleans()), draw(st.booleans())
    requests = []
    for arrival in arrivals:
        request: Request = {
            "arrival_s": arrival,
            "prompt_tokens": draw(st.integers(1, 2000)),
            "output_tokens": draw(st.integers(1, 10**8)),
        }
        if with_priority:
            request["priority"] = draw(st.none() | st.integers(-100, 100))
        if with_hashes:
            start = draw(st.integers(-(2**31), 2**31 - 2001))
            known = draw(st.booleans())
            blocks = -(-int(str(request["prompt_tokens"])) // block)
            request["hash_block_ids"] = list(range(start, start + blocks)) if known else None
            request["hash_block_tokens"] = block if known else None
        requests.append(request)
    return requests


@given(traces())
@settings(max_examples=60, deadline=None)
def test_csv_jsonl_and_parquet_give_what_was_written(tmp_path_factory, requests):
    folder = tmp_path_factory.mktemp("trace")
    expected = [
        (
            request["arrival_s"],
            request["prompt_tokens"],
            request["output_tokens"],
            (request["priority"] or 0) if "priority" in request else None,
            request.get("hash_block_ids"),
        )
        for request in requests
    ]
    for suffix in FORMATS:
        assert as_rows(list(read_trace(save(requests, folder / f"x.{suffix}")))) == expected


def rows(count: int, **more: object) -> list[Request]:
    return [
        {"arrival_s": i * 0.25, "prompt_tokens": i % 700 + 1, "output_tokens": i % 90 + 1, **more} for i in range(count)
    ]


@pytest.mark.parametrize("suffix", FORMATS)
def test_long_files_come_in_bounded_chunks(tmp_path, suffix):
    count = 70_000
    chunks = list(read_trace(save(rows(count), tmp_path / f"x.{suffix}")))
    assert len(chunks) > 1
    assert max(map(len, chunks)) <= traffic.CHUNK_REQUESTS
    assert np.array_equal(np.concatenate([chunk.arrival_s for chunk in chunks]), np.arange(count) * 0.25)
    assert np.array_equal(np.concatenate([chunk.prompt_tokens for chunk in chunks]), np.arange(count) % 700 + 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_reading_is_lazy(tmp_path, suffix):
    # The last row is bad, but whoever stops before it never hears of it: the file was not read to the end.
    requests = rows(140_000)
    requests[-1]["output_tokens"] = 0
    path = save(requests, tmp_path / f"x.{suffix}")
    chunks = read_trace(path)
    assert len(next(chunks)) <= traffic.CHUNK_REQUESTS
    with pytest.raises(InputError, match=r"(row|line) 140000, column 'output_tokens': .*got 0"):
        list(chunks)


@pytest.mark.parametrize(("module", "suffix"), [(csv_reader, "csv"), (jsonl_reader, "jsonl")])
def test_block_boundaries_leave_no_trace(tmp_path, monkeypatch, module, suffix):
    path = save(rows(500), tmp_path / f"x.{suffix}")
    whole = as_rows(list(read_trace(path)))
    for size in (200, 333, 1000):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        chunks = list(read_trace(path))
        assert len(chunks) > 5
        assert as_rows(chunks) == whole


def test_csv_tolerates_what_spreadsheets_write(tmp_path):
    path = tmp_path / "x.CSV"
    text = '\ufeffprompt_tokens, arrival_s ,output_tokens,session_id\r\n"12.0", 0,3,\r\n\r\n1e3,0.5,4,"a, b"'
    path.write_bytes(text.encode())
    assert as_rows(list(read_trace(path))) == [(0.0, 12, 3, None, None), (0.5, 1000, 4, None, None)]


def test_jsonl_skips_blank_lines_and_lets_optional_keys_come_and_go(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 1}\n\n'
        '{"output_tokens": 2, "prompt_tokens": 33, "arrival_s": 1.5, '
        '"hash_block_ids": [7, 8, 9], "hash_block_tokens": 16}\n'
        '{"arrival_s": 2, "prompt_tokens": 5, "output_tokens": 1, "priority": -3}\n'
    )
    assert as_rows(list(read_trace(path))) == [
        (0.0, 5, 1, 0, None),
        (1.5, 33, 2, 0, [7, 8, 9]),
        (2.0, 5, 1, -3, None),
    ]


def test_mooncake_lines_are_milliseconds_and_512_token_blocks(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"timestamp": 3000, "input_length": 513, "output_length": 7, "hash_ids": [4, 9]}\n'
        '{"timestamp": 3001, "input_length": 512, "output_length": 8, "hash_ids": [4]}\n'
    )
    (chunk,) = read_trace(path)
    assert as_rows([chunk]) == [(3.0, 513, 7, None, [4, 9]), (3.001, 512, 8, None, [4])]
    assert chunk.hash_block_tokens == 512


@pytest.mark.parametrize("zone", ["", "+00:00"])
def test_azure_dates_become_seconds_from_the_first_request(tmp_path, zone):
    path = tmp_path / "x.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        f"2023-11-16 18:17:03.9799600{zone},4808,10\n"
        f"2023-11-16 18:17:04.0319600{zone},3180,8\n"
        f"2023-11-17 18:17:03.9799601{zone},1,1\n"
    )
    assert as_rows(list(read_trace(path))) == [
        (0.0, 4808, 10, None, None),
        (0.052, 3180, 8, None, None),
        (86400.0000001, 1, 1, None, None),
    ]


def test_parquet_with_dates_and_wide_types(tmp_path):
    table = pa.table(
        {
            "TIMESTAMP": pa.array([1_700_000_000_000, 1_700_000_000_250], pa.timestamp("ms", "UTC")),
            "ContextTokens": pa.array([5, 6], pa.uint64()),
            "GeneratedTokens": pa.array([1.0, 2.0], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert as_rows(list(read_trace(tmp_path / "x.parquet"))) == [(0.0, 5, 1, None, None), (0.25, 6, 2, None, None)]


@pytest.mark.parametrize(
    ("name", "requests", "prompt_mean", "output_mean", "block"),
    [  # the figures of the sidecars
        ("mooncake-conversation", 12_031, 12_035, 343, 512),
        ("mooncake-synthetic", 3_993, 15_325, 149, 512),
        ("azure2023-code", 8_819, 2_048, 28, 0),
        ("azure2023-conv", 19_366, 1_155, 211, 0),
        ("servegen-deepseek-r1", 21_788, 735, 799, 0),
    ],
)
def test_packaged_traces_are_what_their_sidecars_say(name, requests, prompt_mean, output_mean, block):
    chunks = list(traffic.stream(TraceWorkload(trace=name), seed=0, trace_path=lambda n: TRACES / f"{n}.parquet"))
    assert sum(map(len, chunks)) == requests
    assert np.concatenate([chunk.prompt_tokens for chunk in chunks]).mean() == pytest.approx(prompt_mean, abs=0.5)
    assert np.concatenate([chunk.output_tokens for chunk in chunks]).mean() == pytest.approx(output_mean, abs=0.5)
    assert {chunk.hash_block_tokens for chunk in chunks} == {block}
    assert (np.diff(np.concatenate([chunk.arrival_s for chunk in chunks])) >= 0).all()
    sidecar = (TRACES / f"{name}.md").read_text()
    assert f"{requests:,} requests" in sidecar
    assert f"{(TRACES / f'{name}.parquet').stat().st_size:,} bytes" in sidecar


def test_time_scale_and_num_requests(tmp_path):
    path = save(rows(100, hash_block_ids=None, hash_block_tokens=None), tmp_path / "x.parquet")
    recorded = as_rows(list(traffic.stream(TraceWorkload(trace=str(path)), seed=0)))
    spec = TraceWorkload(trace=str(path), time_scale=2, num_requests=60)
    assert as_rows(list(traffic.stream(spec, seed=0))) == [(row[0] * 2, *row[1:]) for row in recorded[:60]]
    more = TraceWorkload(trace=str(path), num_requests=1000)
    assert as_rows(list(traffic.stream(more, seed=0))) == recorded


def test_num_requests_does_not_read_what_follows(tmp_path):
    requests = rows(80_000)
    requests[-1]["output_tokens"] = -1
    path = save(requests, tmp_path / "x.csv")
    for count in (1, 1000, traffic.CHUNK_REQUESTS):
        chunks = list(traffic.stream(TraceWorkload(trace=str(path), num_requests=count), seed=0))
        assert sum(map(len, chunks)) == count


def test_replaced_arrivals_keep_lengths_and_hashes():
    trace = str(TRACES / "mooncake-conversation.parquet")
    recorded = list(traffic.stream(TraceWorkload(trace=trace), seed=1))
    drawn = list(traffic.stream(TraceWorkload(trace=trace, arrivals=PoissonArrivals(rate=3.4)), seed=1))
    for one, other in zip(recorded, drawn, strict=True):
        assert np.array_equal(one.prompt_tokens, other.prompt_tokens)
        assert one.hash_block_ids == other.hash_block_ids
    arrival = np.concatenate([chunk.arrival_s for chunk in drawn])
    assert (np.diff(arrival) > 0).all()
    assert len(arrival) / arrival[-1] == pytest.approx(3.4, rel=0.04)


def test_a_file_of_lengths_alone_serves_where_arrivals_are_replaced(tmp_path):
    path = save([{"prompt_tokens": 5, "output_tokens": 2}] * 10, tmp_path / "x.parquet")
    source = traffic.closed_loop_source(TraceWorkload(trace=str(path), arrivals=ClosedLoop(concurrency=3)), seed=0)
    assert as_rows(list(source.chunks)) == [(0.0, 5, 2, None, None)] * 10
    with pytest.raises(InputError, match="missing column 'arrival_s'"):
        traffic.stream(TraceWorkload(trace=str(path)), seed=0)


def test_time_scale_needs_recorded_times():
    with pytest.raises(ValidationError, match="which arrivals replaces"):
        TraceWorkload(trace="x", time_scale=2, arrivals=PoissonArrivals(rate=1))


def test_a_time_scale_beyond_the_clock_is_an_error(tmp_path):
    path = save([{"arrival_s": 2e3, "prompt_tokens": 5, "output_tokens": 2}], tmp_path / "x.jsonl")
    with pytest.raises(InputError, match=r"workload\.time_scale = 1e\+06 stretches the trace to 2e\+09 s"):
        traffic.stream(TraceWorkload(trace=str(path), time_scale=1e6), seed=0)


def test_reading_a_trace_never_imports_pandas(tmp_path):
    # Arrow's own conversions do, at ten times the cost of reading the file.
    requests = rows(50, priority=1, hash_block_ids=None, hash_block_tokens=None)
    paths = [str(save(requests, tmp_path / f"x.{suffix}")) for suffix in FORMATS]
    paths += [str(TRACES / "mooncake-synthetic.parquet"), str(TRACES / "azure2023-code.parquet")]
    code = (
        "import sys; from pathlib import Path; from perfsim.traffic import read_trace\n"
        "for path in sys.argv[1:]: list(read_trace(Path(path)))\n"
        "print('pandas' in sys.modules, 'pyarrow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *paths]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TRACES.parents[1])
    assert result.stdout.split() == ["False", "True"]
