"""The Perfetto trace, read back by a parser of its own: what it holds, that slices nest, that its bytes repeat."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.report import protobuf
from perfsim.report.trace_file import TraceFile
from perfsim.run import simulate
from perfsim.serving.recorder import REQUEST_COLUMNS, SEGMENT_COLUMNS
from perfsim.serving.trace import draw_flows, lane_label
from perfsim.sim.clock import CountingEnvironment, call_at
from perfsim.sim.link import FairNetwork
from perfsim.spec.load import load_scenario
from perfsim.spec.policy import ParallelPlan

Message = dict[int, list[Any]]


def parse(data: bytes) -> Message:
    """Fields by number: ints, doubles, or raw bytes of what has a length."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                assert shift <= 70
                return value, at

    fields: Message = defaultdict(list)
    at = 0
    while at < len(data):
        key, at = number(at)
        kind = key & 7
        if kind == 0:
            value, at = number(at)
        elif kind == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        else:
            assert kind == 2
            size, at = number(at)
            value, at = data[at : at + size], at + size
            assert len(value) == size
        fields[key >> 3].append(value)
    return fields


class Viewer:
    """Reads a trace as trace_processor does: events sorted by time, those of equal times as they stand in the file."""

    def __init__(self, data: bytes) -> None:
        packets = [parse(packet) for packet in parse(data)[1]]
        interned = parse(packets[0][12][0])
        self.names = {kind: {parse(e)[1][0]: parse(e)[2][0].decode() for e in interned[kind]} for kind in (2, 3)}
        self.tracks: dict[int, Message] = {}
        events = []
        for packet in packets[1:]:
            assert packet[10] == [1]
            if 60 in packet:
                descriptor = parse(packet[60][0])
                assert descriptor[1][0] not in self.tracks, "two tracks with one uuid"
                self.tracks[descriptor[1][0]] = descriptor
            else:
                events.append((packet[8][0], parse(packet[11][0])))
        self.events = len(events)
        events.sort(key=lambda event: event[0])
        self.slices: dict[str, list[tuple[int, int, str, dict[str, float]]]] = defaultdict(list)
        self.counters: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.instants: dict[str, list[tuple[int, str]]] = defaultdict(list)
        opened: dict[int, list[tuple[int, Message]]] = defaultdict(list)
        for at, event in events:
            track, kind = event[11][0], event[9][0]
            if kind == 1:
                opened[track].append((at, event))
            elif kind == 2:
                begun, begin = opened[track].pop()
                arguments = {self.names[3][parse(a)[1][0]]: (parse(a)[3] or parse(a)[5])[0] for a in begin[4]}
                self.slices[self.path(track)].append((begun, at, self.names[2][begin[10][0]], arguments))
                assert not opened[track], "slices of one lane overlap"
            elif kind == 3:
                self.instants[self.path(track)].append((at, event[23][0].decode()))
            else:
                self.counters[self.path(track)].append((at, event[44][0]))
        assert not any(opened.values()), "a slice without an end"

    def path(self, track: int) -> str:
        descriptor = self.tracks[track]
        parent = self.tracks[descriptor[5][0]]
        return f"{parse(parent[3][0])[6][0].decode()}/{descriptor[2][0].decode()}"


def segments(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([float(row.get(name, 0)) for row in rows]) for name in SEGMENT_COLUMNS}


def requests(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([float(row.get(name, 0)) for row in rows]) for name in REQUEST_COLUMNS}


def steady(count: int, *, step: float = 0.01) -> dict[str, np.ndarray]:
    return segments([
        {"start_s": i * step, "steps": 1, "first_s": step, "decode_sequences": 4, "running": 4, "kv_blocks": i}
        for i in range(count)
    ])  # fmt: skip


def small(path: Path) -> Viewer:
    with TraceFile(path) as trace:
        first = trace.replica("replica-0", lane="TP 0-7")
        first.add_segments(segments([
            {"start_s": 0.5, "steps": 1, "first_s": 0.25, "tokens": 100, "prefill_tokens": 100, "running": 1,
             "waiting": 2, "kv_blocks": 7},
            {"start_s": 0.75, "steps": 1, "first_s": 0.25, "tokens": 51, "prefill_tokens": 50, "decode_sequences": 1,
             "running": 2, "waiting": 1, "kv_blocks": 11},
            {"start_s": 1.0, "steps": 3, "first_s": 0.1, "slope_s": 0.05, "tokens": 2, "decode_sequences": 2,
             "running": 2, "waiting": 1, "kv_blocks": 12},
            {"start_s": 4.0, "steps": 1, "first_s": 0.5, "prefill_tokens": 9, "running": 1},
        ]))  # fmt: skip
        first.add_requests(requests([
            {"request_index": 1, "queued_s": 0.6, "scheduled_s": 0.75, "first_token_s": 1.0, "finish_s": 1.45,
             "prompt_tokens": 50, "output_tokens": 4},
            {"request_index": 0, "queued_s": 0.5, "scheduled_s": 0.5, "first_token_s": 0.75, "finish_s": 1.1},
            {"request_index": 10**7, "queued_s": 0.6, "finish_s": 1.0},
        ]))  # fmt: skip
        trace.mark("replica-0", "failed", 2.0)
        trace.transfer("Links", "a to b", "K/V of request 1", 1.0, 3.0, bytes=2e9)
        trace.transfer("Links", "a to b", "K/V of request 0", 0.5, 1.5, bytes=1e9)
        second = trace.replica("replica-1", lane="DP 0")
        second.add_segments(steady(2))
        trace.replica("replica-1", lane="DP 1").add_segments(steady(2))
        second.add_gaps(np.ones(1), np.ones(1))
    assert trace.note is None
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    return Viewer(path.read_bytes())


