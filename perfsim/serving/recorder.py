"""Columns of what happened, handed to a sink in chunks so that memory stays bounded."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from struct import Struct
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from perfsim.serving.request import Request
    from perfsim.serving.work import Work

Columns = Mapping[str, "NDArray[np.float64]"]

REQUEST_COLUMNS = (
    "request_index", "arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s", "prompt_tokens",
    "output_tokens", "cached_tokens", "preemptions", "session_id", "adapter",
)  # fmt: skip
SEGMENT_COLUMNS = (
    "start_s", "steps", "first_s", "slope_s", "tokens", "logits", "decode_sequences", "gap_sequences",
    "emitted", "prefill_tokens", "running", "waiting", "kv_blocks",
    "group_tokens", "decode_longest", "prefill_longest",
)  # fmt: skip
EXTRA_COLUMNS = ("accepted", "lora_tokens", "lora_adapters", "load_s", "held_s")  # zeros where an engine has none of it
WINDOW_COLUMNS = ("decode_context", "decode_growth", "prefill_pairs", "prefill_context")
_TURNED = 512  # rows that are turned into columns at once: they stay in the processor's cache


def window_columns(windows: int) -> tuple[str, ...]:
    """Names of a segment's attention sums: they repeat per window, with a suffix after the first."""
    return tuple(name + (f"_{index}" if index else "") for name in WINDOW_COLUMNS for index in range(windows))


def _row(names: tuple[str, ...]) -> Struct:
    """A row as bytes: seconds are floating, everything else is counted."""
    return Struct("".join("d" if name.endswith("_s") else "q" for name in names))


_REQUEST = _row(REQUEST_COLUMNS)


class Sink(Protocol):
    """Receives chunks of equal-length columns."""

    def add_requests(self, columns: Columns) -> None: ...
    def add_segments(self, columns: Columns) -> None: ...
    def add_gaps(self, seconds: NDArray[np.float64], weights: NDArray[np.float64]) -> None: ...


class Recorder:
    """Buffers what happened and flushes it column-wise.

    `logits` sequences are sampled per step and `emitted` tokens put out (a partial prefill's sample is dropped),
    `accepted` draft tokens among them. What a pipeline held for longer than a stage took, it held for `held_s`.
    A segment is a run of `steps` equal-batch steps, step i lasting first_s + i * slope_s. `gap_sequences` of its decode
    sequences see exactly that step as the gap between two tokens; exceptional gaps (after a preemption or a stall) are
    recorded on their own. `segments` and `steps` count what has been flushed.
    """

    __slots__ = (
        "_full", "_gaps", "_limit", "_names", "_pack", "_pack_extras", "_requests", "_segments", "_sinks", "finished",
        "rejected", "segments", "steps",
    )  # fmt: skip

    def __init__(self, sinks: tuple[Sink, ...], *, windows: int, chunk: int = 1 << 16) -> None:
        self._sinks = sinks
        self._names = (*SEGMENT_COLUMNS, *window_columns(windows), *EXTRA_COLUMNS)
        self._limit = chunk
        row, extras = _row(self._names), _row(EXTRA_COLUMNS)  # packed at once: smaller than objects, and read faster
        plain = Struct(f"{row.format.removesuffix(extras.format)}{extras.size}x")  # zero bytes are zeros
        self._pack, self._pack_extras, self._full = plain.pack, row.pack, chunk * row.size
        self._requests, self._segments = bytearray(), bytearray()
        self._gaps = array("d")
        self.finished = 0
        self.segments = 0
        self.steps = 0
        self.rejected: dict[str, int] = {}

    def finish(self, request: Request) -> None:
        """A request whose last token is out."""
        queued = request.received if request.received >= 0.0 else request.queued
        self._requests += _REQUEST.pack(
            request.index, request.arrival, queued, request.scheduled, request.first_token, request.finish,
            request.prompt, request.output, request.cached, request.preemptions, request.session, request.adapter,
        )  # fmt: skip
        self.finished += 1
        if self.finished % self._limit == 0:
            self._flush_requests()

    def reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def segment(self, work: Work) -> None:
        """One run of steps that has been executed."""
        extras = work.extras
        self._segments += (self._pack if extras is None else self._pack_extras)(
            work.start, work.count, work.first, work.slope, work.tokens, work.logits, work.decodes, work.gaps,
            work.emitted, work.prefill, work.running, work.waiting, work.kv_blocks, work.group_tokens, work.longest,
            work.longest_prompt, *work.context, *work.growth, *work.pairs, *work.read, *(extras or ()),
        )  # fmt: skip
        if len(self._segments) == self._full:
            self._flush_segments()

    def gap(self, seconds: float) -> None:
        """An inter-token gap that is not one step long."""
        self._gaps.append(seconds)
        if len(self._gaps) >= self._limit:
            self._flush_gaps()

    def flush(self) -> None:
        """Hand over everything that is still buffered."""
        self._flush_requests()
        self._flush_segments()
        self._flush_gaps()

    def _flush_gaps(self) -> None:
        if self._gaps:
            gaps = np.array(self._gaps)
            for sink in self._sinks:
                sink.add_gaps(gaps, np.ones_like(gaps))
            self._gaps = array("d")

    def _flush_requests(self) -> None:
        if self._requests:
            columns, self._requests = _columns(self._requests, REQUEST_COLUMNS), bytearray()
            for sink in self._sinks:
                sink.add_requests(columns)

    def _flush_segments(self) -> None:
        if self._segments:
            columns, self._segments = _columns(self._segments, self._names), bytearray()
            self.segments += len(columns["steps"])
            self.steps += int(columns["steps"].sum())
            for sink in self._sinks:
                sink.add_segments(columns)


def _columns(packed: bytearray, names: tuple[str, ...]) -> Columns:
    """The columns of packed rows, each in one piece."""
    seconds, counts = (np.frombuffer(packed, kind).reshape(-1, len(names)) for kind in (np.float64, np.int64))
    floating = [i for i, name in enumerate(names) if name.endswith("_s")]
    table = np.empty(seconds.shape, order="F")
    for start in range(0, len(table), _TURNED):
        part = slice(start, start + _TURNED)
        table[part] = counts[part]
        for i in floating:
            table[part, i] = seconds[part, i]
    return {name: table[:, i] for i, name in enumerate(names)}
