"""Conversations: what a turn repeats, when it is sent, what it finds in the cache, and both engines agreeing on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_block_pool import Holder, ReferencePool
from test_fast_forward import Log, compiled, tiny_model

from perfsim.ops.step import attention_spans
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import in_blocks, of_adapter
from perfsim.serving.engine import Engine, EngineConfig
from perfsim.serving.kv_cache import KVCache
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.sessions import Sessions
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec.policy import LoraServing
from perfsim.spec.workload import AgentsWorkload, SessionsWorkload
from perfsim.traffic.conversations import session_chunks, session_source

BLOCK = 16
INGRESS, EGRESS = 0.002, 0.001


def chat(count: int = 20, **changes) -> SessionsWorkload:
    return SessionsWorkload.model_validate({
        "num_sessions": count,
        "arrivals": {"kind": "poisson", "rate": 5},
        "turns": {"kind": "uniform", "low": 1, "high": 5},
        "input": {"kind": "uniform", "low": 1, "high": 60},
        "output": {"kind": "uniform", "low": 1, "high": 50},
        "think_time": {"kind": "exponential", "mean": 0.2},
        **changes,
    })  # fmt: skip


def agents(count: int = 20, **changes) -> AgentsWorkload:
    return AgentsWorkload.model_validate({
        "num_sessions": count,
        "arrivals": {"kind": "poisson", "rate": 5},
        "calls": {"kind": "uniform", "low": 2, "high": 9},
        "task": {"kind": "fixed", "tokens": 100},
        "tool_output": {"kind": "uniform", "low": 1, "high": 80},
        "output": {"kind": "uniform", "low": 1, "high": 30},
        "tool_latency": {"kind": "uniform", "low": 0.01, "high": 0.3},
        **changes,
    })  # fmt: skip


def roomy(**changes) -> EngineConfig:
    limits = {
        "max_num_batched_tokens": 512, "max_num_seqs": 64, "max_model_len": 4096, "block_size": BLOCK,
        "total_blocks": 4000,
    }  # fmt: skip
    return EngineConfig(**{**limits, **changes})


@dataclass
class Run:
    """What happened to every request, in the order they were submitted."""

    log: Log
    recorder: Recorder
    sessions: Sessions
    requests: list[Request] = field(default_factory=list)

    def turns(self) -> dict[int, list[Request]]:
        by_session: dict[int, list[Request]] = {}
        for request in self.requests:
            by_session.setdefault(request.session, []).append(request)
        return by_session


def run(workload, config: EngineConfig, *, engine_type=Engine, kind: str = "gqa", seed: int = 0) -> Run:
    source = session_source(workload, seed=seed, max_context=config.max_model_len)
    sessions = Sessions(source, ingress=INGRESS, egress=EGRESS, block_size=BLOCK)
    log, ledger = Log(), Ledger()
    recorder = Recorder((log, ledger), windows=len(attention_spans(tiny_model(kind))), chunk=64)

    class Noting(engine_type):
        __slots__ = ()

        def submit(self, request: Request) -> None:
            result.requests.append(request)
            super().submit(request)

    engine = Noting(
        config=config, steps=compiled(kind, config), recorder=recorder, windows=attention_spans(tiny_model(kind)),
        on_finish=sessions.on_finish,
    )  # fmt: skip
    result = Run(log, recorder, sessions)
    sent = sessions.run(engine)
    recorder.flush()
    check_conservation(engine, ledger, sent=sent)
    assert sent == len(result.requests)
    return result


limits = st.builds(
    lambda seqs, tokens, blocks, **flags: roomy(
        max_num_seqs=seqs, max_num_batched_tokens=max(tokens, seqs), total_blocks=blocks, **flags
    ),
    st.integers(1, 24), st.integers(8, 256), st.integers(20, 150), async_scheduling=st.booleans(),
    reserve_full_isl=st.booleans(), prefix_caching=st.sampled_from([True, True, False]),
    watermark_blocks=st.sampled_from([0, 3]), max_model_len=st.sampled_from([200, 400, 4096]),
)  # fmt: skip
conversations = st.builds(
    lambda make, count, arrivals, system, longest, seed: (
        make(
            count, arrivals=arrivals, system_prompt=system and {"num_prefixes": 2, "tokens": system},
            output={"kind": "uniform", "low": 1, "high": longest},
        ),
        seed,
    ),
    st.sampled_from([chat, agents]), st.integers(1, 25),
    st.sampled_from([
        {"kind": "poisson", "rate": 2}, {"kind": "poisson", "rate": 50}, {"kind": "constant", "rate": 20},
        {"kind": "closed", "concurrency": 4, "think_time": 0.03}, {"kind": "closed", "concurrency": 30},
    ]),
    st.sampled_from([None, 5, 16, 70]), st.sampled_from([30, 120]), st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["gqa", "windowed"]), limits, conversations)
def test_both_engines_hold_the_same_conversations(kind, config, conversation) -> None:
    workload, seed = conversation
    fast = run(workload, config, kind=kind, seed=seed)
    slow = run(workload, config, kind=kind, seed=seed, engine_type=StepwiseEngine)
    assert [(r.session, r.prompt, r.cached) for r in fast.requests] == [
        (r.session, r.prompt, r.cached) for r in slow.requests
    ]
    assert fast.recorder.rejected == slow.recorder.rejected
    if fast.log.requests:
        np.testing.assert_allclose(sorted(fast.log.requests), sorted(slow.log.requests), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(fast.log.steps), np.concatenate(slow.log.steps), rtol=1e-9, atol=1e-9)


def test_pressure_really_happens() -> None:
    """The generated cases would prove little if nothing was ever preempted or evicted."""
    workload = chat(40, arrivals={"kind": "poisson", "rate": 100}, output={"kind": "uniform", "low": 50, "high": 120})
    config = roomy(total_blocks=80, reserve_full_isl=False, max_model_len=900)
    calm, tight = run(workload, roomy(max_model_len=900)), run(workload, config)
    assert sum(request.preemptions for request in tight.requests) > 10
    assert sum(request.cached for request in tight.requests) < 0.8 * sum(request.cached for request in calm.requests)


@pytest.mark.parametrize("engine_type", [Engine, StepwiseEngine])
@pytest.mark.parametrize("system", [None, 40, 64])
def test_a_turn_finds_all_that_was_said_before_up_to_a_whole_block(engine_type, system) -> None:
    """vLLM hashes generated blocks as they fill; the last token of an answer has no K/V yet."""
    prompt = None if system is None else {"num_prefixes": 1, "tokens": system}
    for turns in run(chat(system_prompt=prompt), roomy(), engine_type=engine_type).turns().values():
        for before, after in pairwise(turns):
            assert after.prompt > before.prompt + before.output
            assert after.cached == (before.prompt + before.output - 1) // BLOCK * BLOCK
        assert turns[0].cached == 0 or turns[0].cached == (system or 0) // BLOCK * BLOCK


def test_without_prefix_caching_nothing_is_found() -> None:
    assert {request.cached for request in run(chat(), roomy(prefix_caching=False)).requests} == {0}


@pytest.mark.parametrize("make", [chat, agents])
def test_a_turn_is_sent_its_pause_after_the_answer_arrived(make) -> None:
    workload = make(30)
    (chunk,) = session_chunks(workload, seed=0, max_context=4096)
    turns = run(workload, roomy()).turns()
    assert len(turns) == 30
    for number, requests in turns.items():
        first = int(chunk.first[number])
        assert requests[0].arrival == chunk.start_s[number]
        assert len(requests) == chunk.turns[number]
        for turn, (before, after) in enumerate(pairwise(requests)):
            assert after.arrival == before.finish + EGRESS + chunk.pause_s[first + turn]
            assert after.queued == after.arrival + INGRESS
    arrivals = [request.queued for request in run(workload, roomy()).requests]
    assert arrivals == sorted(arrivals)


def test_a_closed_loop_keeps_its_number_of_sessions() -> None:
    workload = chat(60, arrivals={"kind": "closed", "concurrency": 7, "think_time": 0.5})
    turns = run(workload, roomy()).turns()
    spans = sorted((requests[0].arrival, requests[-1].finish + EGRESS) for requests in turns.values())
    starts, ends = [start for start, _ in spans], sorted(end for _, end in spans)
    assert starts[:7] == [0.0] * 7
    np.testing.assert_allclose(starts[7:], np.array(ends[: 60 - 7]) + 0.5, rtol=1e-12)


def test_the_context_limit_ends_a_session() -> None:
    endless = chat(30, turns={"kind": "fixed", "turns": 50})
    result = run(endless, roomy(max_model_len=500))
    assert not result.recorder.rejected
    assert result.sessions.cut == 30
    for turns in result.turns().values():
        longest = turns[-1].prompt + turns[-1].output
        assert 500 - 60 - 50 < longest <= 500
    own = run(endless.model_copy(update={"max_context": 300}), roomy())
    assert max(request.prompt + request.output for request in own.requests) <= 300


def test_a_rejected_turn_ends_its_session_and_the_next_one_begins() -> None:
    workload = chat(
        12, turns={"kind": "fixed", "turns": 40}, arrivals={"kind": "closed", "concurrency": 2, "think_time": 0.0}
    )
    result = run(workload, roomy(total_blocks=20))
    assert result.recorder.rejected == {"longer than the KV pool": 12}
    assert result.sessions.cut == 12
    for turns in result.turns().values():
        assert all(request.finish > 0 for request in turns[:-1])
        assert turns[-1].finish < 0


@given(st.sampled_from([chat, agents]), st.integers(1, 200), st.integers(1, 90), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_sessions_do_not_depend_on_the_chunk_size(make, count, size, seed) -> None:
    workload = make(count, system_prompt={"num_prefixes": 3, "tokens": 33, "order": "random"})
    lora = LoraServing(num_adapters=5, popularity=1.0)
    (whole,) = session_chunks(workload, seed=seed, max_context=300, lora=lora, chunk_sessions=1000)
    parts = list(session_chunks(workload, seed=seed, max_context=300, lora=lora, chunk_sessions=size))
    names = ("start_s", "turns", "prefix_id", "adapter", "prompt_tokens", "output_tokens", "pause_s")
    for name in names:
        assert np.concatenate([getattr(part, name) for part in parts]).tobytes() == getattr(whole, name).tobytes()
    assert np.array_equal(np.concatenate([part.cut for part in parts]), whole.cut)


def test_a_prompt_is_all_that_was_said_before() -> None:
    workload = agents(50, system_prompt={"num_prefixes": 1, "tokens": 1000}, output={"kind": "fixed", "tokens": 7})
    (chunk,) = session_chunks(workload, seed=1, max_context=10**8)
    for first, turns in zip(chunk.first.tolist(), chunk.turns.tolist(), strict=True):
        prompt = chunk.prompt_tokens[first : first + turns]
        assert prompt[0] == 1000 + 100
        added = np.diff(prompt) - 7
        assert ((added >= 1) & (added <= 80)).all()
        assert 2 <= turns <= 9


def test_sessions_of_one_adapter_share_a_system_prompt_and_others_do_not() -> None:
    assert of_adapter([3, -1], -1) == [3, -1]
    keys = {adapter: tuple(of_adapter([0, 5, -7], adapter)) for adapter in (-1, 0, 1)}
    assert len({key for names in keys.values() for key in names}) == 9


def test_segments_that_fill_no_block_are_left_out() -> None:
    assert in_blocks([1, 2, 3, 4], [10, 20, 31, 64], 16) == ([2, 4], [1, 4])
    assert in_blocks([1], [15], 16) == ([], [])


class Talk:
    """One conversation in both pools."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.said = 0  # tokens of all finished turns
        self.keys: list[int] = []
        self.ends: list[int] = []
        self.request: Request | None = None
        self.holder: Holder | None = None
        self.slots = 0
        self.waiting = False  # preempted

    def ask(self, added: int, output: int, size: int) -> None:
        prompt = self.said + added
        self.keys.append(1000 * self.number + len(self.keys))
        self.ends.append(prompt + output - 1)
        keys, ends = in_blocks(self.keys, self.ends, size)
        self.request = Request(0, 0.0, 0.0, prompt, output, keys=keys, ends=ends)
        self.request.emitted = 0
        shared = tuple((self.number, block) for block in range(ends[-1] if ends else 0))
        self.holder = Holder(shared, ("rest", self.number, len(self.keys)))
        self.slots = 0
        self.waiting = True


