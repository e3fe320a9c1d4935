"""Max-min fair links: conservation, capacity, optimality, exact times, and processor sharing as the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.sim.clock import CountingEnvironment, call_at
from perfsim.sim.link import FairNetwork, Flow

CLOSE = 1e-9


def network(*bandwidths: float) -> tuple[CountingEnvironment, FairNetwork]:
    env = CountingEnvironment()
    net = FairNetwork(env)
    for index, bandwidth in enumerate(bandwidths):
        net.add_link(f"l{index}", bandwidth)
    return env, net


def check_max_min(net: FairNetwork) -> None:
    """No link over capacity; every flow is at its cap or crosses a full link on which no flow is faster."""
    for link in net._links.values():
        assert sum(flow.rate for flow in link.flows) <= link.bytes_per_s * (1 + CLOSE)
    for flow in {flow for link in net._links.values() for flow in link.flows}:
        assert flow.rate <= flow.cap
        held = flow.rate >= flow.cap * (1 - CLOSE) or any(
            sum(other.rate for other in link.flows) >= link.bytes_per_s * (1 - CLOSE)
            and flow.rate >= max(other.rate for other in link.flows) * (1 - CLOSE)
            for link in flow.links
        )
        assert held, f"flow {flow.id} could be faster without harm to a slower one"


sizes = st.floats(1e-3, 1e4)
flows = st.lists(
    st.tuples(
        st.floats(0, 50),  # start
        st.sets(st.integers(0, 3), min_size=1),  # path
        sizes,
        st.sampled_from([0.0, 0.5, 3.0]),  # latency
        st.sampled_from([math.inf, 0.7, 20.0]),  # cap
        st.none() | st.floats(0, 30),  # cancelled so long after its start
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(0.1, 100), min_size=4, max_size=4),
    flows,
    st.lists(st.tuples(st.floats(0, 60), st.integers(0, 3), st.floats(0.1, 100)), max_size=3),
)
def test_bytes_are_conserved_and_shares_are_max_min_at_every_event(
    bandwidths: list[float], plan: list[tuple], changes: list[tuple[float, int, float]]
) -> None:
    env, net = network(*bandwidths)
    started: list[Flow] = []
    arrived: list[Flow] = []

    def start(size: float, path: set[int], latency: float, cap: float, cancel_after: float | None) -> None:
        flow = net.transfer([f"l{i}" for i in sorted(path)], size, latency, arrived.append, cap=cap)
        started.append(flow)
        if cancel_after is not None:
            call_at(env, env.now + cancel_after, lambda _: net.cancel(flow))

    for at, path, size, latency, cap, cancel_after in plan:
        call_at(env, at, lambda _, a=(size, path, latency, cap, cancel_after): start(*a))
    for at, link, bandwidth in changes:
        call_at(env, at, lambda _, link=link, to=bandwidth: net.set_bandwidth(f"l{link}", to))
    while env.peek() < math.inf:
        env.step()
        check_max_min(net)

    assert len(started) == len(plan)
    assert net.active == 0
    assert set(arrived) == {flow for flow in started if not flow.cancelled}
    for stats in net.stats():
        sent = sum(flow.bytes - flow.left for flow in started if stats.name in flow.path)
        assert stats.bytes == pytest.approx(sent, rel=CLOSE)
        largest = max([stats.bytes_per_s, bandwidths[int(stats.name[1])], *(c[2] for c in changes)])
        assert stats.bytes <= largest * stats.busy_s * (1 + CLOSE) + CLOSE
    for flow in arrived:
        assert flow.left == 0
        fastest = min([flow.cap, *(max([bandwidths[int(n[1])], *(c[2] for c in changes)]) for n in flow.path)])
        assert flow.finish - flow.start >= (flow.latency + flow.bytes / fastest) * (1 - CLOSE)


@given(sizes, st.lists(st.floats(0.1, 1e12), min_size=1, max_size=5), st.floats(0, 10), st.floats(0.1, 1e12))
def test_alone_on_the_wire_the_time_is_the_closed_form(
    size: float, bandwidths: list[float], latency: float, cap: float
) -> None:
    env, net = network(*bandwidths)
    flow = net.transfer([f"l{i}" for i in range(len(bandwidths))], size, latency, cap=cap)
    env.run()
    assert flow.finish == pytest.approx(latency + size / min(*bandwidths, cap), rel=1e-12)
    assert env.events <= 2


@given(st.integers(1, 40), sizes, st.floats(0.1, 1e9))
def test_equal_flows_share_equally_and_end_together(n: int, size: float, bandwidth: float) -> None:
    env, net = network(bandwidth)
    ended: list[int] = []
    started = [net.transfer(["l0"], size, callback=lambda flow: ended.append(flow.id)) for _ in range(n)]
    assert len({flow.rate for flow in started}) == 1
    env.run()
    assert ended == list(range(n))
    for flow in started:
        assert flow.finish == pytest.approx(n * size / bandwidth, rel=1e-12)


def test_the_textbook_line_network() -> None:
    # One flow over both links, one more on the first, three more on the second: the long one gets a quarter of link 1.
    env, net = network(1.0, 1.0)
    long = net.transfer(["l0", "l1"], 1.0)
    short = net.transfer(["l0"], 1.0)
    others = [net.transfer(["l1"], 1.0) for _ in range(3)]
    assert [long.rate, short.rate, *(flow.rate for flow in others)] == pytest.approx([0.25, 0.75, 0.25, 0.25, 0.25])
    env.run()
    assert short.finish == pytest.approx(4 / 3)
    assert long.finish == pytest.approx(4.0)


def test_a_cap_leaves_the_rest_to_the_others() -> None:
    _, net = network(10.0)
    slow, fast = net.transfer(["l0"], 9.0, cap=2.0), net.transfer(["l0"], 9.0)
    assert (slow.rate, fast.rate) == (2.0, 8.0)


def test_flows_on_other_links_keep_rate_and_end_to_the_bit() -> None:
    env, net = network(3.0, 7.0)
    flow = net.transfer(["l0"], 1.0)
    due = flow.due
    call_at(env, 0.1, lambda _: net.transfer(["l1"], 5.0))
    env.run(until=0.2)
    assert flow.due == due
    assert flow.since == 0.0


@pytest.mark.parametrize("draw", [
    lambda rng: 1.0,
    lambda rng: rng.exponential(1.0),
    lambda rng: 0.5 if rng.random() < 0.9 else 5.5,
])  # fmt: skip
def test_one_link_with_poisson_flows_is_processor_sharing(draw: Callable[[np.random.Generator], float]) -> None:
    # M/G/1-PS: the mean time is E[S] / (1 - load), whatever the distribution of sizes (Kleinrock, Queueing Systems 2).
    load, count = 0.6, 20_000
    rng = np.random.Generator(np.random.PCG64(7))
    env, net = network(1.0)
    times: list[float] = []
    at = 0.0
    for _ in range(count):
        at += rng.exponential(1 / load)
        call_at(env, at, lambda _: net.transfer(["l0"], draw(rng), callback=lambda f: times.append(f.finish - f.start)))
    env.run()
    assert len(times) == count
    assert np.mean(times) == pytest.approx(1 / (1 - load), rel=0.06)
    assert net.stats()[0].busy_s / env.now == pytest.approx(load, rel=0.04)
    assert env.events < 3 * count


def test_latency_does_not_hold_the_link() -> None:
    env, net = network(1.0)
    first = net.transfer(["l0"], 1.0, latency=10.0)
    call_at(env, 1.0, lambda _: net.transfer(["l0"], 1.0))
    env.run(until=1.5)
    assert (first.sent_s, first.finish) == (1.0, None)
    assert net.remaining(first) == 0.0
    env.run()
    assert first.finish == 11.0
    assert net.stats()[0].busy_s == 2.0


def test_a_broken_link_holds_its_flows_until_it_is_back() -> None:
    env, net = network(2.0)
    flow = net.transfer(["l0"], 4.0)
    call_at(env, 1.0, lambda _: net.set_bandwidth("l0", 0.0))
    call_at(env, 5.0, lambda _: net.set_bandwidth("l0", 1.0))
    env.run()
    assert flow.finish == 7.0


def test_cancelled_flows_free_their_share_and_never_call_back() -> None:
    seen: list[Flow] = []
    env = CountingEnvironment()
    net = FairNetwork(env, observer=seen.append)
    net.add_link("l0", 2.0)
    gone = net.transfer(["l0"], 100.0, callback=lambda _: pytest.fail("a cancelled flow arrived"))
    in_flight = net.transfer(["l0"], 1.0, latency=5.0, callback=lambda _: pytest.fail("a cancelled flow arrived"))
    kept = net.transfer(["l0"], 4.0)
    call_at(env, 3.0, lambda _: (net.cancel(gone), net.cancel(gone), net.cancel(in_flight)))
    env.run()
    # 3 s at 2/3 each until flow 2 has left at 1.5 s, then 1 B/s each, then 2 B/s alone.
    assert kept.finish == pytest.approx(3.75)
    assert gone.left == pytest.approx(100 - 2.5)
    assert seen == [gone, in_flight, kept]
    net.cancel(kept)
    assert net.active == 0


def test_processes_wait_for_the_event() -> None:
    env, net = network(1.0)
    log: list[float] = []

    def process() -> object:
        flow = net.transfer(["l0"], 2.0, latency=1.0)
        assert (yield flow.event) is flow
        log.append(env.now)
        yield flow.event
        log.append(env.now)
        yield net.transfer([], 0.0, latency=2.0).event
        log.append(env.now)

    env.process(process())
    env.run()
    assert log == [3.0, 3.0, 5.0]


def test_the_same_flows_give_the_same_times_to_the_bit() -> None:
    def run() -> list[float]:
        rng = np.random.Generator(np.random.PCG64(3))
        env, net = network(*rng.uniform(1, 9, size=6))
        ends: list[float] = []
        for _ in range(300):
            path = [f"l{i}" for i in rng.permutation(6)[: rng.integers(1, 4)]]
            start = partial(net.transfer, path, rng.exponential(5.0), 0.1, lambda flow: ends.append(flow.finish))
            call_at(env, rng.uniform(0, 100), lambda _, start=start: start())
        env.run()
        return ends

    first = run()
    assert len(first) == 300
    assert first == run()


def test_misuse_is_refused() -> None:
    _, net = network(1.0)
    with pytest.raises(ValueError, match="already"):
        net.add_link("l0", 1.0)
    with pytest.raises(ValueError, match="positive"):
        net.add_link("l1", 0.0)
    with pytest.raises(KeyError):
        net.transfer(["nowhere"], 1.0)
    with pytest.raises(ValueError, match="twice"):
        net.transfer(["l0", "l0"], 1.0)
    with pytest.raises(ValueError, match="rate cap"):
        net.transfer([], 1.0)
    with pytest.raises(ValueError, match="latency"):
        net.transfer(["l0"], 1.0, -1.0)
