"""Tier 2: roofline x efficiency. Smooth in the batch, monotone in work, and never above the speed of light.

Where curves were fitted to measured kernels (`perfsim.cost.curves`), they decide. Every other operator takes
launch + max(FLOPs / (e_c peak), bytes / (e_b bandwidth)) with e_c, e_b <= 1 per device and kind. The maximum, not the
sum or a p-norm, is the form that predicts GEMMs above 2,048 rows from those below 512 within 5-11% on H100, B200 and
L40S (31% on A100); sums miss by 26-35% (measured on aiconfigurator's public GEMM tables).

Decode attention reads a piecewise-linear curve instead: per sequence, the time at each context knot is
max(bytes / (e_b(knot) bandwidth), FLOPs / (e_c peak)), linear between knots. Both terms are linear in the context, so
the interpolation stays above the speed of light between knots too.
"""

from __future__ import annotations

import numpy as np

from perfsim.cost.curves import (
    decode_curve,
    decode_ramp,
    expert_curve,
    expert_seconds,
    gemm_curve,
    prefill_curve,
    prefill_seconds,
)
from perfsim.cost.decode import DecodeTimes
from perfsim.cost.device import peak_flops
from perfsim.cost.estimate import Estimate
from perfsim.cost.mixed import mixed_kernel, prompts_seconds
from perfsim.cost.piecewise import PiecewiseLinear
from perfsim.cost.products import gemm_seconds
from perfsim.ops.op import Num, Op
from perfsim.spec.calibration import DeviceEfficiency, PowerModel
from perfsim.spec.hardware import Accelerator

COMPONENT = {
    "gemm": "linear", "lm_head": "lm_head", "moe": "experts", "prefill_attention": "prefill_attention",
    "decode_attention": "decode_attention", "recurrence": "recurrence",
    "elementwise": "elementwise", "sampling": "sampling",
}  # fmt: skip


