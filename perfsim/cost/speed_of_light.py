"""Tier 1: what no implementation can beat."""

from __future__ import annotations

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.ops.op import Collective, Num, Op
from perfsim.spec.hardware import Accelerator, Link


def op_seconds(op: Op, accelerator: Accelerator) -> Num:
    """max(FLOPs / dense peak, bytes / HBM bandwidth) of all `count` kernels of `op`."""
    memory = accelerator.memory
    moved = op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth
    return op.count * np.maximum(op.flops / peak_flops(accelerator, op.dtype), moved)


def collective_seconds(collective: Collective, link: Link) -> Num:
    """Bytes that must leave each GPU over its link: 2(n-1)/n of the payload for an all-reduce, n-1 parts for a gather.

    This bound holds for algorithms that reduce on the GPUs; in-switch reduction (NVLS) halves the all-reduce traffic.
    """
    n = collective.group
    share = 2 * (n - 1) / n if collective.kind == "all_reduce" else float(n - 1)
    return collective.count * collective.bytes * (share / link.bandwidth)