def test_lanes_hold_steps_with_their_numbers(tmp_path: Path) -> None:
    seen = small(tmp_path / "t").slices["replica-0/TP 0-7"]
    assert [(begin, end, name) for begin, end, name, _ in seen] == [
        (500_000_000, 750_000_000, "prefill"),
        (750_000_000, 1_000_000_000, "mixed"),
        (1_000_000_000, 1_450_000_000, "decode"),
        (4_000_000_000, 4_500_000_000, "prefill"),
    ]
    assert seen[2][3] == {
        "steps": 3, "sequences": 2, "decoding": 2, "tokens per step": 2, "prompt tokens per step": 0, "waiting": 1,
        "KV blocks": 12, "first step, s": 0.1, "added per step, s": 0.05,
    }  # fmt: skip


def test_counters_change_with_the_steps_and_fall_to_zero_when_idle(tmp_path: Path) -> None:
    counters = small(tmp_path / "t").counters
    assert counters["replica-0/queue"] == [(500_000_000, 2), (750_000_000, 1), (1_450_000_000, 0)]
    assert counters["replica-0/batch"] == [
        (500_000_000, 1), (750_000_000, 2), (1_450_000_000, 0), (4_000_000_000, 1), (4_500_000_000, 0)
    ]  # fmt: skip
    assert [value for _, value in counters["replica-0/KV blocks"]] == [7, 11, 12, 0]
    assert {path for path in counters if path.startswith("replica-1")} == {
        f"replica-1/{name}, DP {rank}" for name in ("batch", "queue", "KV blocks") for rank in (0, 1)
    }


def test_a_simulation_draws_every_step_of_its_engine(tmp_path: Path) -> None:
    scenario = load_scenario("default", overrides=["workload.num_requests=60"])
    with TraceFile(tmp_path / "t") as trace:
        result = simulate(scenario, trace=trace)
    viewer = Viewer((tmp_path / "t").read_bytes())
    (lane,) = (path for path in viewer.slices if not path.endswith("/requests"))
    assert sum(arguments["steps"] for *_, arguments in viewer.slices[lane]) == result.simulation["steps"]
    busy = sum(end - begin for begin, end, *_ in viewer.slices[lane]) / 1e9
    spent = sum(seconds for name, seconds in result.breakdown.items() if name != "idle")
    assert busy == pytest.approx(spent, rel=1e-6)
    assert len(viewer.slices["replica/requests"]) == 3 * 60


def test_requests_transfers_and_marks_have_lanes(tmp_path: Path) -> None:
    viewer = small(tmp_path / "t")
    assert [(begin, end, name, arguments["request"]) for begin, end, name, arguments in
            sorted(viewer.slices["replica-0/requests"], key=lambda s: (s[3]["request"], s[0]))] == [
        (500_000_000, 500_000_000, "queued", 0), (500_000_000, 750_000_000, "prefill", 0),
        (750_000_000, 1_100_000_000, "decode", 0), (600_000_000, 750_000_000, "queued", 1),
        (750_000_000, 1_000_000_000, "prefill", 1), (1_000_000_000, 1_450_000_000, "decode", 1),
    ]  # fmt: skip
    assert viewer.instants["replica-0/events"] == [(2_000_000_000, "failed")]
    assert [(begin, end, name, arguments) for begin, end, name, arguments in viewer.slices["Links/a to b"]] == [
        (500_000_000, 1_500_000_000, "K/V of request 0", {"bytes": 10**9}),
        (1_000_000_000, 3_000_000_000, "K/V of request 1", {"bytes": 2 * 10**9}),
    ]


