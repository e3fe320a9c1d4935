"""Routers on replicas that are nothing but a load, and whole runs that show what a policy is worth."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cluster_runs import SMALL, random_chunk, run_cluster

from perfsim.serving.request import Request
from perfsim.serving.router import make_router
from perfsim.spec.deployment import (
    Deployment,
    LeastLoaded,
    PowerOfTwo,
    PrefixAware,
    ReplicaGroup,
    RoundRobin,
    SessionSticky,
)
from perfsim.traffic import RequestChunk


def replicas(*loads: int) -> list[Any]:
    return [SimpleNamespace(index=i, load=load, block_size=16, serving=True) for i, load in enumerate(loads)]


def request(keys: list[int] | None = None, *, prompt: int = 640, session: int = -1) -> Request:
    """Each key stands for four blocks of 16 tokens."""
    keys = keys or []
    made = Request(0, 0.0, 0.0, prompt, 10, 0, keys, [4 * (i + 1) for i in range(len(keys))])
    made.session = session
    return made


def test_turns_go_on_when_replicas_come_and_go() -> None:
    router, all_of = make_router(RoundRobin(), seed=0), replicas(0, 0, 0, 0)
    assert [router.choose(request(), all_of).index for _ in range(5)] == [0, 1, 2, 3, 0]
    without = [all_of[0], all_of[2], all_of[3]]
    assert [router.choose(request(), without).index for _ in range(4)] == [2, 3, 0, 2]
    assert [router.choose(request(), all_of).index for _ in range(2)] == [3, 0]


def test_the_first_of_the_least_loaded_is_chosen() -> None:
    router = make_router(LeastLoaded(), seed=0)
    assert router.choose(request(), replicas(3, 1, 2, 1)).index == 1


def test_two_choices_never_take_the_most_loaded_and_spread_evenly() -> None:
    router, loads = make_router(PowerOfTwo(), seed=3), replicas(9, 1, 1, 1)
    chosen = np.bincount([router.choose(request(), loads).index for _ in range(6000)], minlength=4)
    assert chosen[0] == 0
    # Of the pairs of four, a sixth each; one of three equal replicas is in half of them and wins or draws.
    assert chosen[1:] == pytest.approx([2000] * 3, rel=0.1)
    assert router.choose(request(), replicas(5)).index == 0


def test_random_choices_depend_on_the_seed_alone() -> None:
    def choices(seed: int) -> list[int]:
        router = make_router(PowerOfTwo(), seed=seed)
        return [router.choose(request(), replicas(0, 0, 0, 0, 0)).index for _ in range(50)]

    assert choices(1) == choices(1) != choices(2)


def test_a_session_stays_until_its_replica_stops_serving() -> None:
    router, all_of = make_router(SessionSticky(), seed=0), replicas(0, 1, 2)
    assert router.choose(request(session=7), all_of).index == 0
    all_of[0].load = 50
    assert router.choose(request(session=7), all_of).index == 0
    assert router.choose(request(), all_of).index == 1
    all_of[0].serving = False
    assert router.choose(request(session=7), all_of[1:]).index == 1
    all_of[0].serving = True
    assert router.choose(request(session=7), all_of).index == 1


def test_the_longest_match_wins_while_the_loads_are_in_balance() -> None:
    router, all_of = (
        make_router(PrefixAware(match_threshold=0.3, balance_abs=5, balance_rel=1.5), seed=0),
        replicas(0, 1),
    )
    assert router.choose(request([1, 2, 3, 4]), all_of).index == 0
    all_of[0].load = 4
    assert router.choose(request([1, 2, 3, 9]), all_of).index == 0  # 192 of 640 tokens: just 30%
    assert router.choose(request([1, 2, 8]), all_of).index == 1  # 128 tokens are not enough
    assert router.choose(request([1, 2, 8, 5]), all_of).index == 1  # now it has the longest
    all_of[0].load = 7
    assert router.choose(request([1, 2, 3, 4]), all_of).index == 1  # out of balance
    assert router.choose(request([6]), all_of).index == 1


def test_of_equal_matches_the_one_that_had_it_first_is_chosen_until_it_is_gone() -> None:
    router, all_of = make_router(PrefixAware(), seed=0), replicas(9, 0, 9)
    router.choose(request([1, 2, 3, 4]), all_of)
    all_of[1].load, all_of[0].load = 99, 0  # out of balance: the first one gets a copy
    assert router.choose(request([1, 2, 3, 4]), all_of).index == 0
    all_of[1].load = 30
    assert router.choose(request([1, 2, 3, 4]), all_of).index == 1
    router.forget(all_of[1])
    assert router.choose(request([1, 2, 3, 4]), [all_of[0], all_of[2]]).index == 0


def test_what_a_router_remembers_is_bounded_and_forgets_the_oldest_and_deepest_first() -> None:
    router = make_router(PrefixAware(tree_tokens=256, match_threshold=0.01), seed=0)
    one = replicas(0)
    router.choose(request([1, 2, 3]), one)
    router.choose(request([4, 5]), one)  # five keys of 64 tokens: one too many, and key 3 is the deepest of the oldest
    assert router._match(request([1, 2, 3])) == 2
    assert router._match(request([4, 5])) == 2
    router.choose(request([1, 9]), one)  # touches 1, drops 2
    assert router._match(request([1, 2])) == 1
    assert len(router._holders) == 4
    for key in range(100, 1000):
        router.choose(request([key, -key]), one)
    assert len(router._holders) == 4


def shared_prefixes(count: int, *, rate: float, prefixes: int) -> RequestChunk:
    rng = np.random.default_rng(5)
    return RequestChunk(
        np.cumsum(rng.exponential(1 / rate, count)), np.full(count, 300), rng.integers(1, 60, count),
        prefix_id=rng.integers(0, prefixes, count), prefix_tokens=np.full(count, 256),
    )  # fmt: skip


def test_following_prefixes_finds_more_of_them_than_taking_turns() -> None:
    """Each pool holds about five of the twelve prefixes, all four together hold all."""
    chunk = shared_prefixes(400, rate=40.0, prefixes=12)
    config = replace(SMALL, total_blocks=150)
    hits = {}
    for router in (RoundRobin(), PrefixAware(balance_abs=16)):
        run = run_cluster(chunk, Deployment(groups=(ReplicaGroup(name="r", count=4),), router=router), config=config)
        hits[router.kind] = run.column("cached_tokens").sum() / 300 / 400
        assert sum(replica.dispatched for replica in run.cluster.replicas) == 400
    assert hits["prefix_aware"] > 0.7
    assert hits["round_robin"] < 0.6


def test_looking_at_loads_shortens_queues() -> None:
    """Mean number in each replica: taking turns >= the better of two >= fewest requests, with room for noise."""
    chunk = random_chunk(1500, rate=105.0)
    means = {}
    for router in (RoundRobin(), PowerOfTwo(), LeastLoaded()):
        run = run_cluster(chunk, Deployment(groups=(ReplicaGroup(name="r", count=4),), router=router),
                          config=replace(SMALL, max_num_seqs=4))  # fmt: skip
        means[router.kind] = float((run.column("scheduled_s") - run.column("queued_s")).mean())
    assert means["least_loaded"] < 0.9 * means["power_of_two"] < 0.9 * means["round_robin"]


def test_sessions_keep_together() -> None:
    run = run_cluster(
        random_chunk(300, rate=50.0, sessions=9),
        Deployment(groups=(ReplicaGroup(name="r", count=3),), router=SessionSticky()),
    )
    assert min(replica.dispatched for replica in run.cluster.replicas) > 0
    assert len(run.rows) == 300
