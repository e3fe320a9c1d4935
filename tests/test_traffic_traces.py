"""Traces that say who asked, traces that benchmarks saved, and runs replayed as traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim import traffic
from perfsim.errors import InputError
from perfsim.metrics import requests_table
from perfsim.metrics.requests_table import ParquetSpool
from perfsim.serving.recorder import REQUEST_COLUMNS
from perfsim.spec.policy import LoraServing
from perfsim.spec.workload import PoissonArrivals, SyntheticWorkload, TraceWorkload
from perfsim.traffic import read_trace
from perfsim.traffic.choice import DistinctChooser, zipf_chooser

FORMATS = ("csv", "jsonl", "parquet")


def save(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Columns as a trace in the format of the suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
        path.write_text("\n".join(",".join(line) for line in [list(columns), *cells]) + "\n")
    return path


def labelled(path: Path, **labels: list[Any]) -> traffic.RequestChunk:
    count = len(next(iter(labels.values())))
    plain = {"arrival_s": [0.5 * i for i in range(count)], "prompt_tokens": [9] * count, "output_tokens": [3] * count}
    (chunk,) = read_trace(save(path, {**plain, **labels}))
    return chunk


def ids(column: np.ndarray | None) -> list[int] | None:
    return None if column is None else column.tolist()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["session_id", "conversation_id", "chat_id", "user_id"])
def test_sessions_are_read_under_several_names(tmp_path, suffix, name):
    chunk = labelled(tmp_path / f"x.{suffix}", **{name: [7, None, 7, 12]})
    assert ids(chunk.session_id) == [7, -1, 7, 12]
    names = ids(labelled(tmp_path / f"y.{suffix}", **{name: ["ada", "bob", None, "ada"]}).session_id)
    assert names[0] == names[3] != names[1]
    assert names[2] == -1
    assert 0 <= min(names[0], names[1]) < max(names[0], names[1]) < 2**52
    assert ids(labelled(tmp_path / f"z.{suffix}", **{name: [None, None]}).session_id) is None


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", ["adapter", "lora", "lora_name", "lora_id", "model"])
def test_adapters_are_numbers_or_names_in_order_of_appearance(tmp_path, suffix, name):
    assert ids(labelled(tmp_path / f"x.{suffix}", **{name: [3, None, 0]}).adapter) == [3, -1, 0]
    assert ids(labelled(tmp_path / f"y.{suffix}", **{name: ["sql", None, "chat", "sql"]}).adapter) == [0, -1, 1, 0]


def test_the_same_session_is_the_same_number_in_every_format(tmp_path):
    labels = ["17", "tenant 4", "", "9" * 30]
    numbers = {tuple(ids(labelled(tmp_path / f"x.{s}", session_id=labels).session_id)) for s in FORMATS}
    assert len(numbers) == 1
    ((first, _, none, long),) = numbers
    assert (first, none) == (17, -1)
    large = labelled(tmp_path / "z.jsonl", session_id=[17, 4, None, int("9" * 30)])
    assert ids(large.session_id) == [17, 4, -1, long]


def test_of_several_names_the_conversation_counts(tmp_path):
    chunk = labelled(tmp_path / "x.csv", user_id=[1, 1], conversation_id=[5, 6], model=["base", "base"], lora=[0, 2])
    assert ids(chunk.session_id) == [5, 6]
    assert ids(chunk.adapter) == [0, 2]


@pytest.mark.parametrize(
    ("suffix", "labels", "message"),
    [
        ("jsonl", {"session_id": [1, -2]}, "line 2, column 'session_id': expected a whole number from 0 or a"),
        ("jsonl", {"user_id": [True]}, "line 1, column 'user_id': expected a whole number from 0 or a name, got True"),
        ("jsonl", {"session_id": [[1]]}, "line 1, column 'session_id'"),
        ("parquet", {"session_id": [1, 2.5]}, "row 2, column 'session_id': expected a whole number"),
        ("parquet", {"adapter": [-1]}, "row 1, column 'adapter': expected a whole number"),
        ("csv", {"lora": ["a", 1]}, "row 2, column 'lora': expected all numbers or all names, got '1'"),
        ("parquet", {"adapter": [[1]]}, "column 'adapter': expected numbers or text"),
    ],
)  # fmt: skip
def test_bad_labels(tmp_path, suffix, labels, message):
    with pytest.raises(InputError) as caught:
        labelled(tmp_path / f"x.{suffix}", **labels)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_go_through_a_workload(tmp_path):
    path = save(tmp_path / "x.csv", {"prompt_tokens": [1, 2], "output_tokens": [1, 1], "session_id": [4, 4],
                                     "adapter": [1, None]})  # fmt: skip
    workload = TraceWorkload(trace=str(path), arrivals=PoissonArrivals(rate=1))
    (chunk,) = traffic.stream(workload, seed=0, lora=LoraServing(num_adapters=2))
    assert (ids(chunk.session_id), ids(chunk.adapter)) == ([4, 4], [1, -1])
    (plain,) = traffic.stream(workload, seed=0)
    assert (ids(plain.session_id), plain.adapter) == ([4, 4], None)
    with pytest.raises(InputError, match="num_adapters is 1, but the trace names adapter 1"):
        list(traffic.stream(workload, seed=0, lora=LoraServing(num_adapters=1)))


def test_adapters_are_drawn_with_their_popularity():
    workload = SyntheticWorkload.model_validate({
        "num_requests": 100_000, "arrivals": {"kind": "poisson", "rate": 5}, "prompt": {"kind": "fixed", "tokens": 9},
        "output": {"kind": "fixed", "tokens": 2},
    })  # fmt: skip
    drawn = np.concatenate([c.adapter for c in traffic.stream(workload, seed=0, lora=LoraServing(num_adapters=4))])
    assert np.abs(np.bincount(drawn) / 1e5 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 1e5)
    lora = LoraServing(num_adapters=4, popularity=1.0)
    drawn = np.concatenate([chunk.adapter for chunk in traffic.stream(workload, seed=0, lora=lora)])
    share = 1 / np.arange(1, 5) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    assert (np.abs(np.bincount(drawn) / 1e5 - share) < 4 * np.sqrt(share * (1 - share) / 1e5)).all()
    one, other = (next(traffic.stream(workload, seed=0, lora=lora)) for lora in (None, lora))
    assert np.array_equal(one.prompt_tokens, other.prompt_tokens)


def test_distinct_choices_are_distinct_and_those_of_drawing_without_replacement():
    rng = np.random.Generator(np.random.PCG64(1))
    chooser = DistinctChooser(3, exponent=1.0, rng=rng)
    drawn = [tuple(chooser.take(2)) for _ in range(60_000)]
    weight = np.array([6, 3, 2]) / 11
    for first in range(3):
        for second in range(3):
            chance = 0.0 if first == second else weight[first] * weight[second] / (1 - weight[first])
            share = drawn.count((first, second)) / len(drawn)
            assert share == pytest.approx(chance, abs=4 * np.sqrt(chance * (1 - chance) / len(drawn)))
    steep = DistinctChooser(40, exponent=5.0, rng=rng)
    assert sorted(steep.take(40)) == list(range(40))
    assert zipf_chooser(1, exponent=3.0, rng=rng)(5).tolist() == [0] * 5


# --- a run's requests as a trace ------------------------------------------------------------------------------------


def completed(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of a run in order of completion, some of them long in flight."""
    rng = np.random.default_rng(seed)
    arrival = np.round(np.cumsum(rng.exponential(0.1, count)), 1)  # with ties
    columns = {name: np.zeros(count) for name in REQUEST_COLUMNS}
    columns |= {
        "request_index": np.arange(count), "arrival_s": arrival, "first_token_s": arrival + 1,
        "finish_s": arrival + 1 + rng.choice([0.1, 5.0, 300.0], count, p=[0.6, 0.39, 0.01]),
        "prompt_tokens": rng.integers(1, 900, count), "output_tokens": rng.integers(1, 90, count),
        "session_id": rng.integers(-1, 5, count), "adapter": np.full(count, -1),
    }  # fmt: skip
    order = np.argsort(columns["finish_s"], kind="stable")
    return {name: column[order] for name, column in columns.items()}


