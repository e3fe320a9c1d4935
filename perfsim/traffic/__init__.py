"""Request streams: recorded traces and synthetic workloads, chunk by chunk."""

from perfsim.traffic.chunk import CHUNK_REQUESTS, RequestChunk
from perfsim.traffic.readers import read_trace
from perfsim.traffic.stream import ClosedLoopSource, closed_loop_source, is_closed_loop, stream

__all__ = [
    "CHUNK_REQUESTS", "ClosedLoopSource", "RequestChunk",
    "closed_loop_source", "is_closed_loop", "read_trace", "stream",
]  # fmt: skip
