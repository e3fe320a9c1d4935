"""Deployments from scenario to result: whole runs of pipelines, failures and transfers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from perfsim.cost.kv_transfer import transfer_model
from perfsim.errors import InfeasibleError, InputError
from perfsim.metrics.result import Result
from perfsim.run import simulate
from perfsim.spec.deployment import KvTransfer
from perfsim.spec.load import load_scenario

TRAFFIC = (
    "workload={kind: synthetic, num_requests: 80, arrivals: {kind: poisson, rate: 20},"
    " prompt: {kind: fixed, tokens: 800}, output: {kind: fixed, tokens: 60}}"
)
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2  # K and V of Llama-3.1-8B in 16 bits
PAIR = "deployment.groups=[{name: p, role: prefill, count: 1}, {name: d, role: decode, count: 1%s}]"


def run(*overrides: str, hardware: str = "dgx-h100", **flags: Any) -> Result:
    return simulate(load_scenario(None, hardware=hardware, overrides=[TRAFFIC, *overrides], **flags))


@pytest.mark.parametrize("stages", [2, 4])
def test_one_client_keeps_a_pipeline_occupied_all_the_time(stages: int) -> None:
    """Its batch is in one stage at a time, but the engine is never empty: 53 blocks of 16 tokens in use, on average."""
    result = run(f"parallel.pp={stages}", "workload.arrivals={kind: closed, concurrency: 1}", "workload.num_requests=4")
    series = result.timeline
    assert sum(series["running"][:-1]) / len(series["running"][:-1]) == pytest.approx(1.0, abs=0.05)
    cache = result.metrics["kv_cache"]
    assert cache["occupancy_mean"] * cache["blocks"] == pytest.approx((800 + 30) / 16 + 1, rel=0.03)


@pytest.mark.parametrize("arrivals", ["{kind: poisson, rate: 3}", "{kind: closed, concurrency: 40}"])
def test_a_replica_of_pipeline_stages_closes_its_books(arrivals: str) -> None:
    result = run("parallel={tp: 2, pp: 4}", f"workload.arrivals={arrivals}")
    assert result.metrics["counts"]["completed"] == 80


def test_batches_in_flight_are_lost_with_their_pipeline() -> None:
    groups = "deployment.groups=[{name: r, count: 2, parallel: {tp: 2, pp: 2}}]"
    result = run(groups, "deployment.failures={mtbf: 1.5, repair: 0.5, max_retries: 50}")
    assert result.metrics["service"]["retries"] > 5
    assert result.metrics["counts"]["completed"] == 80


@pytest.mark.parametrize("plan", ["{tp: 1}", "{tp: 1, pp: 2}"])
def test_a_replica_is_not_back_before_its_last_step_has_ended(plan: str) -> None:
    groups = f"deployment.groups=[{{name: r, count: 2, parallel: {plan}}}]"
    result = run(groups, "deployment.failures={mtbf: 0.2, repair: 0, max_retries: 3}")
    counts = result.metrics["counts"]
    assert counts["completed"] + counts["failed"] == 80
    assert counts["failed"] > 0


def test_groups_on_different_hardware_share_no_scale_up_links() -> None:
    spread = run(PAIR % ", hardware: dgx-a100", hardware="dgx-h100").metrics["kv_transfer"]
    near = run(PAIR % "").metrics["kv_transfer"]
    scenario = load_scenario(None, hardware="dgx-a100")
    cards = transfer_model(scenario, KvTransfer(), gpus_in_use=scenario.hardware.accelerator_count + 1)
    assert spread["bytes_per_s"] <= cards.cap * (1 + 1e-9)
    assert near["bytes_per_s"] > 2 * cards.cap


@pytest.mark.parametrize("layerwise", ["false", "true"])
def test_what_hides_behind_the_prefill_has_moved_all_the_same(layerwise: str) -> None:
    transfer = f"deployment.transfer={{bandwidth: 2GB/s, latency: 0, layerwise: {layerwise}}}"
    moved = run(PAIR % "", transfer).metrics["kv_transfer"]
    assert moved["bytes"] == 80 * 800 * TOKEN_BYTES
    assert moved["bytes_per_s"] <= 2e9 * (1 + 1e-9)


def test_layers_sent_early_arrive_earlier() -> None:
    rate = "bandwidth: 2GB/s, latency: 0"
    late, early = (
        run(PAIR % "", f"deployment.transfer={{{rate}, layerwise: {how}}}").metrics["kv_transfer"]["mean_s"]
        for how in ("false", "true")
    )
    assert early < 0.8 * late


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([PAIR % ", policy: {kv_cache_dtype: fp8}"], "expected one policy.kv_cache_dtype in all groups"),
        (["deployment={groups: [{name: r, count: 2}], transfer: {bandwidth: 1GB/s}}"], "there are none"),
        (["deployment={groups: [{name: r, count: 9}], autoscaling: {target: 4, max_replicas: 3}}"], "in 1 to 3, got 9"),
        (
            ["deployment={groups: [{name: r, count: 1}], autoscaling: {target: 4, min_replicas: 2, max_replicas: 3}}"],
            "in 2 to 3, got 1",
        ),
        (
            ["deployment.groups=[{name: r, count: 2, hardware: dgx-h100-superpod}]"],
            "'dgx-h100-superpod' is a cluster; expected a node or an accelerator, such as its 'dgx-h100'",
        ),
    ],
)
def test_what_would_be_ignored_or_converted_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*overrides)


@pytest.mark.parametrize(
    "deployment",
    [
        "{groups: [{name: r, count: 73, parallel: {tp: 8}}]}",
        "{groups: [{name: r, count: 2, parallel: {tp: 8}}], autoscaling: {target: 4, max_replicas: 73}}",
    ],
)
def test_replicas_beyond_the_cluster_are_infeasible(deployment: str) -> None:
    with pytest.raises(InfeasibleError, match="584 GPUs do not fit: gb200-nvl72-8x has 576"):
        load_scenario(None, hardware="gb200-nvl72-8x", overrides=[TRAFFIC, f"deployment={deployment}"])
    load_scenario(None, hardware="gb200-nvl72-8x", overrides=[TRAFFIC, f"deployment={deployment.replace('73', '72')}"])
