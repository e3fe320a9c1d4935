"""Feeds an engine with requests: at given times, or as others complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Protocol

from perfsim.serving.request import Request
from perfsim.serving.timing import nanosecond
from perfsim.traffic import ClosedLoopSource, RequestChunk

_PROGRESS_EVERY = 4096


class Drivable(Protocol):
    """An engine that takes requests in order of time."""

    until: float

    def submit(self, request: Request) -> None: ...
    def advance(self, until: float) -> None: ...
    def drain(self) -> None: ...


Progress = Callable[[int, float], None]


def run_open_loop(
    engine: Drivable,
    chunks: Iterable[RequestChunk],
    *,
    ingress: float,
    block_size: int,
    progress: Progress | None = None,
) -> int:
    """Send every request at its time; returns how many there were. `ingress` is seconds from client to engine queue."""
    sent = 0
    for chunk in chunks:
        for request in requests_of(chunk, first_index=sent, ingress=ingress, block_size=block_size):
            engine.advance(request.queued)
            engine.submit(request)
            if progress is not None and request.index % _PROGRESS_EVERY == 0:
                progress(request.index, request.arrival)
        sent += len(chunk)
    engine.drain()
    return sent


class ClosedLoop:
    """A fixed number of clients, each sending its next request `think_time` after the answer to its last one."""

    def __init__(self, source: ClosedLoopSource, *, ingress: float, egress: float, block_size: int) -> None:
        self._requests = _in_turn(source.chunks, ingress, block_size)
        self._round_trip = egress + source.think_time_s
        self._clients = source.concurrency
        self._ingress = ingress
        self._due: list[tuple[int, int, Request]] = []  # by nanosecond, then index
        self._engine: Drivable | None = None
        self.sent = 0

    def on_finish(self, request: Request, at: float) -> None:
        """The engine's hook: the answer reaches the client, who thinks and sends the next request."""
        self._send(at + self._round_trip)

    def run(self, engine: Drivable, *, progress: Progress | None = None) -> int:
        """Serve all requests of the source; returns how many there were."""
        self._engine = engine
        for _ in range(self._clients):
            self._send(0.0)
        while self._due:
            _, _, request = self._due[0]
            engine.advance(request.queued)
            if self._due[0][2] is not request:
                continue  # a completion on the way made an earlier request due
            heappop(self._due)
            engine.submit(request)
            if progress is not None and request.index % _PROGRESS_EVERY == 0:
                progress(request.index, request.arrival)
            if not self._due:
                engine.advance(float("inf"))  # until a completion makes the next one due, or to the end
        engine.drain()
        return self.sent

    def _send(self, at: float) -> None:
        request = next(self._requests, None)
        if request is None:
            return
        request.arrival, request.queued = at, at + self._ingress
        heappush(self._due, (nanosecond(request.queued), request.index, request))
        self.sent += 1
        if self._engine is not None:
            self._engine.until = min(self._engine.until, request.queued)


def requests_of(chunk: RequestChunk, *, first_index: int, ingress: float, block_size: int) -> Iterator[Request]:
    """The requests of one chunk as the engine's own objects, what their prompts share cut into engine blocks."""
    arrivals, queued = chunk.arrival_s.tolist(), (chunk.arrival_s + ingress).tolist()
    prompts, outputs = chunk.prompt_tokens.tolist(), chunk.output_tokens.tolist()
    priorities = chunk.priority.tolist() if chunk.priority is not None else None
    sessions = chunk.session_id.tolist() if chunk.session_id is not None else None
    adapters = chunk.adapter.tolist() if chunk.adapter is not None else None
    shares = _shares(chunk, prompts, block_size)
    requests = map(Request, range(first_index, first_index + len(arrivals)), arrivals, queued, prompts, outputs)
    if priorities is sessions is adapters is shares is None:
        yield from requests
        return
    for offset, request in enumerate(requests):
        if priorities is not None:
            request.priority = priorities[offset]
        if sessions is not None:
            request.session = sessions[offset]
        if adapters is not None:
            request.adapter = adapters[offset]
        if shares is not None:
            keys, request.ends = shares(offset)
            request.keys = of_adapter(keys, request.adapter)
        yield request


def _shares(
    chunk: RequestChunk, prompts: list[int], block_size: int
) -> Callable[[int], tuple[list[int], list[int]]] | None:
    """For each request of a chunk: (keys of what it shares, engine block where each ends)."""
    if chunk.segment_ids is not None and chunk.segment_ends is not None:
        names, stops = chunk.segment_ids, chunk.segment_ends
        return lambda offset: in_blocks(names[offset], stops[offset], block_size)
    if chunk.hash_block_ids is not None:
        ids, tokens = chunk.hash_block_ids, chunk.hash_block_tokens

        def recorded(offset: int) -> tuple[list[int], list[int]]:
            keys, prompt = ids[offset] or [], prompts[offset]
            if len(set(keys)) < len(keys):  # an id names a block and all before it: it cannot come twice
                keys = keys[: next(i for i, key in enumerate(keys) if key in keys[:i])]
            if tokens < block_size:  # several ids to an engine block: the last one names it
                return in_blocks(keys, [min((i + 1) * tokens, prompt) for i in range(len(keys))], block_size)
            ends = [min((i + 1) * tokens, prompt) // block_size for i in range(len(keys))]
            if ends and ends[-1] == (ends[-2] if len(ends) > 1 else 0):  # the last piece fills no engine block
                return keys[:-1], ends[:-1]
            return keys, ends

        return recorded
    if chunk.prefix_id is not None and chunk.prefix_tokens is not None:
        prefixes, lengths = chunk.prefix_id.tolist(), chunk.prefix_tokens.tolist()

        def synthetic(offset: int) -> tuple[list[int], list[int]]:
            blocks = min(lengths[offset], prompts[offset]) // block_size
            return ([prefixes[offset]], [blocks]) if blocks else ([], [])

        return synthetic
    return None


def in_blocks(keys: Sequence[int], tokens: Sequence[int], block_size: int) -> tuple[list[int], list[int]]:
    """(keys, engine block where each ends) of segments that end at `tokens`; one that completes no block is left out.

    A key stands for its segment and all before it, so the block that two segments share belongs to the later one.
    """
    names: list[int] = []
    ends: list[int] = []
    last = 0
    for key, token in zip(keys, tokens, strict=True):
        end = token // block_size
        if end > last:
            names.append(key)
            ends.append(end)
            last = end
    return names, ends


def of_adapter(keys: Sequence[int], adapter: int) -> Sequence[int]:
    """Keys of the same tokens under a LoRA adapter: their K/V differ, so vLLM hashes the adapter with them."""
    return keys if adapter < 0 else [key + ((adapter + 1) << 65) for key in keys]


def _in_turn(chunks: Iterable[RequestChunk], ingress: float, block_size: int) -> Iterator[Request]:
    index = 0
    for chunk in chunks:
        yield from requests_of(chunk, first_index=index, ingress=ingress, block_size=block_size)
        index += len(chunk)
