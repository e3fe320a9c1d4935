"""From rows of a run to the tracks of one process in a Perfetto trace."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from perfsim.metrics.steps import durations
from perfsim.report import perfetto
from perfsim.report.perfetto import Names, nanoseconds

if TYPE_CHECKING:
    from perfsim.metrics.quantiles import Floats, Ints

# What is kept of each row; the first column is the time at which it begins.
SEGMENT = ("start_s", "steps", "first_s", "slope_s", "tokens", "decode_sequences", "prefill_tokens", "running",
            "waiting", "kv_blocks")  # fmt: skip
REQUEST = ("queued_s", "request_index", "scheduled_s", "first_token_s", "finish_s", "prompt_tokens", "output_tokens",
            "cached_tokens", "preemptions")  # fmt: skip
TRANSFER = ("start_s", "end_s", "bytes", "name")
_COUNTERS = (("batch", "running", "sequences"), ("queue", "waiting", "requests"), ("KV blocks", "kv_blocks", "blocks"))


class Process:
    """Writes the tracks of one process, numbered upwards from its own uuid, into `parts`."""

    def __init__(self, names: Names, uuid: int, *, pid: int, name: str) -> None:
        self._names = names
        self._uuid = uuid
        self.last = uuid
        self.parts = [perfetto.process(uuid, pid, name)]

    def _track(self, name: str) -> int:
        self.last += 1
        self.parts.append(perfetto.track(self.last, self._uuid, self.last - self._uuid, name))
        return self.last

    def _tracks(self, name: str, lanes: Ints) -> Ints:
        """A track for each of the lanes that slices which overlap were put on."""
        tracks = [self._track(name) for _ in range(int(lanes.max(initial=-1)) + 1)]
        return np.array(tracks, dtype=np.int64)[lanes] if tracks else lanes

    def _counter(self, name: str, unit: str, times: Ints, values: Floats) -> None:
        self.last += 1
        self.parts.append(perfetto.counter(self.last, self._uuid, self.last - self._uuid, name, unit))
        changed = np.ones(len(values), dtype=bool)
        changed[1:] = values[1:] != values[:-1]
        self.parts.append(perfetto.counts(self.last, times[changed], values[changed]))

    def marks(self, rows: Floats, texts: list[str]) -> None:
        uuid = self._track("events")
        for at, text in zip(nanoseconds(rows[0]).tolist(), rows[1].astype(int).tolist(), strict=True):
            self.parts.append(perfetto.instant(uuid, at, texts[text]))

    def segments(self, rows: Floats, label: str, *, several: bool) -> None:
        data = dict(zip(SEGMENT, rows, strict=True))
        starts, ends = nanoseconds(data["start_s"]), nanoseconds(data["start_s"] + durations(data))
        kinds = [self._names.slice(name) for name in ("decode", "prefill", "mixed")]
        prefill, decode = data["prefill_tokens"] > 0, data["decode_sequences"] > 0
        names = np.array(kinds)[np.where(prefill, np.where(decode, 2, 1), 0)]
        arguments = {self._names.argument(name): data[key].astype(np.int64) for name, key in (
            ("steps", "steps"), ("sequences", "running"), ("decoding", "decode_sequences"),
            ("tokens per step", "tokens"), ("prompt tokens per step", "prefill_tokens"), ("waiting", "waiting"),
            ("KV blocks", "kv_blocks"))}  # fmt: skip
        seconds = {self._names.argument("first step, s"): data["first_s"],
                   self._names.argument("added per step, s"): data["slope_s"]}  # fmt: skip
        lanes, ends = _lanes(starts, ends)
        tracks = self._tracks(label, lanes)
        self.parts.append(perfetto.slices(tracks, starts, ends, names, {**arguments, **seconds}))
        times, (batch, queue, blocks) = _with_idle(starts, ends, [data[key] for _, key, _ in _COUNTERS])
        for (name, _, unit), values in zip(_COUNTERS, (batch, queue, blocks), strict=True):
            self._counter(f"{name}, {label}" if several else name, unit, times, values)

    def requests(self, rows: Floats) -> None:
        if not rows.shape[1]:
            return
        data = dict(zip(REQUEST, rows, strict=True))
        lanes, finish = _lanes(nanoseconds(data["queued_s"]), nanoseconds(data["finish_s"]))
        tracks = self._tracks("requests", lanes)
        # Three slices per request, one after the other.
        times = np.stack([nanoseconds(data[name]) for name in ("queued_s", "scheduled_s", "first_token_s")])
        times = np.concatenate([np.minimum(times, finish), finish[None]])
        names = [self._names.slice(name) for name in ("queued", "prefill", "decode")]
        arguments = {self._names.argument(name): np.repeat(data[key].astype(np.int64), 3) for name, key in (
            ("request", "request_index"), ("prompt tokens", "prompt_tokens"), ("cached tokens", "cached_tokens"),
            ("output tokens", "output_tokens"), ("preemptions", "preemptions"))}  # fmt: skip
        self.parts.append(perfetto.slices(np.repeat(tracks, 3), times[:3].T.ravel(), times[1:].T.ravel(),
                                          np.tile(names, len(tracks)), arguments))  # fmt: skip

    def transfers(self, lane: str, rows: Floats, texts: list[str]) -> None:
        starts, ends = nanoseconds(rows[0]), nanoseconds(rows[1])
        lanes, ends = _lanes(starts, ends)
        tracks = self._tracks(lane, lanes)
        names = np.array([self._names.slice(texts[int(text)]) for text in rows[3]], dtype=np.int64)
        size = {self._names.argument("bytes"): rows[2].astype(np.int64)}
        self.parts.append(perfetto.slices(tracks, starts, ends, names, size))


def _lanes(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """The lowest lane that is free for each slice, in order of time; ends are cut where rounding made them overlap.

    Rounding to nanoseconds, or a sum in another order, may put a slice's end one past the next one's start.
    """
    ends = ends.copy()
    if np.all(starts[1:] >= ends[:-1] - 1):
        ends[:-1] = np.minimum(ends[:-1], starts[1:])
        return np.zeros(len(starts), dtype=np.int64), np.maximum(ends, starts)
    lanes = np.zeros(len(starts), dtype=np.int64)
    free: list[int] = [0]  # lanes without a slice at this time
    busy: list[tuple[int, int, int]] = []  # (end, lane, row)
    used = 1
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        while busy and busy[0][0] <= start + 1:
            _, lane, before = heapq.heappop(busy)
            ends[before] = min(ends[before], start)
            heapq.heappush(free, lane)
        if not free:
            free.append(used)
            used += 1
        lanes[row] = heapq.heappop(free)
        heapq.heappush(busy, (end, int(lanes[row]), row))
    return lanes, np.maximum(ends, starts)


def _with_idle(starts: Ints, ends: Ints, values: list[Floats]) -> tuple[Ints, list[Floats]]:
    """Times and values of counters that fall to zero where nothing runs."""
    if not len(starts):
        return starts, values
    latest = np.maximum.accumulate(ends)
    idle = np.append(starts[1:] > latest[:-1] + 1, True)
    times = np.concatenate([starts, latest[idle]])
    order = np.argsort(times, kind="stable")
    return times[order], [np.concatenate([each, np.zeros(int(idle.sum()))])[order] for each in values]