def op_estimate(op: Op, accelerator: Accelerator, efficiency: DeviceEfficiency, power: PowerModel) -> Estimate:
    """Time, work and dynamic energy of all `count` kernels of `op` on one GPU; zero where it is not active."""
    launch, compute, bandwidth = coefficients(op, efficiency)
    memory = accelerator.memory
    fitted = fitted_seconds(op, accelerator, efficiency)
    compute_s = op.flops / (compute * peak_flops(accelerator, op.dtype))
    memory_s = (op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / bandwidth
    if fitted is not None:
        launch, busy = 0.0, fitted
    elif op.kind == "decode_attention":
        busy = op.sequences * decode_attention_curve(op, accelerator, efficiency)(op.context)
    else:
        busy = np.maximum(compute_s, memory_s)
    seconds = op.count * op.active * (launch + busy)
    compute_bound = np.greater(compute_s, memory_s)
    return Estimate(
        seconds,
        op.count * op.flops,
        op.count * (op.read_bytes + op.write_bytes),
        op.count * dynamic_joules(op, accelerator, efficiency, power),
        {"compute": np.where(compute_bound, seconds, 0.0), "memory": np.where(compute_bound, 0.0, seconds)},
        d_seconds={op.part or COMPONENT[op.kind]: seconds},
    )


def fitted_seconds(op: Op, accelerator: Accelerator, efficiency: DeviceEfficiency) -> Num | None:
    """Seconds of one kernel on its fitted curve, launch included; None where none was fitted."""
    gemm, decode = gemm_curve(op, efficiency), decode_curve(op, efficiency)
    prefill, experts = prefill_curve(op, efficiency), expert_curve(op, efficiency)
    if gemm is not None:
        return gemm_seconds(op, gemm, accelerator)
    if decode is not None:
        ramp = decode_ramp(op, decode)
        filling = ramp(op.sequences * op.context) if ramp is not None else 0.0
        times = DecodeTimes(op, decode, efficiency, accelerator)
        alone = decode.launch + filling + op.sequences * times(op.sequences, op.context)
        alone = alone + times.wait * np.maximum(op.longest - op.context, 0.0)
        kernel = mixed_kernel(op, efficiency, accelerator)
        if kernel is None or op.beside is None:
            return alone
        alone = alone + kernel.waits(op.sequences, op.longest - op.context)
        beside = kernel.decodes(op.sequences, op.sequences * op.context, op.longest, op.beside)
        # Without the prompts it would not be faster than with them.
        beside = np.maximum(beside, alone - kernel.shared(op.beside))
        return np.where(np.greater(op.beside.tokens, 0.0), beside, alone)
    if prefill is not None:
        kernel = mixed_kernel(op, efficiency, accelerator)
        if kernel is not None:
            return prompts_seconds(op, prefill, kernel, accelerator)
        return prefill_seconds(op, prefill, accelerator)
    return None if experts is None else expert_seconds(op, experts, accelerator)


def decode_attention_curve(op: Op, accelerator: Accelerator, efficiency: DeviceEfficiency) -> PiecewiseLinear:
    """Seconds per sequence of one decode attention kernel that has no fitted curve, over the attended tokens."""
    memory = accelerator.memory
    rate = efficiency.decode_attention_compute * peak_flops(accelerator, op.dtype)
    fixed = op.sequence_read_bytes / memory.read_bandwidth + op.sequence_write_bytes / memory.write_bandwidth
    per_entry = op.entry_bytes / memory.read_bandwidth
    x, y = [0.0], [fixed / efficiency.decode_attention[0][1]]
    for context, fraction in efficiency.decode_attention:
        x.append(context)
        # More context is never faster, however steeply a fitted efficiency may rise.
        y.append(max(y[-1], (fixed + per_entry * context) / fraction, op.pair_flops * context / rate))
    last = efficiency.decode_attention[-1][1]
    return PiecewiseLinear(x, y, final_slope=max(per_entry / last, op.pair_flops / rate))


def dynamic_joules(op: Op, accelerator: Accelerator, efficiency: DeviceEfficiency, power: PowerModel) -> Num:
    """Energy above idle of one kernel: a share per FLOP and a share per byte.

    At the achievable GEMM rate a FLOP stream draws `compute_fraction` of (TDP - idle), at the achievable bandwidth a
    byte stream draws `memory_fraction`. Neglected: voltage and clock changes, narrower formats' lower energy per FLOP
    beyond their higher rate. Zero for a device of unknown power, whose energy is then not reported.
    """
    headroom = accelerator.dynamic_power or 0.0
    per_flop = headroom * power.compute_fraction / (efficiency.gemm_compute * peak_flops(accelerator, op.dtype))
    per_byte = headroom * power.memory_fraction / (efficiency.gemm_bandwidth * accelerator.memory.read_bandwidth)
    return op.flops * per_flop + (op.read_bytes + op.write_bytes) * per_byte


def coefficients(op: Op, e: DeviceEfficiency) -> tuple[float, float, float]:
    """(launch seconds, compute fraction, bandwidth fraction) of an operator kind."""
    if op.kind in ("gemm", "lm_head"):
        return e.gemm_launch, e.gemm_compute, e.gemm_bandwidth
    if op.kind == "moe":
        return e.moe_launch, e.moe_compute, e.moe_bandwidth
    if op.kind == "prefill_attention":
        return e.prefill_attention_launch, e.prefill_attention_compute, e.prefill_attention_bandwidth
    if op.kind == "decode_attention":
        fitted = decode_curve(op, e)
        if fitted is not None:
            return fitted.launch, e.decode_attention_compute, fitted.bandwidth
        return e.decode_attention_launch, e.decode_attention_compute, e.decode_attention[-1][1]
    if op.kind == "recurrence":  # nobody has measured these kernels: tiles as in prefill attention, streams as any
        return e.elementwise_launch, e.prefill_attention_compute, e.elementwise_bandwidth
    # Of all kernels that only stream, quantisation was measured: its launch and bandwidth stand for the others'.
    stream = e.curves.stream.get("quantise") if op.kind == "elementwise" else None
    if stream is not None:
        return stream.launch + stream.column * op.depth, 1.0, stream.bandwidth
    return e.elementwise_launch, 1.0, e.elementwise_bandwidth
