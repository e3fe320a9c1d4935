"""What a cluster is: equal nodes, the network that joins their cards, and the store behind them. Facts only."""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Bandwidth, Seconds, Spec
from perfsim.spec.hardware import Fact, MemoryTier, Node

Count = Annotated[int, Field(gt=0, le=1_000_000)]


class FatTree(Spec):
    """`levels` tiers of equal switches with `radix` ports at the speed of the network cards.

    A leaf has `oversubscription` times as many ports down as up; tiers above are not oversubscribed. With
    `rail_optimised`, card r of every node of a unit is on leaf r of that unit (NVIDIA's DGX SuperPOD reference
    architecture; Wang et al., "Rail-only", arXiv:2307.12169); without, all cards of a node are on one leaf.
    `hop_latency` is that of one more switch. Structure: Leiserson, IEEE Trans. Computers C-34(10), 1985; Al-Fares et
    al., SIGCOMM 2008.
    """

    kind: Literal["fat_tree"] = "fat_tree"
    rail_optimised: bool
    radix: int = Field(ge=4, le=1024, multiple_of=2)
    levels: Literal[1, 2, 3]
    oversubscription: float = Field(default=1.0, ge=1, le=64)
    hop_latency: Seconds

    @property
    def down_ports(self) -> int:
        """Ports of a leaf towards nodes."""
        if self.levels == 1:
            return self.radix
        return max(1, min(self.radix - 1, int(self.radix * self.oversubscription / (1.0 + self.oversubscription))))


class Dragonfly(Spec):
    """`groups` groups of `routers_per_group` routers with `nodes_per_router` nodes each (Kim et al., ISCA 2008).

    Every two routers of a group are joined by `local_bandwidth`, every two groups by `global_bandwidth`, both bytes/s
    per direction. Routing is assumed to spread traffic over all groups, so that a group's links out are one pool.
    """

    kind: Literal["dragonfly"] = "dragonfly"
    nodes_per_router: Count
    routers_per_group: Count
    groups: Count
    local_bandwidth: Bandwidth
    global_bandwidth: Bandwidth
    hop_latency: Seconds


class Torus(Spec):
    """Accelerators on a grid of `shape`, each joined to its two neighbours along every axis by its scale-up links.

    With `wrap` the ends of every full axis are joined too. There are no switches and no network cards.
    """

    kind: Literal["torus"] = "torus"
    shape: tuple[Count, ...] = Field(min_length=1, max_length=6)
    wrap: bool = True


Network = Annotated[FatTree | Dragonfly | Torus, Field(discriminator="kind")]


class Cluster(Spec):
    """`node_count` equal nodes on one network; `remote` is the store that all of them share (bandwidth: of all)."""

    name: str
    label: str
    node: Node
    node_count: Count
    network: Network
    remote: MemoryTier | None = None
    sources: dict[str, Fact] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        network, node = self.network, self.node
        if isinstance(network, Torus):
            if prod(network.shape) != self.accelerator_count:
                raise ValueError(
                    f"network.shape holds {prod(network.shape)} accelerators, not {self.accelerator_count}"
                )
            if node.scale_up.topology != "torus" or node.scale_up.dimensions != len(network.shape):
                raise ValueError(f"a torus of {len(network.shape)} axes needs a node with such a scale_up topology")
            return self
        if node.nics is None:
            raise ValueError(f"node: {node.name} names no network cards (nics)")
        room = nodes_per_tier(network, cards=node.nics.count)[-1]
        if self.node_count > room:
            raise ValueError(f"node_count: {self.node_count} nodes do not fit a network that holds {room}")
        return self

    @property
    def accelerator_count(self) -> int:
        return self.node_count * self.node.accelerator_count


def nodes_per_tier(network: FatTree | Dragonfly, *, cards: int) -> tuple[int, ...]:
    """How many nodes one unit of each tier joins, lowest tier first: one leaf (or unit of rails), one pod, everything.

    A node with `cards` network cards takes as many leaf ports, on one leaf, or one on each of `cards` rails. Raises
    ValueError when a node has more cards than a leaf or the tier above it has ports.
    """
    if isinstance(network, Dragonfly):
        router = network.nodes_per_router
        group = router * network.routers_per_group
        return router, group, group * network.groups
    down = network.down_ports
    leaves = cards if network.rail_optimised else 1  # leaves of one unit
    unit = down if network.rail_optimised else down // cards
    # A spine of the last level spends every port on a leaf; one below a core keeps half of them for the core.
    below = {1: (), 2: (network.radix // leaves,), 3: (network.radix // 2 // leaves, network.radix)}[network.levels]
    if unit == 0 or 0 in below:
        raise ValueError(f"{cards} network cards per node are too many for switches of {network.radix} ports")
    tiers = [unit]
    for factor in below:
        tiers.append(tiers[-1] * factor)
    return tuple(tiers)
