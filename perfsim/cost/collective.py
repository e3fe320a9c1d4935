"""Collectives over the links that a group really crosses: the fastest legal algorithm wins, as NCCL's tuner chooses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from perfsim.cost.algorithms import ALGORITHMS
from perfsim.cost.deepep import exchange_seconds
from perfsim.cost.estimate import Estimate
from perfsim.cost.inside import FITTED, scaled, waiting
from perfsim.cost.topology import Fabric, Path
from perfsim.ops.op import Collective, CollectiveKind, Num
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import NETWORK, LinkCurve


def collective_estimate(collective: Collective, fabric: Fabric, efficiency: DeviceEfficiency) -> Estimate:
    """Time of all `count` exchanges on an otherwise idle `fabric`; zero where they are not active, and for one GPU.

    Works for arrays of bytes. Bound by "link" inside a node, by "network" beyond. Raises InfeasibleError when the
    machine has no such group.
    """
    if collective.group == 1:
        return Estimate(0.0 * collective.bytes)
    path = fabric.path(collective.group, stride=collective.stride)
    fastest = exchange_seconds(collective, path, efficiency.curves.exchange)
    if fastest is None:
        _, fastest = fastest_algorithm(collective, fabric, efficiency)
    seconds = collective.count * collective.active * fastest
    inside = all(level.scale_up for level in path)
    return Estimate(
        seconds,
        bytes=collective.count * collective.bytes,
        bound_s={"link" if inside else "network": seconds},
        d_seconds={collective.part or "communication": seconds},
    )


# Kernels that are measured apart: custom ones of the serving engines, and those of NCCL. What is not here was not.
FAMILIES: dict[CollectiveKind, dict[str, str]] = {
    "all_reduce": {
        "one_shot": "custom_all_reduce", "two_shot": "custom_all_reduce", "ring": "ring_all_reduce",
        "tree": "ring_all_reduce", "nvls": "nvls_all_reduce", "nvls_tree": "nvls_all_reduce",
    },
    "all_gather": {"ring": "all_gather"},
    "reduce_scatter": {"ring": "reduce_scatter"},
    "all_to_all": dict.fromkeys(("pairwise", "direct"), "all_to_all"),
}  # fmt: skip


SENDS: tuple[CollectiveKind, ...] = ("send_recv", "all_to_all")


def achieved(work: Collective, path: Path, efficiency: DeviceEfficiency, curve: LinkCurve | None = None) -> Path:
    """The path with rates and hops as achieved; network and in-switch reduction may have coefficients of their own.

    A hop costs the sender's step beside the latency of the link. Inside a node a fitted `curve` replaces both, and the
    rates. Between nodes the curve of the network, where there is one, gives the share of the cards' rate, the sender's
    step and what large messages wait for longer: those of more than `handshake_bytes` per card. Sends from one GPU to
    another are not known to wait so: nothing has to be added before it is passed on.
    """
    e = efficiency
    network = e.collective_bandwidth if e.network_bandwidth is None else e.network_bandwidth
    hop: Num = e.collective_hop if e.network_hop is None else e.network_hop
    switch = e.collective_bandwidth if e.in_switch_bandwidth is None else e.in_switch_bandwidth
    across = e.curves.collective.get(NETWORK)
    levels = []
    for level in path:
        if curve is not None and level.scale_up:
            levels.append(scaled(level, curve))
            continue
        rate, step = network, hop
        if level.scale_up:
            rate, step = e.collective_bandwidth, e.collective_hop
        elif across is not None:
            rate, step = across.bandwidth, across.hop
            if work.kind not in SENDS:
                step = step + waiting(across.handshake, work.bytes / level.below, across.handshake_bytes)
        levels.append(
            replace(level, spread=rate * level.spread, ring=rate * level.ring, peer=rate * level.peer,
                    in_switch=switch * level.in_switch, latency=step + level.latency)
        )  # fmt: skip
    return tuple(levels)


def algorithm_seconds(
    collective: Collective, fabric: Fabric, efficiency: DeviceEfficiency, *, allowed: Collection[str] | None = None
) -> dict[str, Num]:
    """Seconds of one exchange by every algorithm that is possible here (and `allowed`), by name."""
    path = fabric.path(collective.group, stride=collective.stride)
    curves = efficiency.curves.collective
    families, fitted = FAMILIES.get(collective.kind, {}), FITTED.get(collective.kind, {})
    inside = len(path) == 1 and path[0].scale_up
    # Inside a node only what was measured competes, if anything was: coefficients of the rest are guesses.
    measured = allowed is None and inside and not curves.keys().isdisjoint(families.values())
    times: dict[str, Num] = {}
    for name, algorithm in ALGORITHMS[collective.kind].items() if path else ():
        if allowed is not None and name not in allowed:
            continue
        curve = curves.get(families.get(name, ""))
        if inside and curve is not None and name in fitted:
            seconds = fitted[name](collective, path[0], curve)
        elif measured:
            continue
        else:
            launch = efficiency.collective_launch if curve is None else curve.launch
            seconds = algorithm(collective, achieved(collective, path, efficiency, curve), launch)
        if seconds is not None:
            times[name] = seconds
    return times


def fastest_algorithm(
    collective: Collective, fabric: Fabric, efficiency: DeviceEfficiency, *, allowed: Collection[str] | None = None
) -> tuple[NDArray[np.str_], Num]:
    """(name, seconds) of the fastest algorithm, elementwise over arrays of bytes; the first one of equals."""
    times = algorithm_seconds(collective, fabric, efficiency, allowed=allowed)
    names = np.array(list(times))
    seconds = np.stack(np.broadcast_arrays(*times.values()))
    return names[seconds.argmin(axis=0)], seconds.min(axis=0)