@settings(max_examples=300, deadline=None)
@given(
    st.integers(8, 60),
    st.lists(st.tuples(st.sampled_from("aggfp"), st.integers(0, 4), st.integers(1, 30), st.integers(1, 9))),
)
def test_generated_blocks_are_kept_as_in_a_pool_of_single_blocks(total, actions) -> None:
    """Also under preemption and eviction: equal hits, equal free blocks, at every moment."""
    size = 4
    cache, pool = KVCache(total, block_size=size, caching=True), ReferencePool(total, block_size=size)
    talks = [Talk(number) for number in range(5)]
    for action, who, amount, other in actions:
        talk = talks[who]
        if action == "a" and talk.request is None:
            talk.ask(amount, other, size)
        request, holder = talk.request, talk.holder
        if request is None or holder is None:
            continue
        end = request.prompt + request.output - 1
        if action == "a" and talk.waiting:
            limit = (max(request.prompt, request.computed + 1) - 1) // size
            found = pool.lookup(holder, limit)
            hits, idle = cache.lookup(request, limit)
            assert (hits, idle) == (len(found), sum(not block.references for block in found))
            slots = max(request.prompt, request.computed)
            if -(-slots // size) - hits + idle > cache.free:
                continue
            cache.acquire(request, hits)
            pool.acquire(holder, found)
            cache.take(-(-slots // size) - hits)
            cache.commit(request, slots // size)
            pool.grow(holder, slots)
            talk.slots, talk.waiting = slots, False
        elif action == "g" and not talk.waiting:
            slots = min(talk.slots + amount, end)
            need = -(-slots // size) - -(-talk.slots // size)
            if need <= cache.free:
                cache.take(need)
                pool.grow(holder, slots)
                talk.slots = slots
        elif action == "p" and not talk.waiting:
            request.computed = talk.slots  # what a preempted request has to compute again
            cache.release(request, talk.slots, resumes=True)
            pool.release(holder)
            talk.waiting = True
        elif action == "f" and not talk.waiting and talk.slots == end:
            cache.release(request, talk.slots, resumes=False)
            pool.release(holder)
            talk.said, talk.request = request.prompt + request.output, None
        assert cache.free == pool.free
        assert cache.blank == sum(block.content is None for block in pool.queue)
