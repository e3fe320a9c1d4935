"""Collectives inside a node: the fastest legal algorithm wins, as NCCL's tuner and vLLM's custom all-reduce choose.

With payload B per GPU, n GPUs, link bandwidth b per direction at efficiency e, launch time l and time per hop h:

    one-shot all-reduce   l + h + (n-1) B / (e b)          every GPU reads all of every peer
    two-shot all-reduce   l + 2h + 2 (n-1)/n B / (e b)     reduce-scatter, then all-gather, over direct peers
    ring all-reduce       l + 2(n-1) h + 2 (n-1)/n B / (e b)
    direct all-gather     l + h + (n-1) B / (e b)
    ring all-gather       l + (n-1) h + (n-1) B / (e b)

Algorithms and step counts: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH", IJHPCA 2005. One-shot, two-shot and direct need all peers in reach at full rate, so a switched link. Neglected:
in-switch reduction, protocol switches inside NCCL, contention.
"""

from __future__ import annotations

import numpy as np

from perfsim.cost.estimate import Estimate
from perfsim.ops.op import Collective, Num
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.hardware import Link


def collective_estimate(collective: Collective, link: Link, efficiency: DeviceEfficiency) -> Estimate:
    """Time of all `count` exchanges on an otherwise idle `link`; zero where they are not active."""
    times = [_ring(collective, link, efficiency)]
    if link.switched:
        times += _direct(collective, link, efficiency)
    fastest = times[0]
    for other in times[1:]:
        fastest = np.minimum(fastest, other)
    seconds = collective.count * collective.active * fastest
    moved = collective.count * collective.bytes
    return Estimate(seconds, bytes=moved, bound_s={"link": seconds}, d_seconds={"communication": seconds})


def _ring(collective: Collective, link: Link, efficiency: DeviceEfficiency) -> Num:
    n, wire = collective.group, collective.bytes / (efficiency.collective_bandwidth * link.bandwidth)
    hop = efficiency.collective_hop + link.latency
    if collective.kind == "all_reduce":
        return efficiency.collective_launch + 2 * (n - 1) * hop + wire * (2 * (n - 1) / n)
    return efficiency.collective_launch + (n - 1) * hop + wire * (n - 1)


def _direct(collective: Collective, link: Link, efficiency: DeviceEfficiency) -> list[Num]:
    n, wire = collective.group, collective.bytes / (efficiency.collective_bandwidth * link.bandwidth)
    hop = efficiency.collective_hop + link.latency
    one_shot = efficiency.collective_launch + hop + wire * (n - 1)
    if collective.kind == "all_gather":
        return [one_shot]
    return [one_shot, efficiency.collective_launch + 2 * hop + wire * (2 * (n - 1) / n)]
