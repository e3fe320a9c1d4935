"""Fitted operator curves: few physical coefficients per device, kind of operator and number format.

A curve replaces the flat fractions of `DeviceEfficiency` for the formats that were measured; the formulas are in
`perfsim.cost.curves`. Times are per kernel under CUDA graphs. Fractions are of the dense peak or of HBM bandwidth.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from perfsim.spec.base import Seconds, Spec

NETWORK = "network"  # among the curves of collectives: what leaves a node, whatever the algorithm
Fraction = Annotated[float, Field(gt=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


class GemmCurve(Spec):
    """y[m, n] = x[m, k] @ W[k, n]: see `perfsim.cost.products`.

    `launch` is the kernel's fixed time, `ramp` what the steps of its pipeline along k wait for each other, half of it
    at `ramp_depth`; it blends with the other times with the exponent `ramp_sharpness` (1: is added). `depth_padding`
    columns of x are computed beside the real ones. A tile has up to `tallest` rows, and takes the time of `edge` more
    rows and columns. SMs that have no tile in the last wave idle for the share `idle` of it, for half of that at
    `idle_depth`; whatever the size, the product waits for the share `tail` of a wave. `throttle` is what a lower clock
    adds to computing that goes on for long, half of it at `throttle_seconds`. `sharpness` is the exponent that blends
    memory and compute time. Where the kernel's input is quantised first, that costs `row_seconds` per row and a pass
    over it at `quantise_bandwidth`.
    """

    launch: Seconds
    ramp: Seconds = 0.0
    ramp_depth: float = Field(default=1.0, gt=0)
    ramp_sharpness: float = Field(default=1.0, ge=1, le=16)
    bandwidth: Fraction
    compute: Fraction
    depth_padding: Amount = 0.0
    edge: Amount = 0.0
    tallest: float = Field(default=128.0, ge=16, le=256)
    idle: float = Field(default=0.0, ge=0, le=1)
    idle_depth: float = Field(default=1e6, gt=0)
    tail: float = Field(default=0.0, ge=0, le=1)
    throttle: Amount = 0.0
    throttle_seconds: float = Field(default=1e-4, gt=0)
    sharpness: float = Field(default=8.0, ge=1, le=16)
    row_seconds: Seconds = 0.0
    quantise_bandwidth: Fraction | None = None


class DecodeCurve(Spec):
    """Decode attention: see `perfsim.cost.decode.DecodeTimes`.

    `tile` is the time that one SM needs for one sequence and K/V head without context, `sm_bandwidth` the bytes per
    second that it reads of one (None: that does not limit it), in at most `splits` parts on as many SMs (None: as many
    as help). `packed` query heads of a K/V head share a piece of work. `sharpness` blends the busiest SM with the time
    that HBM needs. `ramp` is what reading adds while too few bytes are in flight, half of it at `ramp_bytes` of all
    sequences together.
    `compute`: of the dense peak, for kernels that it can bind (latent attention); None is `decode_attention_compute`.
    `wide` is what one SM needs to expand one column of an entry of 8-bit K and V beyond the 128th of a head.
    """

    launch: Seconds
    bandwidth: Fraction
    tile: Seconds = 0.0
    sm_bandwidth: float | None = Field(default=None, gt=0)
    splits: float | None = Field(default=None, ge=1)
    packed: float = Field(default=128.0, ge=1)
    sharpness: float = Field(default=2.0, ge=1, le=16)
    ramp: Seconds = 0.0
    ramp_bytes: float = Field(default=1e6, gt=0)
    compute: Fraction | None = None
    wide: Seconds = 0.0


class PrefillCurve(Spec):
    """Prefill attention: see `perfsim.cost.curves.prefill_seconds`.

    `head_padding` is the softmax of one pair, as columns of a head; `critical_rows` query rows against the longest
    context run on one SM at the end; `tile` is what one SM spends on one query row of one head beside its pairs,
    `kv_tile` on one new token of one K/V head, writing it to the cache included. `diagonal` pairs per new token are
    computed and masked, of at most `packed` query heads per K/V head, and up to `cut` more where a window begins in the
    middle of a tile.
    """

    launch: Seconds
    compute: Fraction
    head_padding: Amount = 0.0
    bandwidth: Fraction
    critical_rows: Amount = 0.0
    tile: Seconds = 0.0
    kv_tile: Seconds = 0.0
    diagonal: Amount = 0.0
    packed: float = Field(default=1.0, ge=1)
    cut: Amount = 0.0


class MixedCurve(Spec):
    """Steps with prompt chunks on kernels that do not split a context: see `perfsim.cost.mixed`.

    A tile takes the time of `rows` query rows, however few it has. At the end SMs idle for the share `tail` of the
    longest decode's tile. `empty` is one SM's time for a tile without rows: every sequence gets as many as the longest
    chunk. Decodes alone wait for the share `last` of what the longest of them has beyond the mean.
    """

    rows: float = Field(gt=0)
    tail: Amount = 0.0
    empty: Seconds = 0.0
    last: Amount = 0.0


class ExpertCurve(Spec):
    """Fused experts: see `perfsim.cost.curves.expert_seconds`.

    `expert_padding` rows are computed beside the real ones for every expert that a token picked. Sorting rows by expert
    and adding results up moves `passes` more hidden states per routed row.
    """

    launch: Seconds
    bandwidth: Fraction
    compute: Fraction
    expert_padding: Amount = 0.0
    passes: Amount = 0.0
    sharpness: float = Field(default=8.0, ge=1, le=16)


class StreamCurve(Spec):
    """A kernel that streams rows of numbers: launch + columns x column + bytes / (bandwidth of HBM).

    `column` is what one SM needs for one column of the row that it works through.
    """

    launch: Seconds
    bandwidth: Fraction
    column: Seconds = 0.0


class LinkCurve(Spec):
    """A family of collective algorithms over the links inside a node: see `perfsim.cost.inside`.

    `hop` is one step from GPU to GPU, the latency of the link included; `bandwidth` a fraction of the link's. `own` is
    how long a GPU is busy with its own part, in the time of a part that crosses the link. `crossing` is how much
    longer a part takes where it has to leave a pair of GPUs on a host's PCIe, `peer` what each peer beyond the first
    adds to a barrier. `line` is what NCCL's LL128 waits longer than LL per doubling of the group, half of the square
    of it at parts of `line_bytes`, `handshake` what Simple waits longer than LL128.
    """

    launch: Seconds
    hop: Seconds
    bandwidth: Fraction
    own: float = Field(default=0.0, ge=0, le=2)
    crossing: Amount = 0.0
    peer: Seconds = 0.0
    line: Seconds = 0.0
    line_bytes: float = Field(default=4e3, gt=0)
    handshake: Seconds = 0.0
    handshake_bytes: float = Field(default=1e6, gt=0)


class ExchangeCurve(Spec):
    """Dispatch or combine of experts by kernels of their own (DeepEP): see `perfsim.cost.deepep`.

    `launch` is the kernel's fixed time, `hop` what every doubling of the nodes adds. `link_bandwidth` and
    `network_bandwidth` are shares of what links inside a node and network cards carry. Kernels that run on `sms` SMs
    copy `sm_bandwidth` bytes/s on each, and need `row_seconds` of one SM for every row (None: on as many as are free).
    `sharpness` is the exponent that blends the longest of these times with the others.
    """

    launch: Seconds
    hop: Seconds
    link_bandwidth: Fraction
    network_bandwidth: Fraction
    sms: float | None = Field(default=None, gt=0)
    sm_bandwidth: float | None = Field(default=None, gt=0)
    row_seconds: Seconds = 0.0
    sharpness: float = Field(default=6.0, ge=1, le=16)


class OperatorCurves(Spec):
    """Curves by number format; `decode` and `prefill` by that of K and V, with a prefix `mla-` for latent attention.

    `collective` is by family of algorithms (`perfsim.cost.collective.FAMILIES`), with `network` for what leaves a node,
    of which `hop`, `bandwidth` (a share of the cards'), `handshake` and `handshake_bytes` (per card) count.
    `stream` is by what an elementwise kernel does: `quantise` reads 16-bit numbers and writes them in 8 bits,
    `requantise` looks for their largest first; `quantise-slow` is a kernel that takes ten times as long as its bytes.

    `exchange` is by kernels and direction (`low_latency-dispatch`), the same for all devices.

    `source` names the kernels and the device that were timed; empty where there are no curves. `discrepancy` is the
    relative standard error of one prediction per kind, on shapes that were not fitted or, where a device borrows, on
    devices that were not.
    """

    source: str = ""

    gemm: dict[str, GemmCurve] = Field(default_factory=dict)
    decode: dict[str, DecodeCurve] = Field(default_factory=dict)
    prefill: dict[str, PrefillCurve] = Field(default_factory=dict)
    mixed: dict[str, MixedCurve] = Field(default_factory=dict)
    moe: dict[str, ExpertCurve] = Field(default_factory=dict)
    collective: dict[str, LinkCurve] = Field(default_factory=dict)
    exchange: dict[str, ExchangeCurve] = Field(default_factory=dict)
    stream: dict[str, StreamCurve] = Field(default_factory=dict)
    discrepancy: dict[str, float] = Field(default_factory=dict)
