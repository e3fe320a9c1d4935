"""What fitted kernels of collectives take inside a node: `LinkCurve` applied to one level of links.

Symbols: n GPUs, part p = what one GPU holds of the result (B / n, of a gather what it contributes), launch l, hop h,
rate r = `bandwidth` x the link's, own part o. Rings pass n-1 parts on and touch their own part once more, in the copy
from the input to the result; the tables tell it apart by how the rate at large sizes falls with fewer GPUs.

NCCL changes its protocol with the size: LL (a flag in every 8 bytes, half of the bandwidth), LL128 (a flag in every 128
bytes), Simple (a handshake per chunk, all of the bandwidth). Each one waits longer and loses fewer bytes than the one
before, so that what a protocol adds is a wait w that small parts do not reach: w p / sqrt(p^2 + b^2) per doubling of
the group, smooth and below both. b is `line_bytes` or `handshake_bytes`.

Neglected: the sizes at which NCCL's tuner and the engines change kernels (they are too late on PCIe by up to a factor
of two), what a host with two sockets does to single pairs, contention with other traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log2

import numpy as np

from perfsim.cost.topology import Level
from perfsim.ops.op import Collective, CollectiveKind, Num
from perfsim.spec.curves import LinkCurve

Fitted = Callable[[Collective, Level, LinkCurve], Num | None]


def scaled(level: Level, curve: LinkCurve) -> Level:
    """A level inside a node as a family of kernels achieves it: hops of the curve, its share of every rate.

    Where GPUs share a host's PCIe, those beyond a pair have to cross it: 1 / (1 + crossing (n-2)/(n-1)) of the rate.
    """
    rate = curve.bandwidth
    if not level.direct and level.size > 2:
        rate /= 1.0 + curve.crossing * (level.size - 2) / (level.size - 1)
    return replace(
        level, spread=rate * level.spread, ring=rate * level.ring, peer=rate * level.peer,
        in_switch=curve.bandwidth * level.in_switch, latency=curve.hop,
    )  # fmt: skip


def waiting(seconds: float, part: Num, half: float) -> Num:
    """w p / sqrt(p^2 + b^2): grows with small parts p, and is w for large ones."""
    return seconds * part / np.sqrt(part * part + half * half)


def protocols(curve: LinkCurve, part: Num, doublings: float) -> Num:
    """Seconds that LL128 and Simple wait longer than the protocol before them."""
    longer = waiting(curve.line, part, curve.line_bytes) + waiting(curve.handshake, part, curve.handshake_bytes)
    return doublings * longer


def ring_all_reduce(work: Collective, level: Level, curve: LinkCurve) -> Num:
    """l + 2 (n-1) h + (2 (n-1) + o) p / r + protocols: reduce-scatter, then all-gather."""
    part, steps = work.bytes / level.size, 2 * (level.size - 1)
    wire = part * ((steps + curve.own) / scaled(level, curve).ring)
    return curve.launch + steps * curve.hop + wire + protocols(curve, part, 2 * log2(level.size))


def ring_gather(work: Collective, level: Level, curve: LinkCurve) -> Num:
    """l + (n-1) h + (n-1 + o) p / r + protocols; a reduce-scatter is the same, backwards."""
    part = work.bytes if work.kind == "all_gather" else work.bytes / level.size
    steps = level.size - 1
    wire = part * ((steps + curve.own) / scaled(level, curve).ring)
    return curve.launch + steps * curve.hop + wire + protocols(curve, part, log2(level.size))


def all_to_all(work: Collective, level: Level, curve: LinkCurve) -> Num:
    """l + log2(n) h + (n-1 + o) p / r + protocols, once: NCCL's grouped sends, to all peers side by side."""
    part = work.bytes / level.size
    wire = part * ((level.size - 1 + curve.own) / scaled(level, curve).spread)
    return curve.launch + log2(level.size) * curve.hop + wire + protocols(curve, part, 1.0)


def one_shot_all_reduce(work: Collective, level: Level, curve: LinkCurve) -> Num | None:
    """l + h + (n-2) x peer + (n-1 + o) B / r + the wait for flags: every GPU reads all vectors, its own one too."""
    if not _side_by_side(level):
        return None
    wire = work.bytes * ((level.size - 1 + curve.own) / scaled(level, curve).spread)
    return _barrier(curve, work.bytes, level, 1) + wire


def two_shot_all_reduce(work: Collective, level: Level, curve: LinkCurve) -> Num | None:
    """l + 2 h + (n-2) x peer + 2 (n-1 + o) p / r + the wait for flags: reduce-scatter, then all-gather."""
    if not _side_by_side(level):
        return None
    wire = work.bytes * (2 * (level.size - 1 + curve.own) / level.size / scaled(level, curve).spread)
    return _barrier(curve, work.bytes, level, 2) + wire


def nvls_all_reduce(work: Collective, level: Level, curve: LinkCurve) -> Num | None:
    """l + 2 h + (1 + 1/n) B / r: switches add what they read from all GPUs and copy what one writes (NVLink SHARP)."""
    if not level.in_switch:
        return None
    return curve.launch + 2 * curve.hop + work.bytes * ((1 + 1 / level.size) / scaled(level, curve).in_switch)


FITTED: dict[CollectiveKind, dict[str, Fitted]] = {
    "all_reduce": {
        "ring": ring_all_reduce, "one_shot": one_shot_all_reduce, "two_shot": two_shot_all_reduce,
        "nvls": nvls_all_reduce,
    },
    "all_gather": {"ring": ring_gather},
    "reduce_scatter": {"ring": ring_gather},
    "all_to_all": {"direct": all_to_all},
}  # fmt: skip


def _barrier(curve: LinkCurve, vector: Num, level: Level, steps: int) -> Num:
    """Seconds without bytes of the engines' own kernels, which write flags to every peer."""
    waits = waiting(curve.line, vector, curve.line_bytes)
    return curve.launch + steps * curve.hop + (level.size - 2) * curve.peer + waits


def _side_by_side(level: Level) -> bool:
    """Whether all GPUs can read one another at once; a pair can, over a host's PCIe too."""
    return level.direct or level.size == 2