def test_flows_of_a_network_are_drawn_on_their_links(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "t") as trace:
        env = CountingEnvironment()
        network = FairNetwork(env, observer=draw_flows(trace))
        for name in ("out", "in"):
            network.add_link(name, 100.0)
        network.transfer(["out", "in"], 50.0, latency=9.0, tag="K/V of request 3")
        gone = network.transfer(["in"], 500.0)
        call_at(env, 2.0, lambda _: network.cancel(gone))
        env.run()
    slices = Viewer((tmp_path / "t").read_bytes()).slices
    first = (0, 1_000_000_000, "K/V of request 3", {"bytes": 50})
    assert slices["Links/out"] == [first]
    assert sorted(slices["Links/in"], key=lambda s: s[1]) == [first, (0, 2_000_000_000, "transfer", {"bytes": 150})]


@pytest.mark.parametrize(
    ("plan", "rank", "label"),
    [({"tp": 8}, None, "TP 0-7"), ({}, None, "GPU 0"), ({"tp": 4, "pp": 2}, None, "PP 0 of 2 x TP 0-3"),
     ({"tp": 2, "dp": 4, "ep": 8}, 3, "DP 3 x TP 0-1"), ({"dp": 4}, None, "DP 0-3")],
)  # fmt: skip
def test_lanes_are_labelled_by_their_ranks(plan: dict[str, int], rank: int | None, label: str) -> None:
    assert lane_label(ParallelPlan(**plan), dp_rank=rank) == label


def test_the_same_run_gives_the_same_bytes_however_it_is_cut_into_chunks(tmp_path: Path) -> None:
    rows = steady(50)
    for name, size in (("one", 50), ("many", 7)):
        with TraceFile(tmp_path / name) as trace:
            lane = trace.replica("r", lane="TP 0")
            for low in range(0, 50, size):
                lane.add_segments({key: values[low : low + size] for key, values in rows.items()})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_a_long_trace_ends_at_one_time_for_all_and_says_so(tmp_path: Path) -> None:
    # Replicas hand over their rows one after the other, as at the end of a run; none may squeeze out another.
    with TraceFile(tmp_path / "t", max_events=1000) as trace:
        for name in ("a", "b", "c"):
            lane = trace.replica(name, lane="TP 0")
            for _ in range(3):
                lane.add_segments(steady(200))
        trace.mark("a", "too late to be seen", 100.0)
    assert trace.note is not None
    viewer = Viewer((tmp_path / "t").read_bytes())
    assert viewer.events <= 1001
    ends = [viewer.slices[f"{name}/TP 0"][-1][1] for name in ("a", "b", "c")]
    assert max(ends) - min(ends) <= 10_000_000
    ((at, text),) = viewer.instants["perfsim/events"]
    assert text == trace.note
    assert "1,000 events" in text
    assert at <= max(ends)
    assert "a/events" not in viewer.instants


def test_no_file_is_left_by_a_run_that_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with TraceFile(tmp_path / "t") as trace:
            trace.replica("r", lane="TP 0").add_segments(steady(3))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_run_has_a_trace(tmp_path: Path) -> None:
    with TraceFile(tmp_path / "t") as trace:
        trace.replica("r", lane="TP 0")
    viewer = Viewer((tmp_path / "t").read_bytes())
    assert viewer.events == 0
    assert len(viewer.tracks) == 4  # the process and its counters


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 1)), min_size=1, max_size=30))
def test_slices_that_overlap_go_to_lanes_of_their_own(tmp_path_factory: pytest.TempPathFactory,
                                                      spans: list[tuple[float, float]]) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("traces") / "t"
    with TraceFile(path) as trace:
        for start, length in spans:
            trace.transfer("KV tiers", "DRAM", "load", start, start + length, bytes=1)
    viewer = Viewer(path.read_bytes())  # which checks that the slices of one track do not overlap
    seen = sorted((begin, end) for begin, end, *_ in viewer.slices["KV tiers/DRAM"])
    expected = sorted((round(start * 1e9), round((start + length) * 1e9)) for start, length in spans)
    assert len(seen) == len(expected)
    assert np.abs(np.array(seen) - np.array(expected)).max() <= 1
    at_once = max(sum(b <= begin <= e for b, e in expected) for begin, _ in expected)
    assert sum(5 in track for track in viewer.tracks.values()) <= at_once


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=20), st.integers(1, 2**28))
def test_columns_and_single_fields_decode_to_the_same_numbers(values: list[int], number: int) -> None:
    rows = protobuf.table(len(values), protobuf.message(3, protobuf.integers(number, np.array(values))))
    assert [parse(row)[number][0] for row in parse(rows)[3]] == values
    single = b"".join(protobuf.field(3, protobuf.field(number, value)) for value in values)
    assert [parse(row)[number][0] for row in parse(single)[3]] == values
    assert len(single) <= len(rows)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        protobuf.field(1, -1)
    with pytest.raises(ValueError, match="negative"):
        protobuf.integers(1, np.array([3, -1]))
