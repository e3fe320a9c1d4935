"""Perfetto's TrackEvent messages: tracks, slices, counters and instants on simulated nanoseconds.

Field numbers are those of the published schema (github.com/google/perfetto, protos/perfetto/trace: trace.proto,
trace_packet.proto, track_event/{track_event,track_descriptor,process_descriptor,counter_descriptor,debug_annotation}
.proto and interned_data/interned_data.proto), as in version 0.59 of the `perfetto` package. Names are interned: the
first packet holds all of them, so it must know them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from perfsim.report.protobuf import doubles, field, integers, message, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from perfsim.report.protobuf import Part

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]

_PACKET = 1  # Trace
_SEQUENCE = field(10, 1)  # TracePacket.trusted_packet_sequence_id: one writer
_CLEARED, _NEEDED = field(13, 3), field(13, 2)  # TracePacket.sequence_flags
_EVENT, _TRACK, _INTERNED, _TIME = 11, 60, 12, 8  # TracePacket
_TYPE, _ON_TRACK, _NAME_ID, _NAME, _ARGUMENT, _COUNT = 9, 11, 10, 23, 4, 44  # TrackEvent
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4  # TrackEvent.Type
_EXPLICIT = 3  # TrackDescriptor.ChildTracksOrdering


class Names:
    """Numbers for the names of slices and arguments, from 1 in the order of first use."""

    def __init__(self) -> None:
        self.slices: dict[str, int] = {}
        self.arguments: dict[str, int] = {}

    def packet(self) -> bytes:
        """The first packet of the trace: every name that other packets refer to."""
        entries = [(2, self.slices), (3, self.arguments)]  # InternedData.event_names, debug_annotation_names
        body = b"".join(field(kind, field(1, number) + field(2, name))
                        for kind, names in entries for name, number in names.items())  # fmt: skip
        return field(_PACKET, _SEQUENCE + _CLEARED + field(_INTERNED, body))

    def slice(self, name: str) -> int:
        return self.slices.setdefault(name, len(self.slices) + 1)

    def argument(self, name: str) -> int:
        return self.arguments.setdefault(name, len(self.arguments) + 1)


def process(uuid: int, pid: int, name: str) -> bytes:
    """A group of tracks; its children stand in the order of their ranks."""
    body = field(1, uuid) + field(3, field(1, pid) + field(6, name)) + field(11, _EXPLICIT) + field(12, pid)
    return field(_PACKET, _SEQUENCE + field(_TRACK, body))


def track(uuid: int, parent: int, rank: int, name: str) -> bytes:
    """A lane for slices below a process; the viewer merges lanes of one name."""
    body = field(1, uuid) + field(2, name) + field(5, parent) + field(12, rank)
    return field(_PACKET, _SEQUENCE + field(_TRACK, body))


def counter(uuid: int, parent: int, rank: int, name: str, unit: str) -> bytes:
    """A lane for a number over time, in `unit`."""
    body = field(1, uuid) + field(2, name) + field(5, parent) + field(12, rank) + field(8, field(6, unit))
    return field(_PACKET, _SEQUENCE + field(_TRACK, body))


def instant(uuid: int, at: int, text: str) -> bytes:
    """A mark on a track."""
    event = field(_TYPE, _INSTANT) + field(_ON_TRACK, uuid) + field(_NAME, text)
    return field(_PACKET, field(_TIME, at) + _SEQUENCE + _NEEDED + field(_EVENT, event))


def slices(tracks: Ints, starts: Ints, ends: Ints, names: Ints, arguments: Mapping[int, Ints | Floats]) -> bytes:
    """One slice per row with its arguments; on one track they must not overlap and come in order of time."""
    annotations: list[Part] = []
    for name, values in arguments.items():
        # DebugAnnotation: name_iid, then uint_value or double_value
        value = integers(3, values.astype(np.int64)) if values.dtype.kind == "i" else doubles(5, values.astype(float))
        annotations += message(_ARGUMENT, [field(1, name), *value])
    where = integers(_ON_TRACK, tracks)
    begin = [field(_TYPE, _BEGIN), *where, *integers(_NAME_ID, names), *annotations]
    return table(len(starts), _packet(starts, begin) + _packet(ends, [field(_TYPE, _END), *where]))


def counts(uuid: int, times: Ints, values: Floats) -> bytes:
    """Values of a counter from each time on."""
    event: list[Part] = [field(_TYPE, _COUNTER) + field(_ON_TRACK, uuid), *doubles(_COUNT, values)]
    return table(len(times), _packet(times, event))


def _packet(times: Ints, event: list[Part]) -> list[Part]:
    return message(_PACKET, [*integers(_TIME, times), _SEQUENCE + _NEEDED, *message(_EVENT, event)])


def nanoseconds(seconds: Floats | Iterable[float]) -> Ints:
    """Simulated time as the viewer counts it."""
    whole: Ints = np.rint(np.asarray(seconds, dtype=np.float64) * 1e9).astype(np.int64)
    return whole
