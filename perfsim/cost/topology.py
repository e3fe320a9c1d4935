"""Which links a group of GPUs crosses: a small frozen `Fabric` per machine, and the levels of one group on it.

A group is laid out as engines do it: ranks fill a node before the next one, nodes fill a leaf before the next one.
`Fabric.path` cuts the group into levels (inside a node, inside a leaf, across leaves, ...); each says at which rates
the GPUs of one unit can send out of it. What the closed forms here say about switches, hops and bisection is held
against the explicit graph (`cost/graph.py`) by tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from perfsim.errors import InfeasibleError
from perfsim.ops.op import Num
from perfsim.spec.cluster import Cluster, Dragonfly, FatTree, Torus, nodes_per_tier
from perfsim.spec.hardware import Link, Node


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier of the network above the nodes: a unit of it joins `nodes` nodes.

    `bandwidth` is bytes/s per GPU and direction when all GPUs of the unit below send out of it; `latency` is from card
    to card through this tier; `switches` are passed on the way.
    """

    name: str
    nodes: int
    bandwidth: float
    latency: float
    switches: int


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a group's path: `size` units, each with `below` GPUs of the group, talk to one another.

    Rates are bytes/s per direction. `spread`: what each GPU can send out of its unit when all send to all other units
    at once. `ring`: what leaves a unit when every unit sends to the next one only, over all rings together. `peer`:
    what one GPU can send to one other. `direct`: every GPU reaches every other one in a single step at these rates.
    `in_switch`: the rate of `spread` for messages that switches add and copy, 0 where they cannot. `scale_up` tells the
    links inside a node from the network. `latency` is an array where it follows the bytes of an exchange.
    """

    kind: str
    size: int
    below: int
    spread: float
    ring: float
    peer: float
    latency: Num
    direct: bool
    scale_up: bool
    in_switch: float = 0.0

    @property
    def exit(self) -> float:
        """Bytes/s that can leave one unit; on a torus that is more than traffic to everywhere can use."""
        return max(self.below * self.spread, self.ring)


Path = tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class Fabric:
    """The links of one machine as collectives see them: nodes of `domain` GPUs on `scale_up`, joined by `tiers`.

    `torus` is the shape of a machine without switches; `wrap` says whether its axes are closed.
    """

    scale_up: Link
    domain: int
    gpus: int
    tiers: tuple[Tier, ...] = ()
    torus: tuple[int, ...] = ()
    wrap: bool = False

    def path(self, group: int, *, stride: int = 1) -> Path:
        """The levels that `group` GPUs with ranks `stride` apart cross, innermost first; empty for one GPU.

        Groups that do not divide evenly are laid out with equal shares on more nodes, as schedulers place them.
        Raises InfeasibleError when the machine has too few GPUs, or no network and the group needs more than one node.
        """
        if (group - 1) * stride >= self.gpus:
            raise InfeasibleError(
                f"{group} GPUs with ranks {stride} apart do not fit a machine of {self.gpus}", binding="accelerators"
            )
        if group == 1:
            return ()
        if self.torus:
            return (_torus_level(self, group),)
        inside = _largest_share(group, most=group if group * stride <= self.domain else self.domain // stride)
        path = [_node_level(self.scale_up, inside, self.domain)] if inside > 1 else []
        nodes, done = group // inside, 1
        if nodes > 1 and not self.tiers:
            raise InfeasibleError(
                f"{group} GPUs need more than one node of {self.domain}, and no network joins nodes", binding="network"
            )
        step = max(1, -(-stride // self.domain))  # from one node of the group to the next
        for tier in self.tiers:
            last = tier is self.tiers[-1]
            units = _largest_share(nodes // done, most=nodes // done if last else tier.nodes // step // done)
            if units > 1:
                path.append(_tier_level(tier, units, inside * done))
                done *= units
        return tuple(path)


def fabric(node: Node, cluster: Cluster | None = None) -> Fabric:
    """The links of one node, or of a cluster of them."""
    count, link = node.accelerator_count, node.scale_up
    if cluster is not None and isinstance(cluster.network, Torus):
        return Fabric(link, count, cluster.accelerator_count, (), cluster.network.shape, cluster.network.wrap)
    if cluster is not None:
        return Fabric(link, count, cluster.accelerator_count, network_tiers(cluster))
    return Fabric(link, count, count, (), _grid(count, link.dimensions) if link.topology == "torus" else ())


def network_tiers(cluster: Cluster) -> tuple[Tier, ...]:
    """The tiers of a switched network that this cluster needs, lowest first; none for a torus."""
    network, node = cluster.network, cluster.node
    if isinstance(network, Torus) or node.nics is None:
        return ()
    nodes = nodes_per_tier(network, cards=node.nics.count)
    # A card is reached over the host link: an 800 Gbit/s card behind PCIe 4.0 is no faster than its slot.
    share = min(node.nics.count * node.nics.bandwidth / node.accelerator_count, node.host_link.bandwidth)
    if isinstance(network, FatTree):
        names, switches = ("leaf", "spine", "core"), (1, 3, 5)
        above = share * _uplinks(network, node.nics.count)
        rates = (share, above, above)
    else:
        names, switches = ("router", "group", "dragonfly"), (1, 2, 4)
        rates = (share, *_dragonfly_rates(network, node, share))
    tiers: list[Tier] = []
    for name, joined, rate, passed in zip(names, nodes, rates, switches, strict=False):
        latency = node.nics.latency + (passed - 1) * network.hop_latency
        tiers.append(Tier(name, min(joined, cluster.node_count), rate, latency, passed))
        if joined >= cluster.node_count:
            break
    return tuple(tiers)


def bisection(cluster: Cluster) -> float:
    """Bytes/s per direction between two halves of a cluster, cut where its network is thinnest.

    Of tiers, the highest one is cut and counted as if its units were full; of a torus, the longest axis.
    """
    network = cluster.network
    if isinstance(network, Torus):
        longest = max(network.shape)
        lines = cluster.accelerator_count // longest * (2 if network.wrap and longest > 2 else 1)
        return lines * cluster.node.scale_up.bandwidth / (2 * len(network.shape))
    top = network_tiers(cluster)[-1]
    half = cluster.node_count // 2 * cluster.node.accelerator_count * top.bandwidth
    # Of what a group of a dragonfly sends out, half stays in its own half of the machine.
    if isinstance(network, Dragonfly) and top.name == "dragonfly":
        return half * 0.5 * network.groups / (network.groups - 1)
    return half


def _uplinks(network: FatTree, cards: int) -> float:
    """Ports up per port down in use; whole ports, so not quite 1 / oversubscription."""
    down = network.down_ports
    used = down if network.rail_optimised else down // cards * cards
    return min(1.0, (network.radix - down) / used)


def _dragonfly_rates(network: Dragonfly, node: Node, share: float) -> tuple[float, float]:
    gpus = network.nodes_per_router * node.accelerator_count
    local = (network.routers_per_group - 1) * network.local_bandwidth / gpus
    out = (network.groups - 1) * network.global_bandwidth / (gpus * network.routers_per_group)
    inside = min(share, local) if network.routers_per_group > 1 else share
    return inside, min(inside, out) if network.groups > 1 else inside


def _largest_share(group: int, *, most: int) -> int:
    """The largest number of members per unit, at most `most` and at least 1, that divides `group` evenly."""
    return next(share for share in range(max(1, min(group, most)), 0, -1) if group % share == 0)


def _node_level(link: Link, size: int, domain: int) -> Level:
    if link.topology == "mesh":
        peer = link.bandwidth / (domain - 1)
        # A complete graph of n vertices splits into (n-1)//2 Hamiltonian cycles (Walecki; Lucas 1892), each usable both
        # ways round.
        rings = max(1, 2 * ((size - 1) // 2))
        return Level(link.kind, size, 1, (size - 1) * peer, rings * peer, peer, link.latency,
                     direct=True, scale_up=True)  # fmt: skip
    in_switch = link.bandwidth if link.in_switch_reduction else 0.0
    return Level(link.kind, size, 1, link.bandwidth, link.bandwidth, link.bandwidth, link.latency,
                 direct=link.topology == "switched", scale_up=True, in_switch=in_switch)  # fmt: skip


def _tier_level(tier: Tier, units: int, below: int) -> Level:
    return Level(tier.name, units, below, tier.bandwidth, below * tier.bandwidth, tier.bandwidth, tier.latency,
                 direct=True, scale_up=False)  # fmt: skip


def _torus_level(network: Fabric, group: int) -> Level:
    """A block as near to a cube as the shape allows; opposite ends are joined where the block spans a closed axis."""
    link = network.scale_up
    wire = link.bandwidth / (2 * len(network.torus))
    block = _block(group, network.torus)
    closed = [network.wrap and side == full for side, full in zip(block, network.torus, strict=True)]
    axes = [(side, loop) for side, loop in zip(block, closed, strict=True) if side > 1]
    # An axis that is not closed carries a ring there and back, so one direction's worth of it.
    ring = sum(2.0 if loop and side > 2 else 1.0 for side, loop in axes) * wire
    # Uniform traffic: half of it crosses the middle of each axis, over one wire per line, two where the axis is closed.
    spread = min(ring, *((8.0 if loop and side > 2 else 4.0) * wire / side for side, loop in axes))
    return Level(link.kind, group, 1, spread, ring, wire, link.latency, direct=False, scale_up=True)


def _block(group: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a block of `group` places with the smallest longest side, axis by axis; a line if nothing fits."""
    best: tuple[int, ...] | None = None
    for sides in _factors(group, shape):
        if best is None or (max(sides), sides) < (max(best), best):
            best = sides
    if best is None:
        raise InfeasibleError(
            f"{group} accelerators are no block of a torus of {'x'.join(map(str, shape))}", binding="network"
        )
    return best


def _factors(group: int, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    if len(shape) == 1:
        return [(group,)] if group <= shape[0] else []
    sides = [side for side in range(1, min(group, shape[0]) + 1) if group % side == 0]
    return [(side, *rest) for side in sides for rest in _factors(group // side, shape[1:])]


def _grid(count: int, dimensions: int) -> tuple[int, ...]:
    """The shape of the accelerators of one node without its pod: as near to a cube as `count` allows."""
    options = _factors(count, (count,) * dimensions)
    return min(options, key=lambda sides: (max(sides), prod(sides), sides))
