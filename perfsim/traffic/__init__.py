"""Request streams: recorded traces and synthetic workloads, chunk by chunk."""

from perfsim.traffic.chunk import CHUNK_REQUESTS, RequestChunk
from perfsim.traffic.conversations import SessionChunk, SessionSource, session_source
from perfsim.traffic.readers import read_trace
from perfsim.traffic.stream import ClosedLoopSource, closed_loop_source, is_closed_loop, is_conversation, stream

__all__ = [
    "CHUNK_REQUESTS", "ClosedLoopSource", "RequestChunk", "SessionChunk", "SessionSource",
    "closed_loop_source", "is_closed_loop", "is_conversation", "read_trace", "session_source", "stream",
]  # fmt: skip
