"""Whole runs: determinism across processes, the two forms of the cost model, closed form against simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import perfsim as ps
from perfsim.errors import InfeasibleError, InputError
from perfsim.metrics.books import MAX_MISMATCH
from perfsim.run import estimate, simulate
from perfsim.serving.closed_form import steady_state
from perfsim.serving.replica import plan_replica
from perfsim.spec.load import load_scenario

STAYS_THE_SAME = ("scenario.yaml", "result.json", "requests.parquet", "trace.pftrace", "report.html")


def synthetic(count: int, rate: float, prompt: int, output: int, *, sigma: float = 0.6, **flags) -> ps.Scenario:
    lengths = f"{{kind: lognormal, sigma: {sigma}, mean: "
    workload = (
        f"{{kind: synthetic, num_requests: {count}, arrivals: {{kind: poisson, rate: {rate}}}, "
        f"prompt: {lengths}{prompt}}}, output: {lengths}{output}}}}}"
    )
    extra = flags.pop("overrides", [])
    return load_scenario(None, overrides=[f"workload={workload}", *extra], **flags)


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        command = [sys.executable, "-m", "perfsim", "simulate", "mooncake-demo", "--set", "workload.num_requests=800",
                   "--set", "workload.time_scale=3", "-o", str(tmp_path / name), "--format", "json"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        runs.append({file: (tmp_path / name / file).read_bytes() for file in STAYS_THE_SAME})
    assert runs[0] == runs[1]
    text = runs[0]["result.json"].decode()
    assert str(tmp_path) not in text
    assert "NaN" not in text
    assert "wall_s" not in text
    assert json.loads(text)["simulation"]["requests"] == 800


def test_seed_changes_the_draws_and_nothing_else() -> None:
    scenario = synthetic(300, 5, 500, 50)
    same, other = simulate(scenario).to_json(), simulate(scenario, seed=1)
    assert same == simulate(scenario).to_json()
    assert other.seed == 1
    assert other.metrics["e2e"]["mean"] != json.loads(same)["metrics"]["e2e"]["mean"]


@pytest.mark.parametrize(
    ("model", "hardware", "tp"),
    [("llama-3.1-8b-instruct", "h100-80gb-sxm", 1), ("deepseek-v2-lite", "a100-80gb-sxm", 2),
     ("openai--gpt-oss-20b", "rtx-pro-6000", 1), ("Qwen--Qwen3-30B-A3B", "b200-180gb-sxm", 2),
     ("qwen2.5-7b-instruct", "p100-16gb", 4), ("llama-2-7b-hf", "l40s", 1)],
)  # fmt: skip
def test_every_family_runs_and_its_time_is_fully_explained(model: str, hardware: str, tp: int) -> None:
    """`simulate` itself raises when the parts of a step do not sum to its length, or anything is not conserved."""
    result = simulate(synthetic(200, 4, 700, 60, model=model, hardware=hardware, tp=tp))
    busy = sum(seconds for name, seconds in result.breakdown.items() if name != "idle")
    assert sum(result.bound.values()) == pytest.approx(1.0)
    assert 0 < busy <= result.metrics["makespan_s"] * (1 + MAX_MISMATCH)
    assert sum(result.breakdown.values()) == pytest.approx(result.metrics["makespan_s"])
    assert result.energy["joules"] > 0


def test_fast_and_stepwise_results_agree() -> None:
    scenario = synthetic(400, 12, 900, 80)
    fast, slow = simulate(scenario), simulate(scenario, stepwise=True)
    assert fast.simulation["steps"] == slow.simulation["steps"]
    assert fast.simulation["segments"] < slow.simulation["segments"] / 2
    for path, value in fast.numbers().items():
        if path.startswith(("ttft", "tpot", "itl", "e2e", "throughput", "counts", "energy", "breakdown")):
            assert slow.value(path) == pytest.approx(value, rel=1e-9), path


CASES = [
    ("llama-2-7b-hf", "a100-80gb-sxm", 1, 1000, 200),
    ("llama-3.1-70b-instruct", "h100-80gb-sxm", 8, 4000, 300),
    ("Qwen--Qwen3-30B-A3B", "h200-141gb-sxm", 1, 600, 250),
]


def without_compilation(scenario):
    """A steady state knows no first steps, which wait for kernels to be compiled."""
    engine = scenario.calibration.engine.model_copy(update={"kernel_compile": 0.0})
    return scenario.model_copy(update={"calibration": scenario.calibration.model_copy(update={"engine": engine})})


@pytest.mark.parametrize("load", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("model", "hardware", "tp", "prompt", "output"), CASES)
def test_closed_form_is_within_ten_percent(model, hardware, tp, prompt, output, asynchronous, load) -> None:
    flags = {"model": model, "hardware": hardware, "tp": tp,
             "overrides": [f"policy.async_scheduling={str(asynchronous).lower()}"]}  # fmt: skip
    probe = synthetic(20000, 1, prompt, output, **flags)
    most = steady_state(probe, plan_replica(probe), trace_path=None).max_rate
    scenario = without_compilation(synthetic(6000, most * load, prompt, output, **flags))
    exact, closed = simulate(scenario).metrics, estimate(scenario).metrics
    for name in ("ttft", "tpot", "e2e"):
        assert closed[name]["mean"] == pytest.approx(exact[name]["mean"], rel=0.10), name


def test_closed_form_of_a_closed_loop() -> None:
    workload = (
        "workload={kind: synthetic, num_requests: 3000, arrivals: {kind: closed, concurrency: 24}, "
        "prompt: {kind: uniform, low: 200, high: 1800}, output: {kind: fixed, tokens: 150}}"
    )
    scenario = load_scenario(None, overrides=[workload])
    exact, closed = simulate(scenario).metrics, estimate(scenario).metrics
    assert exact["batch"]["max_sequences"] == 24
    rate = closed["throughput"]["requests_per_s"]
    assert rate == pytest.approx(exact["throughput"]["requests_per_s"], rel=0.10)


def test_estimate_says_unstable_beyond_saturation() -> None:
    result = estimate(synthetic(2000, 1000, 1000, 200))
    assert result.metrics["e2e"]["mean"] is None
    assert result.metrics["load"] > 1
    assert any("unstable" in warning for warning in result.warnings)


def test_overload_is_named() -> None:
    result = simulate(synthetic(4000, 500, 1000, 200))
    assert any("overloaded" in warning for warning in result.warnings)
    assert not any("overloaded" in warning for warning in simulate(synthetic(500, 2, 1000, 200)).warnings)


def test_a_model_that_does_not_fit_names_what_binds() -> None:
    with pytest.raises(InfeasibleError) as caught:
        simulate(synthetic(10, 1, 100, 10, model="llama-3.1-70b-instruct", hardware="a100-80gb-sxm", tp=1))
    assert caught.value.binding == "HBM capacity"


def test_long_prefill_of_llama_8b_respects_the_speed_of_light() -> None:
    """32,000 tokens need 2 x 7.5e9 x 32,000 FLOPs in the projections plus causal attention: 723 ms at 989.5 TFLOP/s."""
    workload = (
        "workload={kind: synthetic, num_requests: 1, arrivals: {kind: constant, rate: 1}, "
        "prompt: {kind: fixed, tokens: 32000}, output: {kind: fixed, tokens: 2}}"
    )
    result = simulate(load_scenario(None, overrides=[workload]))
    assert 0.723 < result.metrics["engine_ttft"]["mean"] < 2.0


def test_a_cached_prompt_as_large_as_the_pool_still_runs() -> None:
    """64 + 1 blocks hold one prompt of 1,024 tokens: the second finds all of it and must recompute one block."""
    workload = (
        "workload={kind: synthetic, num_requests: 5, arrivals: {kind: poisson, rate: 1}, "
        "prompt: {kind: fixed, tokens: 1024}, output: {kind: fixed, tokens: 1}, "
        "shared_prefix: {num_prefixes: 1, tokens: 1024}}"
    )
    scenario = load_scenario(None, overrides=[workload, "policy.kv_cache_blocks=65"])
    for stepwise in (False, True):
        counts = simulate(scenario, stepwise=stepwise).metrics["counts"]
        assert counts["completed"] == 5
        assert counts["cached_tokens"] == 4 * 63 * 16


def test_ids_that_are_no_prefix_chain_do_not_break_the_engine(tmp_path: Path) -> None:
    trace = tmp_path / "odd.jsonl"
    rows = [(0, [1, 2, 1]), (0, [2, 1, 2]), (1, [2, 2, 2]), (2, [1, 2, 3])]
    trace.write_text("\n".join(
        json.dumps({"arrival_s": at, "prompt_tokens": 48, "output_tokens": 9, "hash_block_ids": ids,
                    "hash_block_tokens": 16}) for at, ids in rows))  # fmt: skip
    scenario = load_scenario(None, trace=str(trace), overrides=["policy.kv_cache_blocks=12"])
    fast, slow = simulate(scenario), simulate(scenario, stepwise=True)
    assert fast.metrics["counts"]["completed"] == 4
    assert fast.metrics["e2e"] == pytest.approx(slow.metrics["e2e"], rel=1e-9)


@pytest.mark.parametrize("rows", ["0,100,10\n", "5,100,10\n5,200,10\n"])
def test_an_estimate_without_a_rate_says_so(tmp_path: Path, rows: str) -> None:
    trace = tmp_path / "once.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    with pytest.raises(InputError, match="two different times"):
        estimate(load_scenario(None, trace=str(trace)))


def test_an_estimate_warns_outside_the_range_it_was_tested_in() -> None:
    inside, outside = (estimate(synthetic(2000, 0.5, prompt, 100)) for prompt in (1000, 8000))
    assert not any("tested" in warning for warning in inside.warnings)
    assert any("tested" in warning for warning in outside.warnings)
