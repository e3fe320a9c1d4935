"""Tier 1: what no implementation can beat."""

from __future__ import annotations

from math import prod

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.cost.topology import Fabric, Level, Path
from perfsim.ops.exchange import out_of_node
from perfsim.ops.op import Collective, Num, Op
from perfsim.spec.hardware import Accelerator


def op_seconds(op: Op, accelerator: Accelerator) -> Num:
    """max(FLOPs / dense peak, bytes / HBM bandwidth) of all `count` kernels of `op`."""
    memory = accelerator.memory
    moved = op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth
    return op.count * np.maximum(op.flops / peak_flops(accelerator, op.dtype), moved)


def collective_seconds(collective: Collective, fabric: Fabric) -> Num:
    """What no algorithm can beat: at every level, the bytes that must leave one unit over all that can leave it.

    An all-reduce on the GPUs sends 2 (N-1)/N of the vector out of each of N units (Patarasuk, Yuan, "Bandwidth optimal
    all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009); switches that reduce need it once. A gather
    brings the parts of all other units in, a scatter takes them out, a broadcast brings the vector in. A GPU that also
    has a share of a network card may use both its ports.
    """
    path = fabric.path(collective.group, stride=collective.stride)
    longest: Num = 0.0 * collective.bytes
    for index, level in enumerate(path):
        units = prod(other.size for other in path[index:])
        # What an all-to-all sends goes to everywhere, and so through the middle of a torus.
        rate = level.below * level.spread if collective.kind == "all_to_all" else level.exit
        ports = rate + (path[1].spread if level.scale_up and len(path) > 1 else 0.0)
        longest = np.maximum(longest, _leaving(collective, path, level, units) / ports)
    return collective.count * longest


def _leaving(work: Collective, path: Path, level: Level, units: int) -> Num:
    """Bytes that must leave (or enter) one of `units` units of `level.below` GPUs each."""
    if work.kind == "all_reduce":
        return work.bytes * (1.0 if level.in_switch else 2 * (units - 1) / units)
    if work.kind in ("all_gather", "reduce_scatter"):
        part = work.bytes if work.kind == "all_gather" else work.bytes / work.group
        return part * ((units - 1) * level.below)
    if work.kind == "all_to_all":
        inside = path[0].size if path[0].scale_up else 1
        across = out_of_node(work, work.group / inside)
        if across is None:
            return work.bytes * ((work.group - level.below) / work.group * level.below)
        if level.scale_up:
            return work.bytes * ((level.size - 1) / work.group)
        return across * ((work.group - level.below) / (work.group - inside) * level.below)
    return work.bytes
