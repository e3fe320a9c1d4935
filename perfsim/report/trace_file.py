"""`trace.pftrace`: one run as a timeline for the Perfetto viewer (https://ui.perfetto.dev), up to a bound on its size.

A process per replica holds a lane per lock-step group of ranks with its engine steps (a slice is a run of equal
steps), counters of batch, queue and KV blocks, and the first requests; links and KV tiers hold their transfers. Time
is simulated time. The same run gives the same bytes: rows are buffered and written in order when the file is closed.
"""

from __future__ import annotations

import math
from array import array
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from perfsim.report.perfetto import Names
from perfsim.report.trace_tracks import REQUEST, SEGMENT, TRANSFER, Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    from perfsim.metrics.quantiles import Floats
    from perfsim.serving.recorder import Columns

# About 45 bytes each: the viewer opens such a file in seconds, and more would not be looked at.
MAX_EVENTS = 1_000_000
# Requests that get a lane of their own, by index in the traffic; more would bury the engine's lanes.
MAX_REQUESTS = 200
_SEGMENT_EVENTS, _REQUEST_EVENTS, _TRANSFER_EVENTS, _MARK_EVENTS = 5, 6, 2, 1


class _Rows:
    """Columns that arrive in chunks or row by row; the first column is the time at which a row begins."""

    __slots__ = ("_chunks", "_columns", "_loose", "weight")

    def __init__(self, columns: tuple[str, ...], weight: int) -> None:
        self._columns = columns
        self._chunks: list[Floats] = []
        self._loose = array("d")
        self.weight = weight

    def add(self, columns: Mapping[str, Any]) -> int:
        """Keep a chunk; the events that this makes."""
        chunk = np.stack([np.asarray(columns[name], dtype=np.float64) for name in self._columns])
        self._chunks.append(chunk)
        return self.weight * int(chunk.shape[1])

    def append(self, *row: float) -> int:
        """Keep one row; the events that this makes."""
        self._loose.extend(row)
        return self.weight

    def whole(self) -> Floats:
        """All rows in order of time, those of equal times as they came; one row of the array per column."""
        width = len(self._columns)
        rows = np.concatenate([np.empty((width, 0)), *self._chunks, np.array(self._loose).reshape(-1, width).T], axis=1)
        self._loose = array("d")
        self._chunks = [rows[:, np.argsort(rows[0], kind="stable")]]
        return self._chunks[0]

    def until(self, horizon: float) -> int:
        """Drop rows that begin at the horizon or later; the events that are left."""
        rows = self.whole()
        self._chunks = [rows[:, rows[0] < horizon]]
        return self.weight * int(self._chunks[0].shape[1])


class _Lane:
    """The sink of one scheduler: its segments and its first requests."""

    def __init__(self, file: TraceFile, label: str) -> None:
        self._file = file
        self.label = label
        self.segments = _Rows(SEGMENT, _SEGMENT_EVENTS)
        self.requests = _Rows(REQUEST, _REQUEST_EVENTS)

    def add_segments(self, columns: Columns) -> None:
        self._file.count(self.segments.add(columns))

    def add_requests(self, columns: Columns) -> None:
        first = columns["request_index"] < self._file.max_requests
        if first.any():
            self._file.count(self.requests.add({name: columns[name][first] for name in REQUEST}))

    def add_gaps(self, seconds: Floats, weights: Floats) -> None: ...


