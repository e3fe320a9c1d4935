"""The KV tier in the host's DRAM: jumps equal steps with it, nothing is lost in it, and it holds what vLLM's would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, Log, compiled, scenarios, tiny_model

from perfsim.cost.host_tier import TierPlan
from perfsim.ops.step import attention_spans
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.engine import Engine
from perfsim.serving.front import EngineConfig
from perfsim.serving.recorder import Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.traffic import ClosedLoopSource, RequestChunk


def plan(chunks: int, *, chunk_blocks: int = 1, block_s: float = 1e-4, setup: float = 1e-5) -> TierPlan:
    return TierPlan(
        chunks=chunks,
        chunk_blocks=chunk_blocks,
        load_s=block_s,
        store_s=block_s * 0.7,
        load_bytes=2.0,
        store_bytes=1.0,
        setup=setup,
    )


def run(kind: str, engine_type, config: EngineConfig, chunk: RequestChunk, *, clients: int = 0, think: float = 0.0):
    model = tiny_model(kind)
    log, ledger = Log(), Ledger()
    recorder = Recorder((log, ledger), windows=len(attention_spans(model)), chunk=64)
    loop = ClosedLoop(ClosedLoopSource(iter([chunk]), clients, think), ingress=0.002, egress=0.001, block_size=BLOCK)
    engine = engine_type(
        config=config, steps=compiled(kind, config), recorder=recorder, windows=attention_spans(model),
        on_finish=loop.on_finish if clients else None,
    )  # fmt: skip
    sent = loop.run(engine) if clients else run_open_loop(engine, [chunk], ingress=0.002, block_size=BLOCK)
    recorder.flush()
    check_conservation(engine, ledger, sent=sent)
    return log, engine


def same(kind: str, config: EngineConfig, chunk: RequestChunk, *, clients: int = 0, think: float = 0.0):
    """The fast engine after the same run in both, which must agree on everything."""
    fast, one = run(kind, Engine, config, chunk, clients=clients, think=think)
    slow, two = run(kind, StepwiseEngine, config, chunk, clients=clients, think=think)
    assert one.recorder.steps == two.recorder.steps
    assert len(fast.requests) == len(slow.requests)
    if fast.requests:
        np.testing.assert_allclose(sorted(fast.requests), sorted(slow.requests), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(fast.steps), np.concatenate(slow.steps), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sorted(fast.gaps), sorted(slow.gaps), rtol=1e-9, atol=1e-9)
    counters = ("preemptions", "saved_tokens", "loaded_tokens", "lost_tokens", "scheduled_tokens")
    assert [getattr(one, name) for name in counters] == [getattr(two, name) for name in counters]
    first, second = one.offload.tier, two.offload.tier
    assert (first.stored, first.evicted) == (second.stored, second.evicted)
    assert one.offload.crowded_out == two.offload.crowded_out
    assert (first.loads.blocks, first.stores.blocks) == (second.loads.blocks, second.stores.blocks)
    assert first.loads.latency == pytest.approx(second.loads.latency, rel=1e-9)
    return one


@st.composite
def trees(draw):
    """Prompts that share paths, so that something can be found; a device pool too small to keep it."""
    kind, config, chunk, clients, think = draw(scenarios())
    count = len(chunk.arrival_s)
    branch = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    pieces = draw(st.sampled_from([16, 64, 80]))
    hashes = [
        [b * 100 + i for i in range(-(-int(p) // pieces))] for b, p in zip(branch, chunk.prompt_tokens, strict=True)
    ]
    if draw(st.booleans()):  # lengths on block boundaries: prompts found whole
        chunk = replace(chunk, prompt_tokens=(chunk.prompt_tokens + BLOCK - 1) // BLOCK * BLOCK)
    chunk = replace(chunk, hash_block_ids=hashes, hash_block_tokens=pieces)
    tier = plan(
        draw(st.sampled_from([0, 1, 7, 30, 200])), chunk_blocks=draw(st.sampled_from([1, 1, 2, 3])),
        block_s=draw(st.sampled_from([1e-6, 1e-4, 3e-3])), setup=draw(st.sampled_from([0.0, 1e-5, 5e-3])),
    )  # fmt: skip
    return kind, replace(config, tier=tier), chunk, clients, think


@settings(max_examples=300, deadline=None)
@given(trees())
def test_jumps_equal_steps(scenario) -> None:
    kind, config, chunk, clients, think = scenario
    same(kind, config, chunk, clients=clients, think=think)
