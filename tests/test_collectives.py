"""Laws of collectives: never faster than the wires allow, monotone, and equal to simpler models where they must be."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cost.algorithms import ALGORITHMS
from perfsim.cost.collective import algorithm_seconds, collective_estimate, fastest_algorithm
from perfsim.cost.speed_of_light import collective_seconds
from perfsim.cost.topology import Fabric, fabric
from perfsim.errors import InfeasibleError
from perfsim.ops.op import Collective
from perfsim.spec import catalog
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import OperatorCurves
from perfsim.spec.load import find_calibration

# Without curves of what was measured on one machine: the laws hold for every machine and algorithm.
PLAIN = {"curves": OperatorCurves()}
EFFICIENCY = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").device.model_copy(update=PLAIN)
PERFECT = EFFICIENCY.model_copy(update={"collective_launch": 0.0, "collective_hop": 0.0, "collective_bandwidth": 1.0})
MACHINES = ("dgx-h100", "dgx-a100", "mi300x-8x", "l40s-8x-pcie", "tpu-v5p-4x", "gb200-nvl72", *catalog.list_clusters())

kinds = st.sampled_from(sorted(ALGORITHMS))
groups = st.sampled_from([2, 3, 4, 6, 8, 12, 16, 32, 48, 64, 96, 128, 256, 512])
strides = st.sampled_from([1, 2, 4, 8])
sizes = st.floats(1, 1e11)
efficiencies = st.builds(
    lambda launch, hop, rate: EFFICIENCY.model_copy(
        update={"collective_launch": launch, "collective_hop": hop, "collective_bandwidth": rate}
    ),
    st.floats(0, 1e-4),
    st.floats(0, 1e-4),
    st.floats(0.01, 1),
)


@cache
def network_of(name: str) -> Fabric:
    machine = catalog.machine(name)
    return fabric(machine.node, machine) if hasattr(machine, "node") else fabric(machine)


def collective(kind: Any, bytes_: Any, group: int, **more: Any) -> Collective:
    return Collective(kind=kind, name="x", count=1, bytes=bytes_, group=group, **more)


def fits(network: Fabric, group: int, stride: int) -> bool:
    try:
        return bool(network.path(group, stride=stride))
    except InfeasibleError:
        return False


def wider(network: Fabric, factor: float) -> Fabric:
    link = network.scale_up.model_copy(update={"bandwidth": network.scale_up.bandwidth * factor})
    tiers = tuple(replace(tier, bandwidth=tier.bandwidth * factor) for tier in network.tiers)
    return replace(network, scale_up=link, tiers=tiers)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(MACHINES), kinds, sizes, groups, strides, efficiencies, st.floats(0, 1))
def test_no_algorithm_beats_the_speed_of_light(
    name: str, kind: str, size: float, group: int, stride: int, e: DeviceEfficiency, across: float
) -> None:
    network = network_of(name)
    if not fits(network, group, stride):
        return
    inside = network.path(group, stride=stride)[0]
    share = (group - (inside.size if inside.scale_up else 1)) / group * across * size
    for work in (
        collective(kind, size, group, stride=stride),
        collective(kind, size, group, stride=stride, across_bytes=share if kind == "all_to_all" else None),
    ):
        bound = collective_seconds(work, network)
        for algorithm, seconds in algorithm_seconds(work, network, e).items():
            assert seconds >= bound * (1 - 1e-9), algorithm
            assert np.isfinite(seconds)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MACHINES), kinds, sizes, groups, st.floats(1, 10), efficiencies)
def test_more_bytes_are_never_faster_and_wider_links_never_slower(
    name: str, kind: str, size: float, group: int, factor: float, e: DeviceEfficiency
) -> None:
    network = network_of(name)
    if not fits(network, group, 1):
        return
    before = collective_estimate(collective(kind, size, group), network, e).seconds
    assert collective_estimate(collective(kind, size * factor, group), network, e).seconds >= before
    after = collective_estimate(collective(kind, size, group), wider(network, factor), e).seconds
    assert after <= before * (1 + 1e-12)
    assert e.collective_launch <= before


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MACHINES), kinds, st.lists(sizes, min_size=1, max_size=5), groups, st.integers(0, 5))
def test_arrays_are_as_good_as_numbers(name: str, kind: str, batch: list[float], group: int, count: int) -> None:
    network = network_of(name)
    if not fits(network, group, 1):
        return
    work = Collective(kind, "x", count, np.array(batch), group, active=np.arange(len(batch)) % 2.0)
    together = collective_estimate(work, network, EFFICIENCY)
    names, _ = fastest_algorithm(work, network, EFFICIENCY)
    for index, size in enumerate(batch):
        alone = Collective(kind, "x", count, size, group, active=index % 2.0)
        assert together.seconds[index] == collective_estimate(alone, network, EFFICIENCY).seconds
        assert names[index] == fastest_algorithm(alone, network, EFFICIENCY)[0]


@pytest.mark.parametrize("kind", sorted(ALGORITHMS))
def test_one_gpu_has_nobody_to_talk_to(kind: str) -> None:
    alone = collective_estimate(collective(kind, np.array([1.0, 1e9]), 1), network_of("dgx-h100"), EFFICIENCY)
    assert alone.seconds.tolist() == [0.0, 0.0]
    assert collective_seconds(collective(kind, 1e9, 1), network_of("dgx-h100")) == 0.0


@pytest.mark.parametrize("name", ["dgx-h100", "dgx-a100", "mi300x-8x", "l40s-8x-pcie"])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e9])
def test_hierarchical_on_one_node_is_the_flat_algorithm(name: str, size: float) -> None:
    times = algorithm_seconds(collective("all_reduce", size, 8), network_of(name), EFFICIENCY)
    assert times["hierarchical"] == pytest.approx(times.get("two_shot", times["ring"]), rel=1e-12)


def chunks_around(hops: list[float], steps: int) -> float:
    """A ring in steps: GPU i passes on in step k what GPU i-1 had passed to it in step k-1; nothing else waits."""
    ready = [0.0] * len(hops)
    for _ in range(steps):
        ready = [ready[i - 1] + hops[i - 1] for i in range(len(hops))]
    return max(ready)


@pytest.mark.parametrize(("group", "steps", "kind"), [(32, 62, "all_reduce"), (32, 31, "all_gather"),
                                                      (8, 14, "all_reduce"), (2, 2, "all_reduce")])  # fmt: skip
def test_a_ring_waits_for_its_slowest_chunk(group: int, steps: int, kind: str) -> None:
    network = network_of("dgx-h100-superpod")
    hop = EFFICIENCY.collective_hop
    path = network.path(group)
    hops = [hop + path[-1 if i % 8 == 7 else 0].latency for i in range(group)]
    if group <= 8:
        hops = [hop + path[0].latency] * group
    times = algorithm_seconds(collective(kind, 0.0, group), network, EFFICIENCY)
    waited = float(times["ring"]) - EFFICIENCY.collective_launch
    assert waited == pytest.approx(chunks_around(hops, steps), rel=1e-12)


@pytest.mark.parametrize(("name", "group", "bus"), [
    ("dgx-h100", 8, 2 * 7 / 8 / (1 + 1 / 8) * 450),  # the vector once out, and an eighth of the sum
    ("dgx-a100", 8, 300.0),
    ("mi300x-8x", 8, 448.0),
    ("mi300x-8x", 2, 64.0),
    ("l40s-8x-pcie", 8, 31.0),
    ("dgx-h100-superpod", 16, 2 * 15 / 16 * 400),  # two nodes are parent and child once each way
    ("dgx-h100-superpod", 32, 400.0),  # rings: eight cards of 50 GB/s
    ("dgx-a100-superpod", 32, 200.0),
    ("tpu-v5p-pod", 8960, 600.0),
])  # fmt: skip
def test_bus_bandwidth_of_a_long_all_reduce(name: str, group: int, bus: float) -> None:
    size = 1e15
    seconds = collective_estimate(collective("all_reduce", size, group), network_of(name), PERFECT).seconds
    assert 2 * (group - 1) / group * size / seconds / 1e9 == pytest.approx(bus, rel=1e-3)


def test_switches_reduce_only_where_they_can() -> None:
    for name, possible in {"dgx-h100": True, "dgx-b200": True, "gb200-nvl72": True, "dgx-a100": False,
                           "mi300x-8x": False, "l40s-8x-pcie": False}.items():  # fmt: skip
        assert ("nvls" in algorithm_seconds(collective("all_reduce", 1e6, 4), network_of(name), EFFICIENCY)) is possible
    assert "nvls_tree" in algorithm_seconds(
        collective("all_reduce", 1e6, 16), network_of("dgx-h100-superpod"), EFFICIENCY
    )


def test_small_messages_take_few_hops_and_large_ones_few_bytes() -> None:
    names, _ = fastest_algorithm(
        collective("all_reduce", np.array([1e3, 1e6, 1e9]), 8), network_of("dgx-a100"), EFFICIENCY
    )
    assert names.tolist() == ["one_shot", "two_shot", "two_shot"]
    names, _ = fastest_algorithm(
        collective("all_reduce", np.array([1e3, 1e9]), 32), network_of("dgx-a100-superpod"), EFFICIENCY
    )
    assert names.tolist() == ["hierarchical", "ring"]


def test_only_what_crosses_the_network_loads_it() -> None:
    network, size, group = network_of("dgx-h100-superpod"), 64e6, 32
    even = collective_estimate(collective("all_to_all", size, group), network, PERFECT).seconds
    assert even == pytest.approx(24 / 32 * size / 50e9, rel=0.01)
    once_per_node = collective("all_to_all", size, group, across_bytes=size / 4)
    assert collective_estimate(once_per_node, network, PERFECT).seconds == pytest.approx(size / 4 / 50e9, rel=0.01)
    at_home = collective("all_to_all", size, group, across_bytes=0.0)
    assert collective_estimate(at_home, network, PERFECT).seconds == pytest.approx(7 / 8 * size / 450e9, rel=0.02)


def test_the_network_may_have_coefficients_of_its_own() -> None:
    network, size = network_of("dgx-h100-superpod"), 1e12
    better = EFFICIENCY.model_copy(update={"network_bandwidth": 1.0, "network_hop": 0.0})
    for group, factor in {8: 1.0, 32: EFFICIENCY.collective_bandwidth}.items():
        work = collective("all_to_all", size, group)
        before, after = (collective_estimate(work, network, e).seconds for e in (EFFICIENCY, better))
        assert after == pytest.approx(before * factor, rel=1e-3)


def test_in_switch_reduction_may_have_a_coefficient_of_its_own() -> None:
    network, slower = network_of("dgx-h100"), EFFICIENCY.model_copy(update={"in_switch_bandwidth": 0.68})
    work = collective("all_reduce", 1e12, 8)
    times = [algorithm_seconds(work, network, e) for e in (EFFICIENCY, slower)]
    assert times[1]["nvls"] == pytest.approx(times[0]["nvls"] * EFFICIENCY.collective_bandwidth / 0.68)
    assert times[1]["two_shot"] == times[0]["two_shot"]


def test_oversubscription_hurts_what_crosses_the_spine_only() -> None:
    network = network_of("hgx-h200-roce-128x")  # five nodes per leaf; a leaf has 22 ports up for 40 down
    size = 1e10
    seconds = {group: collective_estimate(collective("all_to_all", size, group), network, PERFECT).seconds
               for group in (40, 160)}  # fmt: skip
    assert seconds[40] == pytest.approx(32 / 40 * size / 50e9, rel=1e-3)
    assert seconds[160] == pytest.approx(120 / 160 * size / (50e9 * 22 / 40), rel=1e-3)
    # A ring leaves a leaf once per rail, for which its uplinks are more than enough.
    rings = collective_estimate(collective("all_reduce", size, 160), network, PERFECT).seconds
    assert rings == pytest.approx(2 * 159 / 160 * size / 400e9, rel=5e-3)


def test_a_stage_sends_to_the_next_one_over_what_joins_them() -> None:
    network, size = network_of("dgx-h100-superpod"), 1e9
    near = collective_estimate(collective("send_recv", size, 2, stride=4), network, PERFECT)
    far = collective_estimate(collective("send_recv", size, 4, stride=8), network, PERFECT)
    assert near.seconds == pytest.approx(size / 450e9, rel=1e-3)
    assert far.seconds == pytest.approx(size / 50e9, rel=1e-3)
    assert (near.bound, far.bound) == ("link", "network")
