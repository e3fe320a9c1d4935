"""Clients that give up: the engine drops their requests, jumping or not, and everything still adds up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, run, scenarios
from test_kv_offload import same, trees

from perfsim.errors import InputError
from perfsim.run import simulate
from perfsim.serving.config import EngineConfig
from perfsim.serving.deadlines import GAVE_UP
from perfsim.serving.engine import Engine
from perfsim.serving.recorder import REQUEST_COLUMNS, Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec.load import load_scenario
from perfsim.traffic import RequestChunk

SECONDS = st.sampled_from([0.001, 0.02, 0.1, 0.3, 1.0])


@settings(max_examples=60, deadline=None)
@given(scenarios(), SECONDS)
def test_jumps_equal_steps(scenario, timeout) -> None:
    kind, config, chunk, clients, think = scenario
    config = replace(config, timeout=timeout)
    fast, one = run(kind, Engine, config, chunk, clients, think)
    slow, two = run(kind, StepwiseEngine, config, chunk, clients, think)
    assert (one.steps, one.rejected, len(fast.requests)) == (two.steps, two.rejected, len(slow.requests))
    if fast.requests:
        np.testing.assert_allclose(sorted(fast.requests), sorted(slow.requests), rtol=1e-9, atol=1e-9)
    if fast.steps:
        np.testing.assert_allclose(np.concatenate(fast.steps), np.concatenate(slow.steps), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(trees(), SECONDS)
def test_jumps_equal_steps_with_a_kv_tier(scenario, timeout) -> None:
    kind, config, chunk, clients, think = scenario
    same(kind, replace(config, timeout=timeout), chunk, clients=clients, think=think)


def burst(count: int, *, timeout: float) -> tuple[Recorder, list[float]]:
    """`count` requests at once for 4 slots: (what was recorded, end-to-end seconds of those that finished)."""
    config = EngineConfig(
        max_num_batched_tokens=256, max_num_seqs=4, max_model_len=4096, block_size=BLOCK, total_blocks=200,
        timeout=timeout,
    )  # fmt: skip
    chunk = RequestChunk(np.zeros(count), np.full(count, 64), np.full(count, 50))
    log, recorder = run("gqa", Engine, config, chunk, 0, 0.0)
    finish = sorted(REQUEST_COLUMNS).index("finish_s")
    ends = [row[finish] for row in log.requests]
    return recorder, ends


def test_slots_of_those_who_left_serve_others() -> None:
    """Without a timeout five rounds of four are served; with one of two and a half rounds, the first two are."""
    _, ends = burst(20, timeout=float("inf"))
    rounds = sorted(ends)
    limit = (rounds[7] + rounds[11]) / 2
    recorder, ends = burst(20, timeout=limit)
    assert len(ends) == 8
    assert max(ends) < limit
    assert recorder.rejected == {GAVE_UP: 12}


def test_an_overloaded_run_loses_requests_and_says_so() -> None:
    """At several times the capacity, those that finish did so in time, and all others are counted."""
    scenario = load_scenario(overrides=[
        "workload.num_requests=600", "workload.arrivals.rate=30", "policy.max_num_seqs=8", "workload.timeout=20s",
    ])  # fmt: skip
    found = simulate(scenario).metrics
    counts = found["counts"]
    assert counts["rejected"] > 100
    assert counts["completed"] > 50
    assert counts["completed"] + counts["rejected"] == 600
    assert found["rejected_for"] == {GAVE_UP: counts["rejected"]}
    assert found["e2e"]["max"] < 20.1


def test_a_patient_client_changes_nothing() -> None:
    plain = simulate(load_scenario(overrides=["workload.num_requests=50"]))
    patient = simulate(load_scenario(overrides=["workload.num_requests=50", "workload.timeout=1h"]))
    assert patient.metrics == plain.metrics


def test_what_is_not_modelled_is_refused() -> None:
    with pytest.raises(InputError, match="pipeline stages"):
        simulate(load_scenario(overrides=["workload.timeout=3s", "parallel.pp=2"]))
