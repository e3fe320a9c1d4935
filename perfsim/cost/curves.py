"""Seconds of one kernel on fitted curves (`perfsim.spec.curves`): smooth, monotone in work, above the speed of light.

Every factor on work is at least one and every term that is added at least zero, so that no coefficients that load can
beat max(FLOPs / peak, bytes / bandwidth). The forms were chosen on aiconfigurator's public operator tables; how far
each one misses is printed by `python -m validation.ops`.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.cost.piecewise import PiecewiseLinear
from perfsim.cost.products import blended
from perfsim.ops.op import Num, Op
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import DecodeCurve, ExpertCurve, GemmCurve, PrefillCurve
from perfsim.spec.hardware import Accelerator

WIDEST = 128.0  # columns of a head up to which every kernel keeps pace with memory
KNOTS = tuple(16.0 * 2**step for step in range(21))  # contexts of 16 to 16.8M tokens
RAMP_KNOTS = tuple(2.0**step for step in range(-3, 7))  # shares of ramp_bytes: 11% to 98% of the ramp

Curve = TypeVar("Curve", GemmCurve, DecodeCurve, PrefillCurve, ExpertCurve)


def gemm_curve(op: Op, efficiency: DeviceEfficiency) -> GemmCurve | None:
    """The curve for a matrix product; None where nothing fits it."""
    return pick(efficiency.curves.gemm, op) if op.kind in ("gemm", "lm_head") else None


def decode_curve(op: Op, efficiency: DeviceEfficiency) -> DecodeCurve | None:
    """The curve for decode attention; None where nothing fits it."""
    return pick(efficiency.curves.decode, op) if op.kind == "decode_attention" else None


def prefill_curve(op: Op, efficiency: DeviceEfficiency) -> PrefillCurve | None:
    """The curve for prefill attention; None where nothing fits it."""
    return pick(efficiency.curves.prefill, op) if op.kind == "prefill_attention" else None


def expert_curve(op: Op, efficiency: DeviceEfficiency) -> ExpertCurve | None:
    """The curve for fused experts; None where nothing fits them."""
    return pick(efficiency.curves.moe, op) if op.kind == "moe" else None


def pick(curves: dict[str, Curve], op: Op) -> Curve | None:
    """The curve of the op's format, else of the arithmetic it runs in, else of 16-bit numbers, of the same family.

    An op without a format (adapters, drafters, indexers) was not measured like the others and has no curve.
    """
    family, dash, own = op.format.rpartition("-")
    for name in (own, "bf16" if op.dtype == "fp16" else op.dtype, "bf16") if own else ():
        if family + dash + name in curves:
            return curves[family + dash + name]
    return None


def decode_seconds(op: Op, curve: DecodeCurve, efficiency: DeviceEfficiency, chip: Accelerator) -> PiecewiseLinear:
    """Seconds per sequence over its context: blend(tiles x tile / SMs, bytes / (e_b bandwidth)), linear between knots.

    The blend is convex in the context, so that chords lie above it and above the speed of light. Sequences of unequal
    context are priced at their mean: nothing is lost where time is linear. Neglected: few long sequences on kernels
    that do not split a context over SMs (FlashAttention-2 without grouped queries).
    """
    memory = chip.memory
    fixed = op.sequence_read_bytes / memory.read_bandwidth + op.sequence_write_bytes / memory.write_bandwidth
    per_entry = op.entry_bytes / memory.read_bandwidth
    compute = efficiency.decode_attention_compute if curve.compute is None else curve.compute
    rate = compute * peak_flops(chip, op.dtype)
    tile = curve.tile * op.tiles / chip.sm_count if chip.sm_count else 0.0
    per_pair = max(op.pair_flops / rate, wide_seconds(op, curve, chip))

    def at(context: float) -> float:
        moved = (fixed + per_entry * context) / curve.bandwidth
        return max(float(blended(moved, tile, curve.sharpness)), per_pair * context)

    x = [0.0, *KNOTS]
    return PiecewiseLinear(x, [at(context) for context in x], final_slope=max(per_entry / curve.bandwidth, per_pair))


def wide_seconds(op: Op, curve: DecodeCurve, chip: Accelerator) -> float:
    """Seconds per attended entry of one sequence that expanding columns of heads beyond 128 keeps all SMs busy."""
    if not (curve.wide and op.heads and chip.sm_count):
        return 0.0
    columns = max(0.0, op.pair_flops / (4.0 * op.heads) - WIDEST)
    return curve.wide * columns * float(op.tiles) / chip.sm_count


def decode_ramp(op: Op, curve: DecodeCurve) -> PiecewiseLinear | None:
    """Seconds over the entries that all sequences attend: ramp x / (x + ramp_bytes), x their bytes; linear by pieces.

    The curve is concave and its chords lie below it, from nothing upwards, so that no bound is crossed.
    """
    if not curve.ramp or not op.entry_bytes:
        return None
    x = [0.0, *(share * curve.ramp_bytes for share in RAMP_KNOTS)]
    y = [curve.ramp * moved / (moved + curve.ramp_bytes) for moved in x]
    return PiecewiseLinear([moved / op.entry_bytes for moved in x], y, final_slope=0.0)


def prefill_coefficients(op: Op, curve: PrefillCurve, chip: Accelerator) -> tuple[float, float, float, float]:
    """Seconds per (pair, root of twice the pairs, byte over bandwidth, new token) of one prefill attention kernel.

    A pair costs its products and its softmax, which counts as `head_padding` more columns of each head. Where the last
    query rows meet the longest context, one SM per head works alone: as long as `critical_rows` rows against sqrt(2
    pairs), the length of one prompt of so many pairs. Each new token computes `diagonal` pairs that causality masks, of
    all its query heads, or of `packed` of them per K/V head where these share a tile. Neglected: longer contexts than
    that where chunks have long pasts, apart from kernels that do not split them (`perfsim.cost.mixed`).
    """
    rate = curve.compute * peak_flops(chip, op.dtype)
    head = (op.pair_flops / op.heads + 4.0 * curve.head_padding) / rate
    units = chip.sm_count or 0
    tile = (op.heads * curve.tile + float(op.tiles) * curve.kv_tile) / units if units else 0.0
    tile += head * curve.diagonal * min(op.heads, curve.packed * float(op.tiles))
    return head * op.heads, head * units * curve.critical_rows, 1.0 / curve.bandwidth, tile


def prefill_seconds(op: Op, curve: PrefillCurve, chip: Accelerator) -> Num:
    """launch + pairs + critical path + bytes / (e_b bandwidth) + rows, one after the other."""
    per_pair, critical, per_moved, per_token = prefill_coefficients(op, curve, chip)
    memory = chip.memory
    pairs = op.flops / op.pair_flops
    moved = op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth
    return curve.launch + per_pair * pairs + critical * np.sqrt(2.0 * pairs) + per_moved * moved + per_token * op.rows


def expert_seconds(op: Op, curve: ExpertCurve, chip: Accelerator) -> Num:
    """launch + passes + blend(bytes / (e_b bandwidth), FLOPs of rows and padding rows / (e_c peak))."""
    memory = chip.memory
    moved = (op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / curve.bandwidth
    padding = op.tiles * curve.expert_padding * op.pair_flops
    computed = (op.flops + padding) / (curve.compute * peak_flops(chip, op.dtype))
    sorting = op.flops / op.pair_flops * (curve.passes * op.depth / memory.read_bandwidth)
    return curve.launch + sorting + blended(moved, computed, curve.sharpness)
