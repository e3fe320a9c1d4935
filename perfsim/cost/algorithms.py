"""Algorithms of collectives over the levels of a path: latency and bytes on the wire, one formula each.

Symbols: vector B per GPU, n GPUs, launch l, hops h_i and rates per level i (`cost.topology.Level`). The path holds what
is achieved: hops with the sender's own step, rates with their efficiency. Every function returns seconds, or None where
the algorithm is not possible. Step counts of ring, binomial and pairwise algorithms: Thakur, Rabenseifner, Gropp,
"Optimization of Collective Communication Operations in MPICH", IJHPCA 19(1), 2005. Pipelines overlap their stages, so
that the slowest one sets the rate. Inside a node, fitted kernels have formulas of their own (`cost.inside`), protocols
included. Neglected: protocol changes between nodes (NCCL's LL, LL128, Simple), channels, contention with other traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2

import numpy as np

from perfsim.cost.topology import Path
from perfsim.ops.op import Collective, CollectiveKind, Num

Algorithm = Callable[[Collective, Path, float], Num | None]


def ring_all_reduce(work: Collective, path: Path, launch: float) -> Num:
    """l + 2 sums of the hops around the ring + 2 (n-1)/n B / rate: reduce-scatter, then all-gather, chunk by chunk."""
    n = work.group
    return launch + 2 * _ring_hops(path) + work.bytes * (2 * (n - 1) / n) / _ring_rate(path)


def tree_all_reduce(work: Collective, path: Path, launch: float) -> Num | None:
    """l + 2 depth h + twice the vector over every link: two complementary binary trees of nodes, a chain inside each.

    Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", Parallel Computing
    35(12), 2009; NCCL has used them between nodes since 2.4. Between two nodes each link carries the vector once.
    """
    outside = tuple(level for level in path if not level.scale_up)
    if not outside:
        return None
    chain = [level for level in path if level.scale_up]
    hops = sum((level.size - 1) * level.latency for level in chain) + _depth(outside)
    wires = [2.0 * work.bytes / level.ring for level in chain] + _tree_wire(work.bytes, outside)
    return launch + 2 * hops + _slowest(wires)


def one_shot_all_reduce(work: Collective, path: Path, launch: float) -> Num | None:
    """l + h + (n-1) B / rate: every GPU reads the whole vector of every peer (vLLM's custom all-reduce)."""
    if not _one_direct(path):
        return None
    level = path[0]
    return launch + level.latency + work.bytes * (level.size - 1) / level.spread


def two_shot_all_reduce(work: Collective, path: Path, launch: float) -> Num | None:
    """l + 2h + 2 (n-1)/n B / rate: reduce-scatter, then all-gather, each in one step over direct peers."""
    if not _one_direct(path):
        return None
    level, n = path[0], work.group
    return launch + 2 * level.latency + work.bytes * (2 * (n - 1) / n) / level.spread


def nvls_all_reduce(work: Collective, path: Path, launch: float) -> Num | None:
    """l + 2h + (1 + 1/n) B / rate: switches add what they read from all GPUs and copy what one writes (NVLink SHARP).

    Each GPU sends its vector once for the sums and a share 1/n of the result once. NCCL's NVLS, since 2.17.
    """
    if len(path) != 1 or not path[0].in_switch:
        return None
    level = path[0]
    return launch + 2 * level.latency + work.bytes * (1 + 1 / level.size) / level.in_switch


def nvls_tree_all_reduce(work: Collective, path: Path, launch: float) -> Num | None:
    """In-switch reduction inside nodes and trees between them, pipelined: NCCL's NVLSTree, since 2.18."""
    if len(path) < 2 or not path[0].in_switch:
        return None
    inside, outside = path[0], path[1:]
    hops = 2 * inside.latency + 2 * _depth(outside)
    wires = [work.bytes * (1 + 1 / inside.size) / inside.in_switch, *_tree_wire(work.bytes, outside)]
    return launch + hops + _slowest(wires)


def hierarchical_all_reduce(work: Collective, path: Path, launch: float) -> Num | None:
    """Reduce-scatter inside the node, ring all-reduce of 1/n_0 of it between nodes on rails, all-gather inside.

    One after the other, each at its own rate. On one node there is no middle part, and this is two-shot or ring.
    """
    if not path[0].scale_up:
        return None
    inside, outside = path[0], path[1:]
    shared = work.bytes * (inside.size - 1) / inside.size / (inside.spread if inside.direct else inside.ring)
    steps = (1 if inside.direct else inside.size - 1) * inside.latency
    total = launch + 2 * (steps + shared)
    if outside:
        nodes = work.group // inside.size
        rate = min(level.ring for level in outside)
        total = total + 2 * _ring_hops(outside) + work.bytes * (2 * (nodes - 1) / nodes) / rate
    return total


def ring_all_gather(work: Collective, path: Path, launch: float) -> Num:
    """l + sum of hops around the ring + (n-1) parts / rate; a reduce-scatter is the same, backwards."""
    return launch + _ring_hops(path) + _part(work) * (work.group - 1) / _ring_rate(path)


def direct_all_gather(work: Collective, path: Path, launch: float) -> Num | None:
    """l + h + (n-1) parts / rate: every GPU reads the part of every peer at once."""
    if not _one_direct(path):
        return None
    level = path[0]
    return launch + level.latency + _part(work) * (level.size - 1) / level.spread


def hierarchical_all_gather(work: Collective, path: Path, launch: float) -> Num | None:
    """Ring all-gather of each rail between nodes, then of what a node collected inside it; backwards for a scatter."""
    if len(path) < 2 or not path[0].scale_up:
        return None
    inside, outside = path[0], path[1:]
    nodes = work.group // inside.size
    between = _ring_hops(outside) + _part(work) * (nodes - 1) * inside.size / min(level.ring for level in outside)
    steps = (1 if inside.direct else inside.size - 1) * inside.latency
    shared = _part(work) * nodes * (inside.size - 1) / (inside.spread if inside.direct else inside.ring)
    return launch + between + steps + shared


def pairwise_all_to_all(work: Collective, path: Path, launch: float) -> Num:
    """l + a hop per peer + the slowest level's share of the bytes: GPU i exchanges with i + k in step k."""
    return launch + _around(path) + _slowest(_scattered(work, path))


def direct_all_to_all(work: Collective, path: Path, launch: float) -> Num | None:
    """l + the longest hop + the slowest level's share of the bytes: all peers at once (NCCL's grouped send/recv)."""
    if not all(level.direct for level in path):
        return None
    longest = _slowest([level.latency for level in path])
    return launch + longest + _slowest(_scattered(work, path))


def forward(work: Collective, path: Path, launch: float) -> Num:
    """l + the longest hop + B / its rate: every pipeline stage sends to the next one; the slowest pair counts."""
    last = path[-1]
    return launch + last.latency + work.bytes / min(level.peer for level in path)


def chain_broadcast(work: Collective, path: Path, launch: float) -> Num:
    """l + sum of hops along the chain + B / rate, in many small chunks."""
    return launch + _around(path) + work.bytes / _ring_rate(path)


def binomial_broadcast(work: Collective, path: Path, launch: float) -> Num:
    """l + log2 n rounds, level by level from the outermost, each a hop and the whole vector between two GPUs."""
    rounds = [(ceil(log2(level.size)), level) for level in path]
    hops = sum(count * level.latency for count, level in rounds)
    return launch + hops + work.bytes * sum(count / level.peer for count, level in rounds)


def scatter_broadcast(work: Collective, path: Path, launch: float) -> Num | None:
    """l + 2h + 2 (n-1)/n B / rate: the root scatters, then all gather in one step (van de Geijn's, direct peers)."""
    return two_shot_all_reduce(work, path, launch)


ALGORITHMS: dict[CollectiveKind, dict[str, Algorithm]] = {
    "all_reduce": {
        "ring": ring_all_reduce, "tree": tree_all_reduce, "one_shot": one_shot_all_reduce,
        "two_shot": two_shot_all_reduce, "nvls": nvls_all_reduce, "nvls_tree": nvls_tree_all_reduce,
        "hierarchical": hierarchical_all_reduce,
    },
    "all_gather": {
        "ring": ring_all_gather, "direct": direct_all_gather, "hierarchical": hierarchical_all_gather,
    },
    "reduce_scatter": {
        "ring": ring_all_gather, "direct": direct_all_gather, "hierarchical": hierarchical_all_gather,
    },
    "all_to_all": {"pairwise": pairwise_all_to_all, "direct": direct_all_to_all},
    "send_recv": {"forward": forward},
    "broadcast": {"chain": chain_broadcast, "binomial": binomial_broadcast, "scatter": scatter_broadcast},
}  # fmt: skip


def _around(path: Path) -> Num:
    """Seconds of hops along a chain through all n GPUs: n-1 of them, most inside units, few across."""
    total: Num = 0.0
    units = 1
    for level in reversed(path):
        total += (level.size - 1) * units * level.latency
        units *= level.size
    return total


def _ring_hops(path: Path) -> Num:
    """Seconds of the n-1 slowest of the n hops of the closed ring: what the slowest chunk waits for in one turn."""
    shortest = path[0].latency
    for level in path[1:]:
        shortest = np.minimum(shortest, level.latency)
    return _around(path) + path[-1].latency - shortest


def _ring_rate(path: Path) -> float:
    """Bytes/s per GPU of rings through all GPUs: one edge per ring leaves a unit, so a unit's whole exit serves it."""
    return min(level.ring for level in path)


def _depth(path: Path) -> Num:
    return sum(ceil(log2(level.size)) * level.latency for level in path)


def _tree_wire(vector: Num, outside: Path) -> list[Num]:
    """Seconds at full rate per level between nodes: two trees carry half the vector each, up and down, to two children.

    A unit that has two children in one tree is a leaf in the other: vector in, vector out, both ways. Two units are
    parent and child once each way, so that half of that is left.
    """
    return [vector * (1.0 if level.size == 2 and len(outside) == 1 else 2.0) / level.exit for level in outside]


def _scattered(work: Collective, path: Path) -> list[Num]:
    """Seconds at full rate per level of what each GPU sends to GPUs outside its unit but inside the next larger one.

    Traffic that leaves a node uses the network cards on every tier it crosses, and the scale-up links only when it is
    forwarded inside the node (`across_bytes`: each token enters a node once and is copied there).
    """
    wires: list[Num] = []
    for level in path:
        reached = level.size if level.scale_up else work.group
        sent = work.bytes * ((reached - level.below) / work.group)
        if work.across_bytes is not None and not level.scale_up:
            leaving = work.group - (path[0].size if path[0].scale_up else 1)
            sent = work.across_bytes * ((work.group - level.below) / leaving)
        elif work.across_bytes is not None and len(path) > 1:
            sent = work.bytes * ((level.size - 1) / level.size)  # every copy for a peer passes the scale-up links
        wires.append(sent / level.spread)
    return wires


def _slowest(wires: list[Num]) -> Num:
    slowest = wires[0]
    for wire in wires[1:]:
        slowest = np.maximum(slowest, wire)
    return slowest


def _part(work: Collective) -> Num:
    """What one GPU contributes to a gather; of a reduce-scatter, what it keeps."""
    return work.bytes if work.kind == "all_gather" else work.bytes / work.group


def _one_direct(path: Path) -> bool:
    return len(path) == 1 and path[0].direct and path[0].scale_up