@pytest.mark.parametrize("rows_per_group", [64, 1000, 1 << 17])
def test_a_run_is_replayed_in_order_of_arrival(tmp_path, monkeypatch, rows_per_group):
    monkeypatch.setattr(requests_table, "ROWS_PER_GROUP", rows_per_group)
    columns = completed(5000)
    with ParquetSpool(tmp_path / "requests.parquet", egress=0.001) as spool:
        spool.add(columns)
    chunks = list(read_trace(tmp_path / "requests.parquet"))
    order = np.argsort(columns["request_index"])
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "session_id"):
        assert np.array_equal(np.concatenate([getattr(chunk, name) for chunk in chunks]), columns[name][order])
    assert (len(chunks) > 10) == (rows_per_group == 64)
    lengths = list(read_trace(tmp_path / "requests.parquet", need_arrivals=False))
    assert np.array_equal(np.concatenate([chunk.prompt_tokens for chunk in lengths]), columns["prompt_tokens"][order])
    head = TraceWorkload(trace=str(tmp_path / "requests.parquet"), num_requests=100)
    assert sum(map(len, traffic.stream(head, seed=0))) == 100


# --- what benchmarks save -------------------------------------------------------------------------------------------


def vllm_result(**changes: Any) -> dict[str, Any]:
    """As `vllm bench serve --save-detailed` of vLLM 0.32 writes it, per-token lists left out."""
    return {
        "date": "20260101-000000", "backend": "openai-chat", "num_prompts": 4, "request_rate": 2.0, "completed": 3,
        "total_input_tokens": 60, "input_lens": [10, 20, 0, 30], "output_lens": [5, 6, 0, 7],
        "start_times": [1000.5, 1000.0, 1000.2, 1003.0], "errors": ["", "", "timeout", ""], **changes,
    }  # fmt: skip


