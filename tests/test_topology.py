"""Fabrics: closed forms equal the explicit graph (hops, what leaves a unit, bisection), and paths use what exists."""

from __future__ import annotations

from math import prod
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cost.graph import network_graph
from perfsim.cost.topology import bisection, fabric, network_tiers
from perfsim.errors import InfeasibleError, InputError
from perfsim.run import simulate
from perfsim.spec import catalog
from perfsim.spec.cluster import Cluster, Dragonfly, FatTree, Network, Torus
from perfsim.spec.hardware import NetworkCards, Node
from perfsim.spec.load import load_scenario
from perfsim.spec.save import scenario_yaml

GBPS = 1e9


def node_with(cards: int, name: str = "dgx-h100") -> Node:
    nics = NetworkCards(kind="infiniband", count=cards, bandwidth=50 * GBPS, latency=1e-6)
    return catalog.node(name).model_copy(update={"nics": nics})


def cluster_of(network: Network, nodes: int, cards: int = 8) -> Cluster:
    return Cluster(name="c", label="c", node=node_with(cards), node_count=nodes, network=network)


def tree(*, rails: bool, radix: int, levels: Any, over: float = 1.0) -> FatTree:
    return FatTree(rail_optimised=rails, radix=radix, levels=levels, oversubscription=over, hop_latency=1e-7)


MACHINES = [
    cluster_of(tree(rails=True, radix=16, levels=2), 16),
    cluster_of(tree(rails=True, radix=16, levels=2, over=3), 24),
    cluster_of(tree(rails=True, radix=32, levels=3, over=1), 64),
    cluster_of(tree(rails=False, radix=16, levels=2), 16),
    cluster_of(tree(rails=False, radix=16, levels=3, over=1), 32),
    cluster_of(tree(rails=False, radix=24, levels=2, over=2), 24, cards=4),
    cluster_of(tree(rails=False, radix=20, levels=2, over=1.5), 20, cards=5),
    cluster_of(
        Dragonfly(nodes_per_router=2, routers_per_group=4, groups=9, local_bandwidth=300 * GBPS,
                  global_bandwidth=200 * GBPS, hop_latency=1e-7), 72, cards=4,
    ),
]  # fmt: skip


def between(graph: Any, one: list[Any], other: list[Any]) -> float:
    flow = graph.copy()
    for end, vertices in (("from", one), ("to", other)):
        for vertex in vertices:
            flow.add_edge(end, vertex)  # no capacity: unlimited
    return float(nx.maximum_flow_value(flow, "from", "to"))


def nodes(first: int, last: int) -> list[Any]:
    return [("node", node) for node in range(first, last)]


@pytest.mark.parametrize("cluster", MACHINES, ids=lambda c: f"{c.network.kind}-{c.node_count}")
def test_a_tier_passes_as_many_switches_as_the_graph(cluster: Cluster) -> None:
    graph, gpus = network_graph(cluster), cluster.node.accelerator_count
    lengths = nx.single_source_shortest_path_length(graph, ("node", 0))
    for tier in network_tiers(cluster):
        farthest = max(lengths[vertex] for vertex in nodes(0, tier.nodes))
        if tier.nodes > 1:  # else a leaf has ports for one node only
            assert tier.switches == farthest - 1  # vertices between two nodes
        # Card to card through one switch, and a hop for each further one.
        assert tier.latency == pytest.approx(1e-6 + (tier.switches - 1) * 1e-7)
    assert network_tiers(cluster)[-1].nodes == cluster.node_count
    assert fabric(cluster.node, cluster).gpus == cluster.node_count * gpus


@pytest.mark.parametrize("cluster", MACHINES, ids=lambda c: f"{c.network.kind}-{c.node_count}")
def test_what_leaves_a_unit_is_the_maximum_flow(cluster: Cluster) -> None:
    graph, gpus = network_graph(cluster), cluster.node.accelerator_count
    inside = 1
    for tier in network_tiers(cluster):
        flow = between(graph, nodes(0, inside), nodes(inside, cluster.node_count))
        assert inside * gpus * tier.bandwidth == pytest.approx(flow)
        inside = tier.nodes


@pytest.mark.parametrize("cluster", [MACHINES[0], MACHINES[1], MACHINES[3], MACHINES[5]],
                         ids=lambda c: f"{c.network.kind}-{c.node_count}")  # fmt: skip
def test_bisection_is_the_maximum_flow_between_two_halves(cluster: Cluster) -> None:
    half = cluster.node_count // 2
    flow = between(network_graph(cluster), nodes(0, half), nodes(half, cluster.node_count))
    assert bisection(cluster) == pytest.approx(flow)


