"""The network of a cluster as an explicit graph of nodes and switches: for looking at, and to check closed forms by.

Vertices are ("node", i), ("switch", tier, ...) and, on a torus, ("gpu", x, y, ...). Edges carry `capacity` in bytes/s
per direction. Big machines make big graphs (Frontier: 12,000 vertices, 80,000 edges); the cost model never builds one.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

from perfsim.errors import InputError
from perfsim.spec.cluster import Cluster, Dragonfly, FatTree, Torus


def network_graph(cluster: Cluster) -> Any:
    """A networkx.Graph of the whole network, as if every unit were built out; only `node_count` nodes are attached."""
    import networkx as nx

    graph = nx.Graph()
    network = cluster.network
    if isinstance(network, Torus):
        _torus(graph, network, cluster.node.scale_up.bandwidth / (2 * len(network.shape)))
    elif isinstance(network, Dragonfly):
        _dragonfly(graph, network, cluster)
    else:
        _fat_tree(graph, network, cluster)
    return graph


def _torus(graph: Any, network: Torus, wire: float) -> None:
    for place in product(*(range(side) for side in network.shape)):
        for axis, side in enumerate(network.shape):
            neighbour = list(place)
            neighbour[axis] = (place[axis] + 1) % side
            if place[axis] + 1 < side or (network.wrap and side > 2):
                graph.add_edge(("gpu", *place), ("gpu", *neighbour), capacity=wire)


def _dragonfly(graph: Any, network: Dragonfly, cluster: Cluster) -> None:
    nics = cluster.node.nics
    if nics is None:
        raise InputError(f"{cluster.node.name} names no network cards (nics)")
    for node in range(cluster.node_count):
        group, place = divmod(node, network.nodes_per_router * network.routers_per_group)
        router = ("switch", "router", group, place // network.nodes_per_router)
        graph.add_edge(("node", node), router, capacity=nics.count * nics.bandwidth)
    routers = range(network.routers_per_group)
    for group in range(network.groups):
        for one, other in combinations(routers, 2):
            first, second = (("switch", "router", group, place) for place in (one, other))
            graph.add_edge(first, second, capacity=network.local_bandwidth)
    # Global links are dealt out to the routers of a group in turn.
    dealt = [0] * network.groups
    for here, there in combinations(range(network.groups), 2):
        ends = [("switch", "router", group, dealt[group] % network.routers_per_group) for group in (here, there)]
        graph.add_edge(*ends, capacity=network.global_bandwidth)
        dealt[here] += 1
        dealt[there] += 1


def _fat_tree(graph: Any, network: FatTree, cluster: Cluster) -> None:
    nics = cluster.node.nics
    if nics is None:
        raise InputError(f"{cluster.node.name} names no network cards (nics)")
    down, port = network.down_ports, nics.bandwidth
    leaves = set()
    for node in range(cluster.node_count):
        for card in range(nics.count):
            rail = card if network.rail_optimised else 0
            unit = node // (down if network.rail_optimised else down // nics.count)
            leaf = ("switch", "leaf", unit, rail)
            leaves.add(leaf)
            _add(graph, ("node", node), leaf, port)
    if network.levels == 1:
        return
    up = network.radix - down
    rails = nics.count if network.rail_optimised else 1
    pod_units = network.radix // 2 // rails if network.levels == 3 else len(leaves)
    for leaf in sorted(leaves):
        pod = leaf[2] // pod_units
        for spine in range(up):
            _add(graph, leaf, ("switch", "spine", pod, spine), port)
    if network.levels == 3:
        for pod, spine in sorted({(leaf[2] // pod_units, spine) for leaf in leaves for spine in range(up)}):
            for core in range(network.radix // 2):
                _add(graph, ("switch", "spine", pod, spine), ("switch", "core", spine, core), port)


def _add(graph: Any, one: Any, other: Any, capacity: float) -> None:
    """Adds a link, or makes an existing one wider."""
    before = graph.edges[one, other]["capacity"] if graph.has_edge(one, other) else 0.0
    graph.add_edge(one, other, capacity=before + capacity)