def guidellm_report(*benchmarks: list[dict[str, Any]]) -> dict[str, Any]:
    """As GuideLLM 0.8.1 writes it (report version 2), metrics left out."""
    return {
        "metadata": {"version": 2},
        "config": {},
        "benchmarks": [{"requests": {"successful": done, "errored": [], "incomplete": []}} for done in benchmarks],
    }


def guidellm_request(start: float, prompt: int | None, output: int | None, conversation: str | None) -> dict[str, Any]:
    return {
        "request_id": "r", "info": {"conversation_id": conversation, "turn_index": 0}, "request_start_time": start,
        "prompt_tokens": prompt, "output_tokens": output,
    }  # fmt: skip


def test_a_vllm_benchmark_is_a_trace(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(vllm_result()))
    (chunk,) = read_trace(path)
    assert chunk.arrival_s.tolist() == [0.0, 0.5, 3.0]
    assert chunk.prompt_tokens.tolist() == [20, 10, 30]
    assert chunk.output_tokens.tolist() == [6, 5, 7]
    old = vllm_result()
    del old["start_times"]
    path.write_text(json.dumps(old))
    (chunk,) = read_trace(path, need_arrivals=False)
    assert chunk.prompt_tokens.tolist() == [10, 20, 30]


def test_a_guidellm_report_is_a_trace(tmp_path):
    path = tmp_path / "benchmarks.json"
    first = [guidellm_request(1.7e9 + 2, 9, 4, "b"), guidellm_request(1.7e9, 7, 3, "a")]
    second = [guidellm_request(1.8e9, 5, 1, None)]
    path.write_text(json.dumps(guidellm_report(first, second)))
    (chunk,) = read_trace(path, benchmark=0)
    assert (chunk.arrival_s.tolist(), chunk.prompt_tokens.tolist()) == ([0.0, 2.0], [7, 9])
    assert len(set(ids(chunk.session_id))) == 2
    (chunk,) = traffic.stream(TraceWorkload(trace=str(path), benchmark=1), seed=0)
    assert (chunk.output_tokens.tolist(), chunk.session_id) == ([1], None)


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in vllm_result().items() if name != key}


@pytest.mark.parametrize(
    ("content", "benchmark", "message"),
    [
        ("{", None, "expected the JSON of a benchmark; JSON Lines end in .jsonl"),
        ("[1]", None, "expected a JSON object saved by vLLM's or GuideLLM's benchmark"),
        ({}, None, "the list 'start_times' is missing; expected"),
        (without("input_lens"), None, "the list 'input_lens' is missing (vllm bench serve saves it with --save-d"),
        (without("start_times"), None, "the list 'start_times' is missing"),
        (vllm_result(input_lens=[1]), None, "expected lists of equal length, got start_times 4, input_lens 1, output"),
        (vllm_result(input_lens=[10, "x", 0, 3]), None, "entry 2, column 'input_lens': expected a whole number"),
        (vllm_result(input_lens=[10, 0, 0, 3]), None, "entry 2, column 'input_lens': expected a whole number"),
        (vllm_result(start_times=[1, None, 2, 3]), None, "request 2: expected the time it was sent in seconds, got N"),
        (vllm_result(output_lens=[0, 0, 0, 0]), None, "empty trace"),
        (vllm_result(), 0, "benchmark = 0 chooses in a GuideLLM report, which this is not"),
        (guidellm_report([], []), None, "holds 2 benchmarks; choose one with workload.benchmark = 0 to 1"),
        (guidellm_report([], []), 2, "workload.benchmark = 2, but it holds 2, counted from 0"),
        (guidellm_report([]), None, "empty trace"),
        (guidellm_report(), None, "holds no benchmarks"),
        ({"benchmarks": [{}]}, None, "expected a list requests.successful in each benchmark"),
        (guidellm_report([guidellm_request(1.7e9, None, 4, None)]), None, "request 1, column 'prompt_tokens': expe"),
    ],
)  # fmt: skip
def test_bad_benchmarks(tmp_path, content, benchmark, message):
    path = tmp_path / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        list(read_trace(path, benchmark=benchmark))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_benchmark_is_chosen_in_a_report_only(tmp_path):
    path = save(tmp_path / "x.csv", {"arrival_s": [0.0], "prompt_tokens": [1], "output_tokens": [1]})
    with pytest.raises(InputError, match=r"benchmark = 1 chooses in a GuideLLM report, which is a \.json file"):
        read_trace(path, benchmark=1)
