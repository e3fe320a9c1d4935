"""Pipeline stages: one stage is the plain engine, several overlap batches, and everything adds up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, Log, compiled, scenarios, tiny_model

from perfsim.ops.step import attention_spans
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.front import EngineConfig
from perfsim.serving.pipeline import PipelineEngine
from perfsim.serving.recorder import Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.traffic import ClosedLoopSource, RequestChunk

CONFIG = EngineConfig(
    max_num_batched_tokens=256, max_num_seqs=16, max_model_len=4096, block_size=BLOCK, total_blocks=200,
    async_scheduling=False,
)  # fmt: skip


def run(kind: str, config: EngineConfig, chunk: RequestChunk, *, depth: int, clients: int = 0):
    """The log of a pipelined run, of the stepwise engine when `depth` is 0."""
    spans = attention_spans(tiny_model(kind))
    log, ledger = Log(), Ledger()
    recorder = Recorder((log, ledger), windows=len(spans), chunk=64)
    loop = ClosedLoop(ClosedLoopSource(iter([chunk]), clients, 0.03), ingress=0.002, egress=0.001, block_size=BLOCK)
    hook = loop.on_finish if clients else None
    shared = {"config": config, "steps": compiled(kind, config), "recorder": recorder, "windows": spans}
    engine = (
        PipelineEngine(depth=depth, on_finish=hook, **shared) if depth else StepwiseEngine(on_finish=hook, **shared)
    )
    sent = loop.run(engine) if clients else run_open_loop(engine, [chunk], ingress=0.002, block_size=BLOCK)
    recorder.flush()
    check_conservation(engine, ledger, sent=sent)
    return log


def column(log: Log, name: str) -> np.ndarray:
    from perfsim.serving.recorder import REQUEST_COLUMNS

    return np.array(log.requests)[:, sorted(REQUEST_COLUMNS).index(name)]


@settings(max_examples=100, deadline=None)
@given(scenarios())
def test_one_stage_is_the_plain_engine(scenario):
    kind, config, chunk, clients, _ = scenario
    config = replace(config, async_scheduling=False, mixed_steps=True)
    one = run(kind, config, chunk, depth=1, clients=clients)
    plain = run(kind, config, chunk, depth=0, clients=clients)
    assert len(one.requests) == len(plain.requests)
    if one.requests:
        np.testing.assert_allclose(sorted(one.requests), sorted(plain.requests), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(one.steps), np.concatenate(plain.steps), rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(scenarios(), st.integers(2, 5))
def test_everything_adds_up_in_every_pipeline(scenario, depth):
    kind, config, chunk, clients, _ = scenario
    log = run(kind, replace(config, async_scheduling=False), chunk, depth=depth, clients=clients)
    again = run(kind, replace(config, async_scheduling=False), chunk, depth=depth, clients=clients)
    assert log.requests == again.requests


def test_a_lone_request_gains_nothing_from_stages():
    """Its next batch waits for the last one to leave the last stage: only host time, once per batch, is the same."""
    chunk = RequestChunk(np.zeros(1), np.array([64]), np.array([50]))
    one = run("gqa", CONFIG, chunk, depth=1)
    four = run("gqa", CONFIG, chunk, depth=4)
    assert column(four, "finish_s")[0] == pytest.approx(column(one, "finish_s")[0], rel=0.6)
    assert column(four, "finish_s")[0] <= column(one, "finish_s")[0] * (1 + 1e-12)


def test_chunks_of_a_prompt_follow_each_other_through_the_stages():
    """Sixteen chunks need 16 + 3 stage times instead of 64, if every chunk takes the same time."""
    chunk = RequestChunk(np.zeros(1), np.array([4000]), np.array([1]))
    config = replace(CONFIG, max_num_batched_tokens=250, total_blocks=400)
    one = run("recurrent", config, chunk, depth=1)
    four = run("recurrent", config, chunk, depth=4)
    stages = np.concatenate(four.steps)[:, 0]
    assert len(stages) == len(np.concatenate(one.steps)) == 16
    steps = compiled("recurrent", config)
    host = steps.exposed_seconds(1) + steps.host_seconds(250)  # what only the first stage waits for
    rest = column(four, "finish_s")[0] - 0.002 - stages.sum()
    assert rest == pytest.approx(3 * (stages[-1] - host), rel=1e-6)
    assert column(four, "finish_s")[0] < column(one, "finish_s")[0]


def test_a_stage_takes_one_batch_at_a_time():
    rng = np.random.default_rng(5)
    chunk = RequestChunk(np.sort(rng.random(40)) * 0.3, rng.integers(10, 900, 40), rng.integers(1, 80, 40))
    log = run("gqa", replace(CONFIG, total_blocks=300), chunk, depth=3)
    occupied = np.concatenate(log.steps)[:, 0].sum()
    assert occupied <= (column(log, "finish_s").max() - column(log, "queued_s").min()) * (1 + 1e-9)
