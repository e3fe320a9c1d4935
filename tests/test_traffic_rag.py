"""Questions over documents: what prompts share, how popular documents are, and what the engine finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from perfsim import traffic
from perfsim.serving.driver import requests_of
from perfsim.spec.workload import RagWorkload
from perfsim.traffic.chunk import RequestChunk
from perfsim.traffic.rag import rag_chunks

BLOCK = 16


def questions(count: int = 300, **changes) -> RagWorkload:
    return RagWorkload.model_validate({
        "num_requests": count,
        "arrivals": {"kind": "poisson", "rate": 5},
        "corpus_documents": 40,
        "popularity": 1.0,
        "document": {"kind": "uniform", "low": 3, "high": 90},
        "documents": 3,
        "question": {"kind": "uniform", "low": 1, "high": 30},
        "output": {"kind": "fixed", "tokens": 5},
        **changes,
    })  # fmt: skip


def joined(chunks: list[RequestChunk]) -> tuple[object, ...]:
    ids = [one for chunk in chunks for one in chunk.segment_ids]
    ends = [one for chunk in chunks for one in chunk.segment_ends]
    columns = ("arrival_s", "prompt_tokens", "output_tokens")
    return (*(np.concatenate([getattr(chunk, name) for chunk in chunks]).tobytes() for name in columns), ids, ends)


@given(st.integers(1, 200), st.integers(1, 90), st.sampled_from(["retrieved", "popularity"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_same_seed_same_requests_whatever_the_chunk_size(count, size, order, seed):
    workload = questions(count, order=order, system_prompt={"num_prefixes": 2, "tokens": 20, "order": "random"})
    whole = list(rag_chunks(workload, seed=seed, chunk_requests=1000))
    assert joined(whole) == joined(list(rag_chunks(workload, seed=seed, chunk_requests=size)))


def test_an_id_stands_for_one_beginning_of_one_length():
    """Equal ids mean equal ids before them, and a document has its length wherever it stands."""
    (chunk,) = traffic.stream(questions(3000), seed=2)
    before: dict[int, tuple[tuple[int, ...], int]] = {}
    for ids, ends in zip(chunk.segment_ids, chunk.segment_ends, strict=True):
        assert len(ids) == len(set(ids)) == 3
        for place, (name, end) in enumerate(zip(ids, ends, strict=True)):
            assert before.setdefault(name, (tuple(ids[:place]), end)) == (tuple(ids[:place]), end)
    assert 40 >= len({ids[0] for ids in chunk.segment_ids}) > 30
    assert (chunk.prompt_tokens > [ends[-1] for ends in chunk.segment_ends]).all()


def test_the_most_popular_document_is_drawn_as_often_as_zipf_says():
    (chunk,) = traffic.stream(questions(4000, documents=1), seed=0)
    counts = np.sort(np.unique([ids[0] for ids in chunk.segment_ids], return_counts=True)[1])[::-1]
    share = 1 / (1 / np.arange(1, 41)).sum()
    assert counts[0] / 4000 == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 4000))
    (uniform,) = traffic.stream(questions(4000, documents=1, popularity=0.0), seed=0)
    counts = np.unique([ids[0] for ids in uniform.segment_ids], return_counts=True)[1]
    assert np.abs(counts - 100).max() < 5 * np.sqrt(100)


def shared_blocks(workload: RagWorkload, *, seed: int = 0) -> int:
    """Blocks that an endless cache would have found, from the keys that the engine is given."""
    known: set[tuple[int, int]] = set()
    found = 0
    for chunk in traffic.stream(workload, seed=seed):
        for request in requests_of(chunk, first_index=0, ingress=0.0, block_size=BLOCK):
            start, hit = 0, True
            assert list(request.ends) == sorted(set(request.ends))
            for key, end in zip(request.keys, request.ends, strict=True):
                hit = hit and (key, start) in known
                found += (end - start) * hit
                known.add((key, start))
                start = end
            assert start <= request.prompt // BLOCK
    return found


def test_order_by_popularity_shares_more():
    retrieved, sorted_ = (shared_blocks(questions(order=order)) for order in ("retrieved", "popularity"))
    assert sorted_ > 1.2 * retrieved > 0


def test_a_system_prompt_is_shared_by_all_and_several_by_their_own():
    system = {"num_prefixes": 1, "tokens": 64}
    one = shared_blocks(questions(200, popularity=0.0, corpus_documents=10**5, system_prompt=system))
    assert one == 199 * 64 // BLOCK
    three = shared_blocks(
        questions(200, popularity=0.0, corpus_documents=10**5, system_prompt={**system, "num_prefixes": 3})
    )
    assert three == 197 * 64 // BLOCK


def test_more_documents_than_there_are_is_refused():
    with pytest.raises(ValidationError, match=r"documents \(41\) must be at most corpus_documents \(40\)"):
        questions(documents=41)