class TraceFile:
    """A trace that appears at `path` when it is closed; use it as a context manager, an exception leaves no file.

    At most `max_events` beginnings and ends of slices and values of counters are kept: beyond, the trace ends early,
    for all lanes at the same simulated time; `note` says when, and so does a mark in the trace. Memory stays within
    twice the bound.
    Implements `perfsim.serving.trace.Trace`.
    """

    def __init__(self, path: str | Path, *, max_events: int = MAX_EVENTS, max_requests: int = MAX_REQUESTS) -> None:
        self._path = Path(path)
        self._max_events = max_events
        self.max_requests = max_requests
        self._replicas: dict[str, list[_Lane]] = {}
        self._marks: dict[str, _Rows] = {}
        self._transfers: dict[tuple[str, str], _Rows] = {}
        self._texts: dict[str, int] = {}
        self._events = 0
        self._horizon = math.inf
        self.note: str | None = None

    def replica(self, name: str, *, lane: str) -> _Lane:
        """A sink for one scheduler of replica `name`; `lane` says which ranks it stands for."""
        made = _Lane(self, lane)
        self._replicas.setdefault(name, []).append(made)
        return made

    def transfer(self, group: str, lane: str, name: str, start_s: float, end_s: float, *, bytes: float) -> None:
        """`bytes` called `name` that crossed `lane` of `group` between two times."""
        rows = self._transfers.setdefault((group, lane), _Rows(TRANSFER, _TRANSFER_EVENTS))
        self.count(rows.append(start_s, end_s, bytes, self._text(name)))

    def mark(self, replica: str, text: str, at_s: float) -> None:
        """A moment in the life of a replica."""
        rows = self._marks.setdefault(replica, _Rows(("at_s", "text"), _MARK_EVENTS))
        self.count(rows.append(at_s, self._text(text)))

    def count(self, events: int) -> None:
        """`events` more are held; twice the bound is cut back to it."""
        self._events += events
        if self._events > 2 * self._max_events:
            self._cut()

    def close(self) -> None:
        """Write the file and move it into place."""
        if self._events > self._max_events:
            self._cut()
        elif self.note is not None:  # what came after the last cut
            for each in self._everything():
                each.until(self._horizon)
        names = Names()
        parts = list(self._packets(names))
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_bytes(b"".join((names.packet(), *parts)))
        partial.replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if kind is None:
            self.close()

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def _everything(self) -> list[_Rows]:
        lanes = [lane for lanes in self._replicas.values() for lane in lanes]
        return [*(lane.segments for lane in lanes), *(lane.requests for lane in lanes), *self._transfers.values(),
                *self._marks.values()]  # fmt: skip

    def _cut(self) -> None:
        """Drop the latest rows of all lanes alike until the bound is met."""
        rows = self._everything()
        starts = [each.whole()[0] for each in rows]
        weights = np.repeat([each.weight for each in rows], [len(each) for each in starts])
        times = np.concatenate(starts)
        order = np.argsort(times, kind="stable")
        first_out = int(np.searchsorted(np.cumsum(weights[order]), self._max_events, side="right"))
        self._horizon = min(self._horizon, float(times[order[first_out]]))
        self._events = sum(each.until(self._horizon) for each in rows)
        self.note = f"the trace ends at {self._horizon:g} s: it holds no more than {self._max_events:,} events"

    def _packets(self, names: Names) -> Iterator[bytes]:
        uuid = 0
        for pid, (name, draw) in enumerate(self._processes(), start=1):
            writer = Process(names, uuid + 1, pid=pid, name=name)
            draw(writer)
            uuid = writer.last
            yield b"".join(writer.parts)

    def _processes(self) -> Iterator[tuple[str, Callable[[Process], None]]]:
        """What draws each process: replicas in the order of their first call, then groups of links, then the note."""
        for name in {**self._replicas, **self._marks}:
            yield name, partial(self._draw_replica, name)
        for group in dict.fromkeys(group for group, _ in self._transfers):
            yield group, partial(self._draw_transfers, group)
        if self.note is not None:
            end = np.array([[self._horizon], [0.0]])
            yield "perfsim", lambda writer: writer.marks(end, [str(self.note)])

    def _draw_replica(self, name: str, writer: Process) -> None:
        lanes = self._replicas.get(name, [])
        if name in self._marks:
            writer.marks(self._marks[name].whole(), list(self._texts))
        for lane in lanes:
            writer.segments(lane.segments.whole(), lane.label, several=len(lanes) > 1)
        for lane in lanes:
            writer.requests(lane.requests.whole())

    def _draw_transfers(self, group: str, writer: Process) -> None:
        for (owner, label), rows in self._transfers.items():
            if owner == group:
                writer.transfers(label, rows.whole(), list(self._texts))