def test_a_dragonfly_is_cut_between_groups() -> None:
    even = Dragonfly(nodes_per_router=2, routers_per_group=4, groups=8, local_bandwidth=300 * GBPS,
                     global_bandwidth=20 * GBPS, hop_latency=1e-7)  # fmt: skip
    cluster = cluster_of(even, 64, cards=4)
    assert bisection(cluster) == pytest.approx(4 * 4 * 20 * GBPS)
    assert between(network_graph(cluster), nodes(0, 32), nodes(32, 64)) == pytest.approx(bisection(cluster))


@pytest.mark.parametrize(("shape", "wrap"), [((4, 8), True), ((4, 8), False), ((2, 2), True), ((4, 4), True)])
def test_a_torus_is_cut_across_its_longest_axis(shape: tuple[int, ...], wrap: bool) -> None:
    host = catalog.node("tpu-v5e-4x")
    cluster = Cluster(name="t", label="t", node=host, node_count=prod(shape) // 4,
                      network=Torus(shape=shape, wrap=wrap))  # fmt: skip
    graph = network_graph(cluster)
    far = [vertex for vertex in graph if vertex[2] >= shape[1] // 2]
    near = [vertex for vertex in graph if vertex[2] < shape[1] // 2]
    assert bisection(cluster) == pytest.approx(between(graph, near, far))
    # Uniform traffic at `spread` sends half of everything across the cut, and fills it at most.
    (level,) = fabric(host, cluster).path(prod(shape))
    assert level.spread * len(near) / 2 <= bisection(cluster) * (1 + 1e-12)
    assert level.ring <= host.scale_up.bandwidth


def test_a_block_of_a_pod_is_nearly_a_cube() -> None:
    pod = catalog.cluster("tpu-v5p-pod")
    network = fabric(pod.node, pod)
    wire = pod.node.scale_up.bandwidth / 6
    (cube,) = network.path(64)  # 4 x 4 x 4, open on all sides: three rings there and back
    assert cube.ring == pytest.approx(3 * wire)
    (whole,) = network.path(8960)
    assert whole.ring == pytest.approx(6 * wire)
    with pytest.raises(InfeasibleError, match="no block of a torus of 16x20x28"):
        network.path(8959)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(catalog.list_clusters()), st.integers(1, 2048), st.sampled_from([1, 2, 4, 8, 16]))
def test_a_path_holds_the_group_and_narrows_outwards(name: str, group: int, stride: int) -> None:
    cluster = CLUSTERS[name]
    network = fabric(cluster.node, cluster)
    try:
        path = network.path(group, stride=stride)
    except InfeasibleError:
        assert (group - 1) * stride >= cluster.accelerator_count or cluster.network.kind == "torus"
        return
    assert prod(level.size for level in path) == group
    below = 1
    for level in path:
        assert level.below == below
        assert 0 < level.peer <= level.spread * (1 + 1e-12) or level.kind == "ici"
        assert level.ring <= level.exit * (1 + 1e-12) or level.kind == "ici"
        below *= level.size
    network_levels = [level.spread for level in path if not level.scale_up]
    assert network_levels == sorted(network_levels, reverse=True)
    inside = [level.size for level in path if level.scale_up and level.kind != "ici"]
    assert prod(inside) <= max(1, cluster.node.accelerator_count // min(stride, cluster.node.accelerator_count))


CLUSTERS = {name: catalog.cluster(name) for name in catalog.list_clusters()}


def test_ranks_apart_leave_the_node_sooner() -> None:
    pod = CLUSTERS["dgx-h100-superpod"]
    network = fabric(pod.node, pod)
    sizes = {
        (group, stride): [(level.kind, level.size) for level in network.path(group, stride=stride)]
        for group, stride in [(8, 1), (4, 2), (4, 8), (16, 1), (64, 8), (2, 256)]
    }
    assert sizes[8, 1] == [("nvlink", 8)]
    assert sizes[4, 2] == [("nvlink", 4)]
    assert sizes[4, 8] == [("leaf", 4)]  # one GPU per node: the same rail
    assert sizes[16, 1] == [("nvlink", 8), ("leaf", 2)]
    assert sizes[64, 8] == [("leaf", 32), ("spine", 2)]
    assert sizes[2, 256] == [("spine", 2)]


def test_a_mesh_gives_a_group_only_its_own_links() -> None:
    network = fabric(catalog.node("mi300x-8x"))
    assert [network.path(n)[0].spread / GBPS for n in (2, 4, 8)] == pytest.approx([64, 192, 448])
    # Hamiltonian cycles of the complete graph: 1 of 2 vertices, 1 of 4 and 3 of 8, each both ways round.
    assert [network.path(n)[0].ring / GBPS for n in (2, 4, 8)] == pytest.approx([64, 128, 384])


def test_a_card_is_no_faster_than_the_slot_that_it_is_in() -> None:
    slow = node_with(8, "a100-8x-pcie")  # PCIe 4.0, 400 Gbit/s cards
    cluster = Cluster(name="c", label="c", node=slow, node_count=2, network=tree(rails=True, radix=64, levels=1))
    assert network_tiers(cluster)[0].bandwidth == slow.host_link.bandwidth == 31 * GBPS


def test_what_does_not_fit_says_why() -> None:
    alone = fabric(catalog.node("dgx-h100"))
    assert alone.path(1) == ()
    with pytest.raises(InfeasibleError, match="do not fit a machine of 8") as caught:
        alone.path(16)
    assert caught.value.binding == "accelerators"
    with pytest.raises(ValueError, match="do not fit a network that holds 64"):
        cluster_of(tree(rails=True, radix=64, levels=1), 65)
    with pytest.raises(ValueError, match="too many for switches of 4 ports"):
        cluster_of(tree(rails=True, radix=4, levels=2), 2)
    with pytest.raises(ValueError, match="names no network cards"):
        Cluster(name="c", label="c", node=catalog.node("h20-8x-sxm"), node_count=2,
                network=tree(rails=True, radix=64, levels=1))  # fmt: skip
    with pytest.raises(ValueError, match="needs a node with such a scale_up topology"):
        Cluster(name="c", label="c", node=node_with(8), node_count=2, network=Torus(shape=(4, 4)))


def test_unknown_clusters_are_named(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="did you mean 'dgx-h100-superpod'"):
        catalog.machine("dgx-h100-superpot")
    assert catalog.machine("h100") == catalog.node("dgx-h100")
    assert catalog.machine("superpod") == CLUSTERS["dgx-h100-superpod"]
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nlabel: mine\nnode: dgx-h100\nnode_count: 2\nnetwork: {kind: fat_tree, "
                    "rail_optimised: true, radix: 64, levels: 1, hop_latency: 300ns}\n")  # fmt: skip
    mine = catalog.machine(str(file))
    assert isinstance(mine, Cluster)
    assert mine.accelerator_count == 16
    file.write_text(file.read_text().replace("radix", "radius"))
    with pytest.raises(InputError, match=r"mine.yaml: .*unknown key 'radius'; did you mean 'radix'"):
        catalog.machine(str(file))


def test_a_replica_over_two_nodes_waits_for_the_network() -> None:
    scenario = load_scenario(hardware="superpod", model="llama-2-7b-hf",
                             overrides=["parallel.tp=16", "workload.num_requests=30"])  # fmt: skip
    far = simulate(scenario)
    near = simulate(scenario.replace(**{"parallel.tp": 8}))
    assert far.bound["network"] > 0.1
    assert near.bound.get("network", 0.0) == 0.0
    assert near.bound["link"] > 0.0


def test_a_scenario_may_name_a_cluster(tmp_path: Any) -> None:
    scenario = load_scenario(hardware="superpod", overrides=["parallel.tp=16", "model=llama-2-7b-hf"])
    pod = CLUSTERS["dgx-h100-superpod"]
    assert (scenario.cluster, scenario.hardware) == (pod, pod.node)
    alone = scenario.replace(hardware="dgx-h100", **{"parallel.tp": 8})
    assert alone.cluster is None
    assert alone.hash != scenario.replace(**{"parallel.tp": 8}).hash
    text = scenario_yaml(scenario, directory=tmp_path)
    assert "hardware: dgx-h100-superpod\n" in text
    narrower = pod.model_copy(update={"node_count": 4})
    changed = scenario.replace(hardware=narrower)
    assert changed.cluster == narrower
    (tmp_path / "own.yaml").write_text(scenario_yaml(changed, directory=tmp_path))
    assert load_scenario(tmp_path / "own.yaml") == changed  # written out in full
    with pytest.raises(InfeasibleError, match="dgx-h100-superpod has 1016 accelerators"):
        scenario.replace(**{"parallel.pp": 64})
    broken = pod.model_dump(mode="json", exclude_none=True)
    broken["network"]["radix"] = 2
    with pytest.raises(InputError, match=r"network\.radix: expected a number of at least 4"):
        scenario.replace(hardware=broken)
