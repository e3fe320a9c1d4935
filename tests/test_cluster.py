"""Clusters: fast equals stepwise, everything is conserved, one replica behind a router is one replica."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from cluster_runs import SMALL, random_chunk, run_cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.errors import InputError
from perfsim.metrics.books import Books
from perfsim.run import estimate, simulate
from perfsim.serving.check import BookkeepingError
from perfsim.serving.replica import plan_groups
from perfsim.serving.service import serve
from perfsim.spec.deployment import (
    Autoscaling,
    Deployment,
    Failures,
    KvTransfer,
    LeastLoaded,
    PowerOfTwo,
    PrefixAware,
    ReplicaGroup,
    RoundRobin,
    SessionSticky,
)
from perfsim.spec.load import load_scenario

ROUTERS = [RoundRobin(), LeastLoaded(), PowerOfTwo(), PrefixAware(balance_abs=4), SessionSticky()]


@st.composite
def deployments(draw):
    router = draw(st.sampled_from(ROUTERS))
    failures = draw(st.sampled_from([None, Failures(mtbf=2.0, repair=0.4, max_retries=1)]))
    kind = draw(st.sampled_from(["plain", "mixed", "scaling", "disaggregated"]))
    common = {"router": router, "failures": failures}
    if kind == "disaggregated":
        groups = (ReplicaGroup(name="p", count=draw(st.integers(1, 2)), role="prefill"),
                  ReplicaGroup(name="d", count=draw(st.integers(1, 3)), role="decode"))  # fmt: skip
        transfer = KvTransfer(bandwidth=draw(st.sampled_from([2e8, 1e10])), latency=1e-4,
                              layerwise=draw(st.booleans()))  # fmt: skip
        return Deployment(groups=groups, transfer=transfer, **common)
    if kind == "mixed":
        groups = (ReplicaGroup(name="r", count=draw(st.integers(1, 2))), ReplicaGroup(name="small", count=2))
        return Deployment(groups=groups, **common)
    groups = (ReplicaGroup(name="r", count=draw(st.integers(1, 4))),)
    if kind == "plain":
        return Deployment(groups=groups, **common)
    scaling = Autoscaling(target=draw(st.sampled_from([2, 8])), max_replicas=5, interval=0.2, startup_delay=0.3,
                          scale_down_delay=draw(st.sampled_from([0.0, 0.7])))  # fmt: skip
    return Deployment(groups=groups, autoscaling=scaling, **common)


@settings(max_examples=100, deadline=None)
@given(deployments(), st.integers(1, 60), st.sampled_from([5.0, 40.0, 400.0]), st.sampled_from([0, 0, 3, 12]),
       st.sampled_from([34, 60, 200]), st.booleans(), st.booleans(), st.integers(0, 5))  # fmt: skip
def test_fast_forward_equals_stepwise(deployment, count, rate, clients, blocks, asynchronous, priority, seed) -> None:
    config = replace(
        SMALL, total_blocks=blocks, async_scheduling=asynchronous, reserve_full_isl=bool(seed % 2), priority=priority
    )  # fmt: skip
    others = {"small": replace(config, total_blocks=34, max_num_seqs=3, max_num_batched_tokens=64)}
    chunk = random_chunk(count, rate=rate, seed=seed, branches=3, sessions=4, priorities=3 if priority else 1)
    fast, slow = (
        run_cluster(
            chunk, deployment, config=config, others=others, stepwise=stepwise, clients=clients, think=0.01, seed=seed
        )
        for stepwise in (False, True)
    )
    assert (fast.cluster.failed, fast.cluster.retried) == (slow.cluster.failed, slow.cluster.retried)
    assert fast.rows.shape == slow.rows.shape
    np.testing.assert_allclose(fast.rows, slow.rows, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sorted(fast.log.gaps), sorted(slow.log.gaps), rtol=1e-9, atol=1e-9)
    states = [[(r.dispatched, r.failures, r.state) for r in run.cluster.replicas] for run in (fast, slow)]
    assert states[0] == states[1]


def test_the_generated_scenarios_do_what_they_are_for() -> None:
    """They would prove little if nothing failed, scaled, was preempted or waited for blocks."""
    chunk = random_chunk(200, rate=60.0)
    tight = replace(SMALL, total_blocks=34, reserve_full_isl=False)
    groups = (ReplicaGroup(name="p", count=1, role="prefill"), ReplicaGroup(name="d", count=2, role="decode"))
    failures = Failures(mtbf=2.0, repair=0.4, max_retries=1)
    run = run_cluster(chunk, Deployment(groups=groups, failures=failures), config=tight)
    assert run.cluster.handover.moved > 100
    assert run.cluster.handover.waited > 1.0
    assert run.cluster.retried > 10
    assert run.cluster.failed > 0
    assert sum(engine.preemptions for r in run.cluster.replicas for engine in r.schedulers) > 10
    scaling = Autoscaling(target=4, max_replicas=6, interval=0.2, startup_delay=0.3, scale_down_delay=0.5)
    run = run_cluster(chunk, Deployment(groups=(ReplicaGroup(name="r", count=1),), autoscaling=scaling))
    assert run.cluster.autoscaler.started > 2
    assert run.cluster.autoscaler.drained > 1


def scenario(arrivals: str, *extra: str):
    workload = (
        f"workload={{kind: synthetic, num_requests: 600, arrivals: {arrivals}, prompt: {{kind: lognormal, mean: 800, "
        "max: 8000}, output: {kind: lognormal, mean: 60, max: 400}, shared_prefix: {num_prefixes: 12, tokens: 512}}"
    )
    return load_scenario(None, overrides=[workload, *extra])


@pytest.mark.parametrize(
    "arrivals", ["{kind: poisson, rate: 25}", "{kind: quantised, rate: 25, quantum: 0.5}",
                 "{kind: closed, concurrency: 40, think_time: 0.2}", "{kind: closed, concurrency: 7}"]
)  # fmt: skip
@pytest.mark.parametrize("blocks", [600, 20_000])
def test_one_replica_behind_a_router_is_one_replica_to_the_bit(arrivals: str, blocks: int) -> None:
    given_scenario = scenario(arrivals, f"policy.kv_cache_blocks={blocks}")
    rows = []
    for clustered in (False, True):
        groups, kept = plan_groups(given_scenario), _Rows()
        served = serve(given_scenario, groups, sinks=lambda replica, rank, kept=kept: (kept,), clustered=clustered)
        assert served.sent == 600
        assert (served.cluster is not None) == clustered
        rows.append(kept.bytes)
    assert rows[0] == rows[1]
    assert len(rows[0]) > 600 * 80


class _Rows:
    """A sink that keeps the bytes of request rows."""

    def __init__(self) -> None:
        self.bytes = b""

    def add_requests(self, columns) -> None:
        self.bytes += b"".join(columns[name].tobytes() for name in sorted(columns))

    def add_segments(self, columns) -> None: ...

    def add_gaps(self, seconds, weights) -> None: ...


CLUSTER = (
    "deployment={router: {kind: prefix_aware}, "
    "groups: [{name: a, count: 3}, {name: b, count: 2, hardware: a100-80gb-sxm}]}"
)


def test_a_cluster_gives_the_same_bytes_in_another_process() -> None:
    here = simulate(scenario("{kind: poisson, rate: 60}", CLUSTER)).to_json()
    code = (
        "import sys, test_cluster as t; from perfsim.run import simulate; "
        "sys.stdout.write(simulate(t.scenario('{kind: poisson, rate: 60}', t.CLUSTER)).to_json())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=sys.path[0],
                          env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"})  # fmt: skip
    assert done.stdout == here


def test_a_heterogeneous_cluster_is_reported_by_replica_and_in_sum() -> None:
    result = simulate(scenario("{kind: poisson, rate: 60}", CLUSTER))
    rows = result.replicas
    assert [row["name"] for row in rows] == ["a/0", "a/1", "a/2", "b/0", "b/1"]
    assert sum(row["requests"] for row in rows) == 600
    counts, makespan = result.metrics["counts"], result.metrics["makespan_s"]
    assert sum(row["output_tokens"] for row in rows) == counts["output_tokens"]
    assert all(0 < row["busy_fraction"] <= 1 and row["powered_s"] == pytest.approx(makespan) for row in rows)
    # Prices per GPU-hour stand in the descriptors; one GPU per replica.
    given_scenario = scenario("{kind: poisson, rate: 60}", CLUSTER)
    prices = [group.hardware.accelerator.price_per_hour for group in given_scenario.deployment.groups]
    assert result.cost["usd_per_hour"] == pytest.approx(3 * prices[0] + 2 * prices[1])
    assert result.cost["usd"] == pytest.approx(result.cost["usd_per_hour"] * makespan / 3600)
    assert sum(result.breakdown.values()) == pytest.approx(makespan)
    line = result.timeline
    widths = np.full(len(line["running"]), line["bin_s"])
    widths[-1] = line["duration_s"] - (widths.size - 1) * line["bin_s"]
    assert float((np.array(line["output_tokens_per_s"]) * widths).sum()) == pytest.approx(counts["output_tokens"], 1e-4)
    assert json.loads(result.to_json())["replicas"] == rows


def test_conversations_stay_in_step_through_a_cluster() -> None:
    workload = (
        "workload={kind: sessions, num_sessions: 60, arrivals: {kind: poisson, rate: 4}, turns: {kind: fixed, "
        "turns: 4}, input: {kind: fixed, tokens: 200}, output: {kind: fixed, tokens: 50}, "
        "think_time: {kind: fixed, seconds: 1}}"
    )
    rates = {}
    for router in ("session", "round_robin"):
        deployment = f"deployment={{router: {{kind: {router}}}, groups: [{{name: r, count: 4}}]}}"
        result = simulate(load_scenario(None, overrides=[workload, deployment]))
        assert result.metrics["counts"]["completed"] == 240
        rates[router] = result.metrics["prefix_cache"]["hit_rate"]
    # A session that stays finds all that was said before; one that moves on finds a turn of three ago, or nothing.
    assert rates["session"] > 0.5
    assert rates["round_robin"] < rates["session"] / 2


def test_the_books_of_a_cluster_notice_a_lost_request() -> None:
    given_scenario = scenario("{kind: poisson, rate: 60}", CLUSTER)
    groups = plan_groups(given_scenario)
    books = Books(given_scenario, groups, egress=0.0, trace=None)
    served = serve(given_scenario, groups, sinks=books.sinks, begin=books.aggregate.begin)
    served.cluster.failed += 1
    with pytest.raises(BookkeepingError, match="1 failed"):
        books.close(served)


def test_the_closed_form_does_not_answer_for_clusters() -> None:
    with pytest.raises(InputError, match="one replica"):
        estimate(scenario("{kind: poisson, rate: 60}", CLUSTER))
