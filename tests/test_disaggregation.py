"""Prefill and decode on different replicas: times of a transfer alone, shares of links, and who holds back whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cluster_runs import BLOCK, SCENARIO, SMALL, Run, run_cluster
from test_fast_forward import compiled

from perfsim.cost.kv_transfer import transfer_model
from perfsim.errors import InputError
from perfsim.run import simulate
from perfsim.spec.deployment import Deployment, KvTransfer, ReplicaGroup
from perfsim.spec.load import load_scenario
from perfsim.traffic import RequestChunk

# Llama-3.1 8B: K and V of 8 heads of 128 numbers in 32 layers, two bytes each.
TOKEN_BYTES = 2 * 8 * 128 * 32 * 2
RATE, LATENCY = 1e9, 0.004


def deployment(prefill: int = 1, decode: int = 1, **transfer: Any) -> Deployment:
    groups = (
        ReplicaGroup(name="p", count=prefill, role="prefill"),
        ReplicaGroup(name="d", count=decode, role="decode"),
    )
    return Deployment(groups=groups, transfer=KvTransfer(**{"bandwidth": RATE, "latency": LATENCY, **transfer}))


def requests(prompts: list[int], outputs: list[int], *, gap: float = 0.0) -> RequestChunk:
    return RequestChunk(np.arange(len(prompts)) * gap, np.array(prompts), np.array(outputs))


def second_tokens(run: Run, config: Any = SMALL) -> np.ndarray:
    """When a request with two output tokens got its last one."""
    return run.column("finish_s") - run.column("first_token_s")


def step_s(sequences: int, context: int) -> float:
    return compiled("gqa", SMALL).decode_run(sequences, (context,), (sequences,), 1).first_s


def test_a_transfer_alone_takes_latency_and_bytes_over_bandwidth() -> None:
    run = run_cluster(requests([200], [2]), deployment())
    between = LATENCY + 200 * TOKEN_BYTES / RATE + step_s(1, 201)
    assert second_tokens(run)[0] == pytest.approx(between, rel=1e-9)
    handover = run.cluster.handover
    assert (handover.moved, handover.bytes) == (1, 200 * TOKEN_BYTES)
    assert handover.seconds == pytest.approx(LATENCY + 200 * TOKEN_BYTES / RATE, rel=1e-9)


def test_one_output_token_moves_nothing() -> None:
    run = run_cluster(requests([200, 100], [1, 1]), deployment())
    assert run.cluster.handover.moved == 0
    assert [replica.dispatched for replica in run.cluster.replicas] == [2, 0]


def test_the_first_token_is_the_prefill_replicas() -> None:
    chunk = requests([100], [5])
    apart = run_cluster(chunk, deployment(bandwidth=1e3))
    together = run_cluster(chunk, Deployment(groups=(ReplicaGroup(name="r", count=2),)))
    assert apart.column("first_token_s") == together.column("first_token_s")
    assert apart.column("finish_s") > together.column("finish_s") + 100 * TOKEN_BYTES / 1e3


def test_two_prompts_share_the_link_out_of_their_replica() -> None:
    """Both prefills end in one step; each gets half the link, to the two decode replicas or to the same one."""
    chunk = requests([100, 100], [2, 2])
    seconds = LATENCY + 2 * 100 * TOKEN_BYTES / RATE
    for decode in (1, 2):
        run = run_cluster(chunk, deployment(decode=decode))
        sequences = 2 if decode == 1 else 1
        np.testing.assert_allclose(second_tokens(run), seconds + step_s(sequences, 101 * sequences), rtol=1e-9)
    apart = run_cluster(chunk, deployment(prefill=2, decode=2))
    np.testing.assert_allclose(second_tokens(apart), LATENCY + 100 * TOKEN_BYTES / RATE + step_s(1, 101), rtol=1e-9)


def test_layerwise_leaves_the_last_layer_or_what_the_link_could_not_carry() -> None:
    run = run_cluster(requests([200], [2]), deployment(layerwise=True))
    prefill = float(run.column("first_token_s")[0] - run.column("scheduled_s")[0])
    left = max(200 * TOKEN_BYTES / 32, 200 * TOKEN_BYTES - RATE * prefill)
    assert left > 200 * TOKEN_BYTES / 32
    assert run.cluster.handover.exposed == pytest.approx(left)
    assert run.cluster.handover.bytes == 200 * TOKEN_BYTES
    run = run_cluster(requests([200], [2]), deployment(layerwise=True, bandwidth=1e12))
    assert run.cluster.handover.exposed == pytest.approx(200 * TOKEN_BYTES / 32)


def test_a_full_decode_pool_holds_back_the_prefill_side() -> None:
    """The decode pool holds two sequences: the others wait there, their blocks stay on the prefill side."""
    chunk = requests([320] * 8, [100] * 8)
    config = replace(SMALL, total_blocks=60)  # 20 blocks for a prompt, 7 more for its answer
    run = run_cluster(chunk, deployment(bandwidth=1e12, latency=0.0), config=config)
    handover = run.cluster.handover
    prefill, decode = (replica.engine for replica in run.cluster.replicas)
    assert len(run.rows) == 8
    assert handover.waited > 1.0
    # Three prompts of 20 blocks fill the pool of the prefill replica too: the later ones are not even begun.
    started = np.sort(run.column("scheduled_s"))
    assert started[7] > started[0] + 100 * step_s(1, 320)
    assert prefill.kv.check() == decode.kv.check() == ""
    roomy = run_cluster(chunk, deployment(bandwidth=1e12, latency=0.0), config=replace(SMALL, total_blocks=600))
    assert roomy.cluster.handover.waited < 0.1


def test_what_never_fits_the_decode_pool_is_rejected_there_and_freed_here() -> None:
    """A prompt of 30 blocks fits; with its answer it is longer than the pool."""
    chunk = requests([480, 100], [200, 3], gap=0.5)
    run = run_cluster(chunk, deployment(), config=replace(SMALL, total_blocks=34))
    assert len(run.rows) == 1
    assert [sum(replica.engine.recorder.rejected.values()) for replica in run.cluster.replicas] == [0, 1]


def test_a_prefix_that_the_decode_replica_has_is_not_sent_again() -> None:
    chunk = RequestChunk(
        np.array([0.0, 3.0]), np.array([256, 256]), np.array([4, 4]),
        prefix_id=np.zeros(2, dtype=np.int64), prefix_tokens=np.full(2, 192),
    )  # fmt: skip
    run = run_cluster(chunk, deployment())
    assert run.cluster.handover.bytes == (256 + 256 - 192) * TOKEN_BYTES
    assert run.column("cached_tokens").tolist() == [0, 192]
    assert 192 % BLOCK == 0


@pytest.mark.parametrize(("tp", "copies"), [(1, 1), (4, 1), (16, 2)])
def test_bytes_of_a_prompt_count_every_gpus_share(tp: int, copies: int) -> None:
    """Eight K/V heads: sixteen GPUs hold each of them twice."""
    scenario = SCENARIO.model_copy(update={"parallel": SCENARIO.parallel.model_copy(update={"tp": tp})})
    model = transfer_model(scenario, KvTransfer(bandwidth=RATE, latency=0.0), gpus_in_use=99)
    assert model.bytes(100) == pytest.approx(100 * TOKEN_BYTES * copies)
    assert model.bandwidth == model.cap == RATE * tp


def test_a_latent_is_copied_to_every_gpu_and_fp8_halves_the_bytes() -> None:
    scenario = load_scenario(None, model="DeepSeek-V2-Lite", tp=2)
    latent = (512 + 64) * 2 * 27  # kv_lora_rank, qk_rope_head_dim, bf16, layers
    transfer = KvTransfer(bandwidth=RATE, latency=0.0)
    assert transfer_model(scenario, transfer, gpus_in_use=99).bytes(10) == pytest.approx(10 * 2 * latent)
    half = SCENARIO.model_copy(update={"policy": SCENARIO.policy.model_copy(update={"kv_cache_dtype": "fp8"})})
    assert transfer_model(half, transfer, gpus_in_use=99).bytes(10) == pytest.approx(10 * TOKEN_BYTES / 2)


def test_the_network_is_the_hardwares_unless_given() -> None:
    node = SCENARIO.hardware
    model = transfer_model(SCENARIO, KvTransfer(), gpus_in_use=node.accelerator_count + 1)
    assert node.nics is not None
    assert model.bandwidth == node.nics.bandwidth * node.nics.count / node.accelerator_count
    assert model.latency == node.nics.latency
    within = transfer_model(SCENARIO, KvTransfer(), gpus_in_use=2)  # both replicas in one node
    assert within.bandwidth == node.scale_up.bandwidth
    bare = SCENARIO.model_copy(update={"hardware": node.model_copy(update={"nics": None})})
    with pytest.raises(InputError, match="names no network cards"):
        transfer_model(bare, KvTransfer(bandwidth=1e9), gpus_in_use=99)
    assert transfer_model(bare, KvTransfer(bandwidth=1e9, latency=0.0), gpus_in_use=99).bandwidth == 1e9


def test_a_whole_disaggregated_run_reports_its_transfers() -> None:
    workload = (
        "workload={kind: synthetic, num_requests: 300, arrivals: {kind: poisson, rate: 20}, "
        "prompt: {kind: fixed, tokens: 1000}, output: {kind: fixed, tokens: 50}}"
    )
    groups = "deployment={groups: [{name: p, count: 1, role: prefill}, {name: d, count: 2, role: decode}]}"
    result = simulate(load_scenario(None, overrides=[workload, groups]))
    moved = result.metrics["kv_transfer"]
    assert moved["transfers"] == 300
    assert moved["bytes"] == 300 * 1000 * TOKEN_BYTES
    assert [row["role"] for row in result.replicas] == ["prefill", "decode", "decode"]
    assert result.replicas[0]["output_tokens"] == 300
    assert sum(row["output_tokens"] for row in result.replicas) == 300 * 50
    assert result.metrics["counts"]["output_tokens"] == 300 * 50
    assert result.value("kv_transfer.mean_s") > 1000 * TOKEN_BYTES / 450e9
