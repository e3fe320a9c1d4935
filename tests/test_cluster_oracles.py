"""Clusters of single servers against queues with known answers, and availability against renewal theory."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import pytest
from cluster_runs import SCENARIO
from test_oracles import FlatSteps, Rows, exponential, lindley

from perfsim.ops.step import FULL
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.cluster import Cluster
from perfsim.serving.front import EngineConfig
from perfsim.serving.replica import GroupPlan, ReplicaPlan, build_engine
from perfsim.serving.request import Request
from perfsim.spec.deployment import (
    Autoscaling,
    Deployment,
    Failures,
    LeastLoaded,
    PowerOfTwo,
    ReplicaGroup,
    RoundRobin,
)
from perfsim.spec.policy import ParallelPlan

SERVERS = 3


def serve(
    arrivals: np.ndarray, work: np.ndarray, deployment: Deployment, *, step: int = 1 << 50
) -> tuple[Cluster, Rows]:
    """Requests of `work` microseconds each, in steps of at most `step`; every replica serves one at a time."""
    config = EngineConfig(
        max_num_batched_tokens=step, max_num_seqs=1, max_model_len=1 << 50, block_size=16, total_blocks=1 << 40,
        async_scheduling=False, prefix_caching=False,
    )  # fmt: skip
    rows, ledger = Rows(), Ledger()
    plan = ReplicaPlan(config, None, FlatSteps(per_token=1e-6), (FULL,), ParallelPlan())
    groups = [GroupPlan(group, SCENARIO, plan) for group in deployment.groups]
    cluster = Cluster(groups, deployment=deployment, seed=3,
                      build=lambda replica: build_engine(plan, sinks=lambda rank: (rows, ledger)))  # fmt: skip
    for index, (at, tokens) in enumerate(zip(arrivals.tolist(), work.tolist(), strict=True)):
        cluster.advance(at)
        cluster.submit(Request(index, at, at, tokens, 1))
    cluster.drain()
    engines = [engine for replica in cluster.replicas for engine in replica.schedulers]
    for engine in engines:
        engine.recorder.flush()
    check_conservation(engines, ledger, sent=len(work), failed=cluster.failed,
                       submitted_again=cluster.submissions - len(work))  # fmt: skip
    return cluster, rows


def traffic(count: int, load: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(exponential(rng, count) / (load * SERVERS))
    return arrivals, np.maximum(1, np.rint(exponential(rng, count) * 1e6)).astype(np.int64)


def waits(rows: Rows) -> np.ndarray:
    return rows.column("scheduled_s") - rows.column("queued_s")


def deployment(router: Any, **extra: Any) -> Deployment:
    return Deployment(groups=(ReplicaGroup(name="r", count=SERVERS),), router=router, **extra)


def shortest_queue(arrivals: np.ndarray, work: np.ndarray) -> list[float]:
    """Waits when everybody joins the shortest of the queues, the first one of equals; written without an engine."""
    queues: list[deque[float]] = [deque() for _ in range(SERVERS)]
    found = []
    for at, seconds in zip(arrivals.tolist(), (1e-6 * work).tolist(), strict=True):
        for queue in queues:
            while queue and queue[0] <= at:
                queue.popleft()
        chosen = min(queues, key=len)
        start = max(at, chosen[-1]) if chosen else at
        chosen.append(start + seconds)
        found.append(start - at)
    return found


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_taking_turns_makes_erlang_arrivals_of_poisson_ones(load: float) -> None:
    arrivals, work = traffic(60_000, load)
    _, rows = serve(arrivals, work, deployment(RoundRobin()))
    for server in range(SERVERS):
        np.testing.assert_allclose(
            waits(rows)[server::SERVERS], lindley(arrivals[server::SERVERS], 1e-6 * work[server::SERVERS]), atol=1e-7
        )
    # GI/M/1 (Kleinrock, Queueing Systems I, 1975, 6.4): W = sigma / (1 - sigma), sigma = A*(1 - sigma) with unit
    # service, A* the Laplace transform of the gaps: here Erlang of as many phases as there are servers.
    sigma, rate = 0.5, load * SERVERS
    for _ in range(200):
        sigma = (rate / (rate + 1.0 - sigma)) ** SERVERS
    assert waits(rows).mean() == pytest.approx(sigma / (1.0 - sigma), rel=0.03)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_joining_the_shortest_queue_is_an_independent_simulation_to_the_bit(load: float) -> None:
    arrivals, work = traffic(30_000, load)
    _, rows = serve(arrivals, work, deployment(LeastLoaded()))
    np.testing.assert_allclose(waits(rows), shortest_queue(arrivals, work), rtol=0, atol=1e-7)
    # One queue for all servers (M/M/c, Erlang C) is better than any choice made on arrival.
    offered = load * SERVERS
    terms = [offered**k / math.factorial(k) for k in range(SERVERS)]
    blocked = offered**SERVERS / math.factorial(SERVERS) / (1.0 - load)
    chance = blocked / (sum(terms) + blocked)
    best = chance / (SERVERS * (1.0 - load))
    alone = load / (1.0 - load)  # M/M/1: a server drawn at random
    _, two = serve(arrivals, work, deployment(PowerOfTwo()))
    assert best < waits(rows).mean() < waits(two).mean() < alone


def test_availability_and_lost_work_are_those_of_a_renewal_process() -> None:
    """A replica is up for mtbf / (mtbf + repair) of the time, and work that fails is done again from the start."""
    arrivals = np.arange(4000) * 1.0
    work = np.full(4000, 100_000)  # 0.1 s each: failures while serving are rare, so are retries that fail again
    failures = Failures(mtbf=40.0, repair=10.0, max_retries=50)
    cluster, rows = serve(arrivals, work, deployment(RoundRobin(), failures=failures))
    count = sum(replica.failures for replica in cluster.replicas)
    assert count == pytest.approx(SERVERS * 4000 / 50.0, rel=0.12)  # a standard deviation is 4%
    assert cluster.failed == 0
    assert cluster.retried > 0
    assert len(waits(rows)) == 4000
    # All three are down one 125th of the time; only then does a request wait for a replica.
    late = rows.column("queued_s") - rows.column("arrival_s")
    held = late > 0.11
    assert 0.2 / 125 < np.mean(held) < 3.0 / 125


def test_a_request_that_fails_too_often_is_given_up() -> None:
    """Twenty seconds in steps of a tenth, on replicas that last half a second: no attempt gets through."""
    failing = deployment(RoundRobin(), failures=Failures(mtbf=0.5, repair=0.1, max_retries=4))
    cluster, rows = serve(np.zeros(1), np.array([20_000_000]), failing, step=100_000)
    assert (cluster.failed, cluster.retried, rows.kept) == (1, 4, [])
    assert cluster.outstanding == 0


def test_scaling_follows_the_load_with_its_delays() -> None:
    """Eight requests of 10 s each arrive at once every 100 s: target 2 wants four replicas, later one again."""
    arrivals = np.repeat(np.arange(3) * 100.0, 8)
    work = np.full(24, 10_000_000)
    scaling = Autoscaling(
        target=2, min_replicas=1, max_replicas=3, interval=1.0, startup_delay=5.0, scale_down_delay=20.0
    )
    groups = (ReplicaGroup(name="r", count=1),)
    cluster, rows = serve(arrivals, work, Deployment(groups=groups, router=LeastLoaded(), autoscaling=scaling))
    assert len(waits(rows)) == 24
    # What came before the new replicas stays with the first one, as behind a real router: 8 x 10 s on one replica.
    assert waits(rows).max() == pytest.approx(70.0, abs=0.1)
    first, *others = cluster.replicas
    assert first.powered == [(0.0, None)]
    assert [replica.dispatched for replica in others[:2]] == [0, 0]
    on, off = others[0].powered[0]
    assert on == 1.0  # the first tick after the burst
    # Wanted falls to 1 when at most two requests are left, at 60 s; the window ends 20 s later.
    assert off == pytest.approx(81.0, abs=1.01)
    assert all(replica.powered[0][1] - replica.powered[0][0] > 5.0 for replica in others[:2])
    assert max(len([r for r in cluster.replicas if r.powered_seconds(t, t + 0.5) > 0]) for t in range(0, 290)) == 3


def test_a_draining_replica_finishes_what_it_has() -> None:
    arrivals = np.concatenate([np.linspace(0.0, 30.0, 60), [200.0]])
    work = np.full(61, 2_000_000)
    scaling = Autoscaling(target=2, max_replicas=4, interval=1.0, startup_delay=0.0, scale_down_delay=0.0)
    groups = (ReplicaGroup(name="r", count=1),)
    cluster, rows = serve(arrivals, work, Deployment(groups=groups, router=LeastLoaded(), autoscaling=scaling))
    assert len(waits(rows)) == 61
    assert cluster.autoscaler.drained >= 3
    assert cluster.retried == 0
    for replica in cluster.replicas[1:]:
        finishes = [at for on, off in replica.powered for at in (on, off)]
        assert None not in finishes
