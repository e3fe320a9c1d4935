"""Questions over retrieved documents: prompts that share as much as their leading documents agree."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perfsim.spec.workload import RagWorkload
from perfsim.traffic.arrivals import ArrivalClock
from perfsim.traffic.choice import DistinctChooser
from perfsim.traffic.chunk import HASHED_CHUNK_REQUESTS, RequestChunk
from perfsim.traffic.synthetic import draw_lengths, prefix_chooser, random_streams

# Segments of all requests of a chunk, each an id and an end: keeps the memory bound of many documents per prompt.
_CHUNK_SEGMENTS = 131_072


def rag_chunks(workload: RagWorkload, *, seed: int, chunk_requests: int | None = None) -> Iterator[RequestChunk]:
    """The requests of `workload`; values do not depend on the chunk size.

    A prompt is [system prompt] [document] ... [document] [question]. The id of a segment is the hash of its own number
    and of the id before it, so equal ids mean equal prompts up to there; the question is nobody else's. Document i is
    the i-th most popular one and has its length for the whole run.
    """
    if chunk_requests is None:
        chunk_requests = min(HASHED_CHUNK_REQUESTS, _CHUNK_SEGMENTS // workload.documents)
    streams = random_streams(seed)
    clock = ArrivalClock(workload.arrivals, rng=streams.arrivals)
    sizes = draw_lengths(workload.document, count=workload.corpus_documents, rng=streams.documents).tolist()
    chooser = DistinctChooser(workload.corpus_documents, exponent=workload.popularity, rng=streams.choices)
    system = workload.system_prompt
    choose = None if system is None else prefix_chooser(system, rng=streams.prefixes)
    for first in range(0, workload.num_requests, chunk_requests):
        count = min(chunk_requests, workload.num_requests - first)
        prefixes = None if choose is None else choose(first, count).tolist()
        ids, ends = [], []
        for index in range(count):
            documents = chooser.take(workload.documents)
            if workload.order == "popularity":
                documents.sort()
            parts = [(document, sizes[document]) for document in documents]
            if prefixes is not None and system is not None:
                parts.insert(0, (workload.corpus_documents + prefixes[index], system.tokens))
            chain, upto = _chain(parts)
            ids.append(chain)
            ends.append(upto)
        question = draw_lengths(workload.question, count=count, rng=streams.prompts)
        yield RequestChunk(
            arrival_s=clock.take(count),
            prompt_tokens=question + np.array([upto[-1] for upto in ends], dtype=np.int64),
            output_tokens=draw_lengths(workload.output, count=count, rng=streams.outputs),
            segment_ids=ids,
            segment_ends=ends,
        )


def _chain(parts: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(id of each segment and all before it, token where it ends)."""
    ids, ends, name, end = [], [], 0, 0
    for part, size in parts:
        # Only equality of ids matters, so Python's hash of a pair of integers will do: it is the same in every process
        # and two pairs share one with a chance of about 2^-61, unless they hold -1 and -2, whose hashes are equal.
        name, end = hash((name, part)), end + size
        ids.append(name)
        ends.append(end)
    return ids, ends
