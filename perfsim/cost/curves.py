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

ABREAST = 1.5  # exponent: the longest tiles of a prompt begin first, so that others hide a part of their time
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
    """Seconds per (pair, entry of the longest context, byte over bandwidth, new token) of one prefill attention kernel.

    A pair costs its products and its softmax, which counts as `head_padding` more columns of each head. Where the last
    query rows meet the longest context, one SM per head works alone: as long as `critical_rows` rows. Each new token
    computes `diagonal` pairs that causality masks, of all its query heads, or of `packed` of them per K/V head where
    these share a tile. Neglected: SMs that the last wave of tiles leaves idle.
    """
    rate = curve.compute * peak_flops(chip, op.dtype)
    head = (op.pair_flops / op.heads + 4.0 * curve.head_padding) / rate
    units = chip.sm_count or 0
    tile = (op.heads * curve.tile + float(op.tiles) * curve.kv_tile) / units if units else 0.0
    tile += head * curve.diagonal * min(op.heads, curve.packed * float(op.tiles))
    return head * op.heads, head * units * curve.critical_rows, 1.0 / curve.bandwidth, tile


def prefill_seconds(op: Op, curve: PrefillCurve, chip: Accelerator) -> Num:
    """launch + bytes / (e_b bandwidth) + blend(pairs and rows over all SMs, the longest context on one SM).

    Where a window limits contexts none is long, and each new token computes up to `cut` pairs more than its own.
    """
    per_pair, critical, per_moved, per_token = prefill_coefficients(op, curve, chip)
    memory = chip.memory
    pairs = op.flops / op.pair_flops
    moved = op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth
    work = per_pair * pairs + per_token * op.rows
    if op.unlimited:
        return curve.launch + per_moved * moved + blended(work, critical * op.longest, ABREAST)
    return curve.launch + per_moved * moved + work + per_pair * np.minimum(curve.cut * op.rows, pairs)


def expert_seconds(op: Op, curve: ExpertCurve, chip: Accelerator) -> Num:
    """launch + passes + blend(bytes / (e_b bandwidth), FLOPs of rows and padding rows / (e_c peak))."""
    memory = chip.memory
    moved = (op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / curve.bandwidth
    padding = op.tiles * curve.expert_padding * op.pair_flops
    computed = (op.flops + padding) / (curve.compute * peak_flops(chip, op.dtype))
    sorting = op.flops / op.pair_flops * (curve.passes * op.depth / memory.read_bandwidth)
    return curve.launch + sorting + blended(moved, computed, curve.sharpness)
