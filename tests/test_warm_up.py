"""Kernels compiled on first use: once per kind, not for what start-up has run, in jumps as in steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import run, scenarios

from perfsim.cost.warm_up import ExpertKernels, WarmUp, expert_kernels
from perfsim.run import simulate
from perfsim.serving.engine import Engine
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec import catalog
from perfsim.spec.expert_tiles import tiles_of
from perfsim.spec.load import find_calibration, load_scenario
from perfsim.spec.policy import ParallelPlan
from perfsim.spec.scenario import Scenario

TILES = tuple(tiles_of("h100-80gb-sxm", experts=8, width=7168).items())
MIXTRAL = ExpertKernels(seconds=1.0, graph=256, longest=2048, experts=8, picks=2, tiles=TILES)


def test_a_step_in_a_graph_and_the_longest_one_are_ready() -> None:
    warm_up = WarmUp(MIXTRAL)
    assert [warm_up.wait(tokens) for tokens in (1, 255, 256, 2048)] == [0.0] * 4


def test_every_set_of_tiles_and_divisibility_is_compiled_once() -> None:
    """Pairs are divisible by 16 at multiples of 8 tokens, and with the padding of 8 experts at 4 more than those."""
    assert [MIXTRAL.kind(tokens)[1:] for tokens in (600, 604, 601)] == [(True, False), (False, True), (False, False)]
    warm_up = WarmUp(MIXTRAL)
    assert [warm_up.wait(tokens) for tokens in (601, 602, 600, 604, 608, 770, 2047)] == [1, 0, 1, 1, 0, 1, 1]
    # Tuned for 512, 1024, 1536 and 2048 tokens apart; three kinds of each but for what the longest step has compiled.
    warm_up = WarmUp(MIXTRAL)
    assert sum(warm_up.wait(tokens) for tokens in range(450, 2049)) == 4 * 3 - 1


def test_untuned_experts_have_one_set_of_tiles() -> None:
    """All graphs beyond the number of experts have compiled it for pairs divisible by 16; odd ones are left."""
    kernels = ExpertKernels(seconds=1.0, graph=256, longest=2048, experts=128, picks=8)
    assert tiles_of("rtx-pro-6000-blackwell-96gb", experts=128, width=768) == {}
    warm_up = WarmUp(kernels)
    assert [warm_up.wait(tokens) for tokens in (258, 301, 303, 999, 1000)] == [0, 1, 0, 0, 0]


def test_dense_models_quantised_experts_and_stages_wait_for_nothing() -> None:
    engine = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").engine.model_copy(
        update={"kernel_compile": 1.0}
    )
    limits = {"accelerator": "h100-80gb-sxm", "max_tokens": 2048, "max_seqs": 128}
    mixtral, two = catalog.model("mistralai--Mixtral-8x7B-v0.1"), ParallelPlan(tp=2)
    assert expert_kernels(mixtral, engine, two, **limits) == MIXTRAL
    assert expert_kernels(mixtral.model_copy(update={"expert_dtype": "fp8"}), engine, two, **limits) is None
    assert expert_kernels(mixtral, engine, ParallelPlan(pp=2), **limits) is None
    assert expert_kernels(catalog.model("llama-3.1-8b-instruct"), engine, two, **limits) is None


@settings(max_examples=60, deadline=None)
@given(scenarios(), st.sampled_from([8, 40, 100]))
def test_jumps_equal_steps(scenario, graph) -> None:
    kind, config, chunk, clients, think = scenario
    kernels = ExpertKernels(seconds=0.05, graph=graph, longest=config.max_num_batched_tokens, experts=8, picks=2)
    config = replace(config, expert_kernels=kernels)
    fast, one = run(kind, Engine, config, chunk, clients, think)
    slow, two = run(kind, StepwiseEngine, config, chunk, clients, think)
    assert one.steps == two.steps
    if fast.requests:
        np.testing.assert_allclose(sorted(fast.requests), sorted(slow.requests), rtol=1e-9, atol=1e-9)
    if fast.steps:
        np.testing.assert_allclose(np.concatenate(fast.steps), np.concatenate(slow.steps), rtol=1e-9, atol=1e-12)


def test_the_time_is_in_the_breakdown_and_delays_first_requests() -> None:
    scenario = load_scenario(overrides=[
        "model=mistralai--Mixtral-8x7B-v0.1", "parallel.tp=2", "workload.num_requests=100", "workload.arrivals.rate=2",
    ])  # fmt: skip

    def compiling_for(seconds: float) -> Scenario:
        engine = scenario.calibration.engine.model_copy(update={"kernel_compile": seconds})
        return scenario.model_copy(update={"calibration": scenario.calibration.model_copy(update={"engine": engine})})

    plain, late = simulate(compiling_for(0.0)), simulate(compiling_for(0.5))
    compiling = late.breakdown["compiling"]
    assert compiling >= 0.5
    assert compiling == pytest.approx(0.5 * round(compiling / 0.5))
    assert late.metrics["ttft"]["max"] > plain.metrics["ttft"]["max"] + 0.3
