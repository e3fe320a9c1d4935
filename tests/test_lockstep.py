"""Data-parallel ranks in lock step: jumping gives the schedule and the times of doing every step, and all adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from batches import decode_knots
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, Log, scenarios

from perfsim.cost.step_model import DecodeRun, compile_steps
from perfsim.ops.step import FULL, attention_spans
from perfsim.run import simulate
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.engine import Engine
from perfsim.serving.front import EngineConfig
from perfsim.serving.lockstep import LockstepGroup, slowest
from perfsim.serving.recorder import REQUEST_COLUMNS, Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec import catalog
from perfsim.spec.load import Draft, find_calibration
from perfsim.spec.model import GroupedQueryAttention, LayerGroup, MixtureOfExperts, ModelArch
from perfsim.spec.policy import All2AllBackend, ServingPolicy
from perfsim.traffic import ClosedLoopSource, RequestChunk

MODEL = ModelArch(
    name="experts", architecture="test", hidden_size=512, vocab_size=32000, max_position_embeddings=4096,
    layers=(
        LayerGroup(
            count=12,
            attention=GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=2, head_dim=64),
            mlp=MixtureOfExperts(num_experts=32, num_experts_per_tok=4, moe_intermediate_size=512),
        ),
    ),
)  # fmt: skip


def compiled(config: EngineConfig, *, dp: int, spread: bool, backend: All2AllBackend | None = None):
    """Step costs with breakpoints in the attention curve, so that the slowest rank changes."""
    calibration = find_calibration(accelerator="h100-80gb-sxm", engine="vllm")
    device = decode_knots(calibration.device, ((32.0, 0.01), (128.0, 0.05), (512.0, 0.2)))
    return compile_steps(
        model=MODEL, node=catalog.node("dgx-h100"), tp=1, dp=dp, ep=dp if spread else 1,
        calibration=calibration.model_copy(update={"device": device}), async_scheduling=config.async_scheduling,
        max_num_batched_tokens=config.max_num_batched_tokens, max_num_seqs=config.max_num_seqs,
        policy=ServingPolicy(all2all_backend=backend),
    )  # fmt: skip


def run(kind, config: EngineConfig, chunk: RequestChunk, *, dp: int, clients: int, spread: bool, backend=None):
    windows = attention_spans(MODEL)
    steps = compiled(config, dp=dp, spread=spread, backend=backend)
    logs, ledgers, ranks = [Log() for _ in range(dp)], [Ledger() for _ in range(dp)], []
    loop = ClosedLoop(ClosedLoopSource(iter([chunk]), clients, 0.03), ingress=0.002, egress=0.001, block_size=BLOCK)
    for log, ledger in zip(logs, ledgers, strict=True):
        recorder = Recorder((log, ledger), windows=1, chunk=64)
        ranks.append(kind(config=config, steps=steps, recorder=recorder, windows=windows))
    group = LockstepGroup(ranks, steps=steps, jumps=kind is Engine)
    group.set_hooks(finish=loop.on_finish if clients else None)
    sent = loop.run(group) if clients else run_open_loop(group, [chunk], ingress=0.002, block_size=BLOCK)
    assert sent == sum(rank.submitted for rank in ranks)
    for rank, ledger in zip(ranks, ledgers, strict=True):
        rank.recorder.flush()
        check_conservation(rank, ledger, sent=rank.submitted)
    return logs


def by_index(log: Log) -> list[tuple[float, ...]]:
    """Requests that end with the same step may have been written down in any order."""
    place = sorted(REQUEST_COLUMNS).index("request_index")
    return sorted(log.requests, key=lambda row: row[place])


@settings(max_examples=80, deadline=None)
@given(scenarios(), st.integers(2, 4), st.booleans(), st.sampled_from((None, *get_args(All2AllBackend))))
def test_jumps_equal_steps(scenario, dp, spread, backend):
    _, config, chunk, clients, _ = scenario
    fast, slow = (
        run(kind, config, chunk, dp=dp, clients=clients, spread=spread, backend=backend)
        for kind in (Engine, StepwiseEngine)
    )
    for one, other in zip(fast, slow, strict=True):
        assert len(one.requests) == len(other.requests)
        np.testing.assert_allclose(by_index(one), by_index(other), rtol=1e-9, atol=1e-9)
        assert len(one.steps) == len(other.steps) or bool(one.steps) == bool(other.steps)
        if one.steps:
            np.testing.assert_allclose(np.concatenate(one.steps), np.concatenate(other.steps), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(sorted(one.gaps), sorted(other.gaps), rtol=1e-9, atol=1e-9)


def test_ranks_share_a_clock():
    chunk = RequestChunk(np.zeros(6), np.array([400, 20, 20, 20, 20, 20]), np.full(6, 30))
    config = EngineConfig(
        max_num_batched_tokens=256, max_num_seqs=8, max_model_len=4096, block_size=BLOCK, total_blocks=100
    )
    logs = run(Engine, config, chunk, dp=3, clients=0, spread=True)
    lengths = [np.concatenate(log.steps)[:, 0] for log in logs]
    shortest = min(map(len, lengths))
    assert shortest > 20
    for other in lengths[1:]:
        np.testing.assert_array_equal(lengths[0][:20], other[:20])


def test_one_rank_is_an_engine():
    config = EngineConfig(
        max_num_batched_tokens=256, max_num_seqs=8, max_model_len=4096, block_size=BLOCK, total_blocks=100
    )
    chunk = RequestChunk(np.arange(9) * 0.02, np.arange(9) * 31 + 1, np.full(9, 40))
    alone = Log()
    engine = Engine(
        config=config, steps=compiled(config, dp=1, spread=False), recorder=Recorder((alone,), windows=1),
        windows=(FULL,),
    )  # fmt: skip
    run_open_loop(engine, [chunk], ingress=0.002, block_size=BLOCK)
    engine.recorder.flush()
    steps = replace_group_table(compiled(config, dp=1, spread=False))
    log = Log()
    rank = Engine(config=config, steps=steps, recorder=Recorder((log,), windows=1), windows=(FULL,))
    run_open_loop(LockstepGroup([rank], steps=steps), [chunk], ingress=0.002, block_size=BLOCK)
    rank.recorder.flush()
    assert log.requests == alone.requests


def replace_group_table(steps):
    return replace(steps, group_s=[0.0] * len(steps.token_s))


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0.1, 2.0), st.floats(0.0, 0.1)), min_size=1, max_size=6))
def test_slowest_is_the_upper_envelope(runs):
    count, first, slope = slowest([DecodeRun(*run) for run in runs])
    assert 1 <= count <= min(limit for limit, _, _ in runs)
    for step in {0, count // 2, count - 1}:
        highest = max(first + slope * step for _, first, slope in runs)
        assert first + slope * step == pytest.approx(highest, rel=1e-9)


def test_ranks_that_start_at_different_times_share_one_timeline():
    # the second request comes while the first rank's step is in flight, so the other rank begins later
    scenario = Draft(
        {
            "model": MODEL, "hardware": "h100-80gb-sxm", "parallel": {"dp": 2},
            "workload": {
                "kind": "synthetic", "num_requests": 40, "arrivals": {"kind": "poisson", "rate": 300},
                "prompt": {"kind": "fixed", "tokens": 900}, "output": {"kind": "fixed", "tokens": 30},
            },
        },
        source="test",
    ).resolve()  # fmt: skip
    result = simulate(scenario)
    line = result.timeline
    tokens = line["bin_s"] * sum(line["output_tokens_per_s"][:-1])
    assert 0.9 * 40 * 30 <= tokens <= 40 * 30
    assert result.metrics["counts"]["completed"] == 40
