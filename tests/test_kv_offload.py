"""The KV tier in the host's DRAM: jumps equal steps with it, nothing is lost in it, and it holds what vLLM's would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, Log, compiled, scenarios, tiny_model
from test_lockstep import run as run_lockstep

from perfsim.cost.host_tier import TierPlan, tier_plan
from perfsim.errors import InputError
from perfsim.ops.step import attention_spans
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.engine import Engine
from perfsim.serving.front import EngineConfig
from perfsim.serving.recorder import Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec.load import load_scenario
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
    return kind, replace(config, tier=tier, mixed_steps=True), chunk, clients, think  # others are refused with a tier


@settings(max_examples=150, deadline=None)
@given(trees())
def test_jumps_equal_steps(scenario) -> None:
    kind, config, chunk, clients, think = scenario
    same(kind, config, chunk, clients=clients, think=think)


def crowded(seed: int) -> RequestChunk:
    """Prompts that share three paths, some too long for the blocks that are left, and too many for a small tier."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice([1, 1, 60, 150, 300, 350], 60)
    paths = rng.integers(0, 3, 60)
    hashes = [[100 * int(path) + i for i in range(-(-int(p) // 16))] for path, p in zip(paths, prompts, strict=True)]
    return RequestChunk(
        arrival_s=np.sort(rng.integers(0, 13, 60)) / 20, prompt_tokens=prompts, output_tokens=rng.integers(1, 100, 60),
        hash_block_ids=hashes, hash_block_tokens=16,
    )  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(16))
def test_a_head_that_waits_for_blocks_is_passed_over_once_its_k_v_are_being_stored(
    seed: int, asynchronous: bool
) -> None:
    """Somebody else's store that had found no room succeeds in the middle of a jump, and the head would find it."""
    config = EngineConfig(
        max_num_batched_tokens=160, max_num_seqs=21, max_model_len=4096, block_size=BLOCK, total_blocks=70,
        prefix_caching=False, async_scheduling=asynchronous, reserve_full_isl=True,
        tier=plan(7, chunk_blocks=2, block_s=1e-6, setup=5e-3),
    )  # fmt: skip
    same("gqa", config, crowded(seed))


@settings(max_examples=30, deadline=None)
@given(trees(), st.integers(2, 3))
def test_ranks_in_lock_step_have_tiers_of_their_own(scenario, dp) -> None:
    _, config, chunk, clients, _ = scenario
    config = replace(config, window_blocks=0)
    fast = run_lockstep(Engine, config, chunk, dp=dp, clients=clients, spread=False)
    slow = run_lockstep(StepwiseEngine, config, chunk, dp=dp, clients=clients, spread=False)
    for one, other in zip(fast, slow, strict=True):
        assert len(one.requests) == len(other.requests)
        np.testing.assert_allclose(sorted(one.requests), sorted(other.requests), rtol=1e-9, atol=1e-9)


def conversation(*, rounds: int, documents: int, blocks: int, gap: float) -> RequestChunk:
    """Prompts about a few documents in turn: each comes back after all others have been read."""
    count = rounds * documents
    hashes = [[100 * (i % documents) + piece for piece in range(blocks)] for i in range(count)]
    prompts = np.full(count, blocks * BLOCK)
    return RequestChunk(np.arange(count) * gap, prompts, np.full(count, 4), None, hashes, BLOCK)


CONFIG = EngineConfig(
    max_num_batched_tokens=256, max_num_seqs=8, max_model_len=4096, block_size=BLOCK, total_blocks=50
)  # fmt: skip


def test_a_tier_of_nothing_is_no_tier() -> None:
    chunk = conversation(rounds=3, documents=6, blocks=20, gap=0.02)
    with_tier, engine = run("gqa", Engine, replace(CONFIG, tier=plan(0)), chunk)
    without, _ = run("gqa", Engine, CONFIG, chunk)
    assert with_tier.requests == without.requests
    np.testing.assert_array_equal(np.concatenate(with_tier.steps), np.concatenate(without.steps))
    assert engine.offload.crowded_out == 18


def test_a_huge_and_fast_tier_computes_no_chunk_twice() -> None:
    """The device holds two documents, six come in turn: from the second round on only last tokens are computed."""
    chunk = conversation(rounds=4, documents=6, blocks=20, gap=0.1)
    tier = plan(10_000, block_s=1e-12, setup=0.0)
    for config in (replace(CONFIG, tier=tier), replace(CONFIG, tier=tier, async_scheduling=False)):
        engine = same("gqa", config, chunk)
        prompt = 20 * BLOCK
        assert engine.scheduled_tokens == 6 * (prompt + 3) + 18 * (1 + 3)
        assert engine.loaded_tokens == 18 * (prompt - 1)
        assert engine.offload.tier.stored == 6 * 20


@pytest.mark.parametrize("asynchronous", [False, True])
def test_hits_grow_with_the_tier_once_it_holds_a_round(asynchronous: bool) -> None:
    """Least recently used finds nothing of a cycle that does not fit, all of one that does, and here no more than that.

    Heads are kept longest, so that a tier somewhat too small still finds beginnings.
    """
    chunk = conversation(rounds=4, documents=6, blocks=20, gap=0.1)
    found = []
    for chunks in (20, 60, 120, 240):
        config = replace(CONFIG, tier=plan(chunks), async_scheduling=asynchronous)
        found.append(same("gqa", config, chunk).loaded_tokens)
    assert found[0] == 0
    assert found == sorted(found)
    assert found[2] == found[3] == 18 * (20 * BLOCK - 1)


def test_a_slow_link_is_used_all_the_same() -> None:
    """vLLM does not weigh loading against computing: a link slower than that makes first tokens later."""
    chunk = conversation(rounds=3, documents=6, blocks=20, gap=0.3)
    waits = {}
    for block_s in (1e-6, 1e-2):
        engine = same("gqa", replace(CONFIG, tier=plan(1000, block_s=block_s)), chunk)
        assert engine.loaded_tokens == 12 * (20 * BLOCK - 1)
        waits[block_s] = engine.request_seconds
    assert waits[1e-2] > waits[1e-6] + 12 * 20 * 0.9e-2


def test_a_load_takes_its_time_and_no_slot() -> None:
    """Prompts found whole, one at a time: 20 blocks of 1 ms after a set-up of 5 ms, with one slot for all."""
    chunk = conversation(rounds=2, documents=6, blocks=20, gap=1.0)
    config = replace(CONFIG, tier=plan(1000, block_s=1e-3, setup=5e-3), max_num_seqs=1)
    engine = same("gqa", config, chunk)
    assert engine.offload.tier.loads.count == 6
    assert engine.offload.tier.loads.latency == pytest.approx(6 * (5e-3 + 20e-3))


def test_what_is_being_stored_delays_those_who_want_it() -> None:
    """Two equal prompts without a prefix cache: the second one waits until the first one's chunks are there."""
    chunk = RequestChunk(
        np.array([0.0, 0.02]), np.array([320, 320]), np.array([60, 4]), None, [list(range(20))] * 2, BLOCK
    )
    quick, slow = (
        same("gqa", replace(CONFIG, prefix_caching=False, tier=plan(100, block_s=block_s)), chunk)
        for block_s in (1e-7, 5e-3)
    )
    assert quick.loaded_tokens == slow.loaded_tokens == 319
    assert slow.request_seconds > quick.request_seconds + 20 * 5e-3 * 0.7


def scenario_with(**changes):
    return load_scenario("mooncake-demo").replace(**changes)


def test_size_and_speed_come_from_the_hardware() -> None:
    """Llama 3.1 70B in bf16: 80 layers x 8 heads x 2 x 128 numbers x 2 bytes per token, an eighth of it per link."""
    found = tier_plan(scenario_with(**{"policy.kv_offload.capacity": "100GB"}), block_size=16)
    token = 80 * 8 * 2 * 128 * 2
    assert found.chunks == 100e9 // (16 * token)
    assert found.load_bytes == found.store_bytes == 16 * token
    assert found.load_s == pytest.approx(16 * token / 8 / 63e9)
    assert found.setup == pytest.approx(10e-6)
    larger = tier_plan(
        scenario_with(**{"policy.kv_offload.capacity": "100GB", "policy.kv_offload.block_size": 64}), block_size=16
    )
    assert (larger.chunk_blocks, larger.chunks) == (4, found.chunks // 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy.kv_offload.capacity": "9TB"}, "policy.kv_offload.capacity: expected at most the 2,199 GB"),
        ({"policy.kv_offload": {"capacity": "1GB", "block_size": 40}}, "expected a multiple of the engine's 16 tokens"),
        ({"policy.kv_offload.capacity": "1GB", "parallel.pp": 2, "parallel.tp": 4}, "with parallel.pp > 1"),
        ({"policy.kv_offload.capacity": "1GB", "model": "mamba-2", "parallel.tp": 1}, "no states"),
    ],
)
def test_what_is_not_modelled_is_refused(changes, words) -> None:
    with pytest.raises(InputError, match=words):
        tier_plan(scenario_with(**changes), block_size=16)
