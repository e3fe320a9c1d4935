"""Dispatch and combine of experts by DeepEP's kernels, which copy rows to the GPUs of their experts.

Two kinds: low-latency kernels send a copy per picked expert, straight to its GPU; normal (high-throughput) ones send a
token once to every node and there once to every GPU that needs it, on a few SMs of their own.
"""

from __future__ import annotations

from math import log2
from typing import NamedTuple

import numpy as np

from perfsim.cost.topology import Path
from perfsim.ops.exchange import out_of_node
from perfsim.ops.op import Collective, Num
from perfsim.spec.curves import ExchangeCurve

SCALE = 1e-6  # seconds: keeps powers of the blend within a float's range


class Bounds(NamedTuple):
    """What bounds one exchange: seconds at full rate of `links` and `cards`, bytes and rows that the SMs copy.

    `doublings` is log2 of the number of nodes.
    """

    doublings: Num
    links: Num
    cards: Num
    copied: Num
    rows: Num


def bounds(work: Collective, path: Path) -> Bounds:
    """What bounds an exchange over the links of `path`, innermost first; for arrays of tokens alike.

    SMs read every token once and write every copy. Between nodes, low-latency kernels send every copy by itself, normal
    ones each token once to every node with one of its experts (`across_bytes` says otherwise how much that is).
    Raises ValueError for a collective without `routed`.
    """
    routed = work.routed
    if routed is None:
        raise ValueError(f"{work.name} does not say which tokens it moves")
    inside = path[0].size if path[0].scale_up else 1
    nodes = work.group / inside
    links = work.bytes * ((work.group - 1.0) / work.group) / path[0].spread if path[0].scale_up else 0.0 * work.bytes
    across = out_of_node(work, nodes)
    if across is None:
        across = work.bytes * ((nodes - 1.0) / nodes)
    cards: Num = 0.0 * work.bytes
    for level in path:
        if not level.scale_up:
            share = (work.group - level.below) / (work.group - inside)
            cards = np.maximum(cards, across * (share / level.spread))
    copied = work.bytes + routed.tokens * routed.row_bytes
    return Bounds(log2(nodes), links, cards, copied, copied / routed.row_bytes)


def seconds_of(curve: ExchangeCurve, found: Bounds, *, sms: Num | None = None) -> Num:
    """launch + hop log2(nodes) + the longest, rounded off, of links, cards and the SMs' copying; in seconds.

    (sum of t^s)^(1/s) with the sharpness s, over t = links / share, cards / share and (bytes / rate + rows x seconds) /
    SMs, on `sms` SMs (None: those of the curve; without any, whatever is free and copying binds nothing). Fitted to
    DeepEP's own benchmark as SGLang runs it (`perfsim.calibrate.deepep`). Nothing is faster than links and cards, whose
    shares are at most one. Neglected: uneven routing, the notification before a normal dispatch, overlap with compute
    (the low-latency kernels can leave the SMs while data are under way), what the normal kernels' SMs are missed for
    elsewhere.
    """
    given = curve.sms if sms is None else sms
    parts = [found.links / curve.link_bandwidth, found.cards / curve.network_bandwidth]
    if given is not None and curve.sm_bandwidth is not None:
        parts.append((found.copied / curve.sm_bandwidth + found.rows * curve.row_seconds) / given)
    total: Num = 0.0
    for part in parts:
        total = total + (part / SCALE) ** curve.sharpness
    return curve.launch + curve.hop * found.doublings + total ** (1.0 / curve.sharpness) * SCALE


def exchange_seconds(work: Collective, path: Path, curves: dict[str, ExchangeCurve]) -> Num | None:
    """Seconds of one dispatch or combine; None where no kernel made for experts moves it, or none was fitted."""
    curve = None if work.routed is None else curves.get(f"{work.routed.kernels}-{work.routed.direction}")
    return None if curve is None else seconds_of(curve, bounds(work, path))
