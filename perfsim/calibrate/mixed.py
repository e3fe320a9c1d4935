"""What a step with prompt chunks costs where one SM reads a whole context: fitted to steps that mix both.

The forms are those of `perfsim.cost.mixed`. They use the curves of decode and prefill attention that were fitted to
aiconfigurator's tables; what is fitted here is how tiles fill the SMs together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from perfsim.calibrate.fit import SEED, SOFT, sandwich
from perfsim.calibrate.rows import Array, Rows, named, number, read
from perfsim.cost.mixed import kernel_of
from perfsim.ops.op import Beside, Op
from perfsim.spec.catalog import accelerator
from perfsim.spec.curves import DecodeCurve, MixedCurve, PrefillCurve

DEVICE, HARDWARE, VERSION = "rtx-pro-6000-blackwell-96gb", "RTXPRO6000", "0.19.0"
CARD, OF_CARD = "rtx-4090-24gb", "RTX4090"
TABLE, SOURCE = "llmservingsim_attention_mixed", "casys-kaist/LLMServingSim@5daddb2, MIT"
# GPUs on which vLLM 0.24 (A100: 0.14) was timed with this kernel; the mixed steps come from one of them.
SAME_KERNEL = frozenset({"a100-80gb-sxm", "l40s-48gb", DEVICE})
HEADS = {  # query and K/V heads, head size, as the models' configurations have them
    "meta-llama/Llama-3.1-8B": (32, 8, 128), "Qwen/Qwen3-32B": (64, 8, 128),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (32, 4, 128),
}  # fmt: skip
BYTES = 2.0  # of a 16-bit number
SAMPLE = 6000  # rows of the fit
# Start, lowest and highest value of each coefficient.
Bounds = Mapping[str, tuple[float, float, float]]
BOUNDS: Bounds = {"rows": (64.0, 8.0, 256.0), "tail": (0.5, 0.001, 2.0), "empty": (1e-7, 1e-10, 1e-5)}
COMPUTE: Bounds = {"compute": (0.8, 0.1, 1.0)}
COLUMNS = ("hardware", "model", "tp", "prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
SIZES = ("chunk", "past", "count", "context")


Curve = TypeVar("Curve", MixedCurve, PrefillCurve)


@dataclass(frozen=True)
class Batch:
    """Measured steps of one model and sharding: prompt chunks after `past` tokens, `count` decodes of equal context."""

    op: Op
    chunk: Array
    past: Array
    count: Array
    context: Array
    seconds: Array
    held_out: np.ndarray

    def predicted(self, curve: MixedCurve, decode: DecodeCurve, prefill: PrefillCurve, device: str) -> Array:
        """Seconds of every step."""
        chip, op = accelerator(device), self.op
        kernel, new = kernel_of(op, curve, decode, prefill, chip), self.chunk
        pairs, entries = new * self.past + new * (new + 1) / 2, self.past + new
        prompts = Beside(new, pairs, entries, entries, op.pair_flops)
        beside = kernel.decodes(self.count, self.count * self.context, self.context, prompts)
        moved = (entries * op.entry_bytes + new * op.sequence_read_bytes) / chip.memory.read_bandwidth
        moved = (moved + new * op.sequence_write_bytes / chip.memory.write_bandwidth) / prefill.bandwidth
        total: Array = prefill.launch + moved + kernel.prompts(new, pairs, entries)
        return total + np.where(self.count > 0, beside, 0.0)


@dataclass(frozen=True)
class Found(Generic[Curve]):
    """The curve, its standard errors and covariance (of logarithms), and errors on shapes that were not fitted."""

    curve: Curve
    stderr: dict[str, float]
    covariance: Array
    rows: int
    digest: str
    errors: Array
    ranges: dict[str, tuple[float, float]]


def batches(folder: Path, hardware: str = HARDWARE) -> list[Batch]:
    """Steps with a prompt chunk of every model and sharding; half of the shapes, by hash, is held out."""
    raw = read(folder, TABLE, list(COLUMNS))
    found = []
    for model, (heads, kv_heads, dim) in HEADS.items():
        for tp in (1, 2):
            at = (raw["hardware"] == hardware) & (raw["model"] == model) & (raw["tp"] == tp)
            at &= raw["prefill_chunk"] > 0
            if at.any():
                chunk, past, count, context = (number(raw[name][at]) for name in COLUMNS[3:7])
                op, seconds = kernel_op(heads / tp, kv_heads / tp, dim), number(raw["time_us"][at]) * 1e-6
                found.append(
                    Batch(op, chunk, past, count, context, seconds, left_out_half(chunk, past, count, context))
                )
    return found


def kernel_op(heads: float, kv_heads: float, dim: float) -> Op:
    """One layer's attention on one shard, whose sizes the formulas of `perfsim.cost.mixed` need."""
    moved = heads * dim * BYTES
    return Op(
        "decode_attention", "attention", 1, 0.0, 0.0, 0.0, "bf16", driver="attention", sequence_read_bytes=moved,
        sequence_write_bytes=moved, entry_bytes=2 * kv_heads * dim * BYTES, pair_flops=4 * heads * dim, heads=heads,
        tiles=kv_heads, format="bf16", limit=np.inf,
    )  # fmt: skip


def left_out_half(*sizes: Array) -> np.ndarray:
    """A fixed half of the shapes, by SHA-256 of their sizes."""
    names, place = np.unique(named(*sizes), return_inverse=True)
    out = [hashlib.sha256(str(name).encode()).digest()[0] < 128 for name in names]
    return np.asarray(out, dtype=bool)[place]


def fit_mixed(folder: Path, decode: DecodeCurve, prefill: PrefillCurve) -> Found[MixedCurve]:
    """`rows`, `tail` and `empty` of the RTX PRO 6000."""

    def curve(values: dict[str, float]) -> MixedCurve:
        return MixedCurve(**values)

    return _fit(
        batches(folder), BOUNDS, curve, lambda step, found: step.predicted(found, decode, prefill, DEVICE),
    )  # fmt: skip


def fit_compute(folder: Path, mixed: MixedCurve, decode: DecodeCurve, prefill: PrefillCurve) -> Found[PrefillCurve]:
    """The prefill curve of another GPU with `compute` as steps on the RTX 4090 have it."""

    def curve(values: dict[str, float]) -> PrefillCurve:
        return prefill.model_copy(update=values)

    return _fit(
        batches(folder, OF_CARD), COMPUTE, curve, lambda step, found: step.predicted(mixed, decode, found, CARD),
    )  # fmt: skip


def _fit(
    steps: list[Batch], bounds: Bounds, curve: Callable[[dict[str, float]], Curve],
    predicted: Callable[[Batch, Curve], Array],
) -> Found[Curve]:  # fmt: skip
    """Coefficients by soft-L1 relative errors on half of the shapes; clustered by model and shards, else by rows."""
    from scipy.optimize import least_squares

    place = np.concatenate([np.full(len(step.seconds), index) for index, step in enumerate(steps)])
    fitted = ~np.concatenate([step.held_out for step in steps])
    measured = np.log(np.concatenate([step.seconds for step in steps]))
    every = np.flatnonzero(fitted)
    drawn = np.random.Generator(np.random.PCG64(SEED)).choice(every, min(SAMPLE, len(every)), replace=False)
    picked: np.ndarray = np.sort(drawn)

    def values(logs: Array) -> dict[str, float]:
        return dict(zip(bounds, np.exp(logs).tolist(), strict=True))

    def errors(logs: Array, at: np.ndarray = picked) -> Array:
        found = curve(values(logs))
        result: Array = (np.log(np.concatenate([predicted(step, found) for step in steps])) - measured)[at]
        return result

    start, low, high = (np.log([bound[at] for bound in bounds.values()]) for at in range(3))
    found = least_squares(errors, start, bounds=(low, high), loss="soft_l1", f_scale=SOFT)
    clusters = place if len(steps) > len(bounds) else np.arange(len(place))
    covariance = sandwich(found.jac, found.fun, clusters[picked])
    spread = np.sqrt(np.diag(covariance))
    best = values(found.x)
    columns = {name: np.concatenate([getattr(step, name) for step in steps])[picked] for name in SIZES}
    return Found(
        curve(best), {name: float(value * error) for (name, value), error in zip(best.items(), spread, strict=True)},
        covariance, len(picked), _digest(steps, place, picked), np.expm1(errors(found.x, np.flatnonzero(~fitted))),
        {name: (float(column.min()), float(column.max())) for name, column in columns.items()},
    )  # fmt: skip


def decode_rows(folder: Path) -> Rows:
    """Decodes alone on the RTX 4090; a shape is a batch size and a context."""
    raw = read(folder, TABLE, list(COLUMNS))
    at = (raw["hardware"] == OF_CARD) & (raw["prefill_chunk"] == 0)
    (heads, kv_heads, dim), count, context = (
        HEADS["meta-llama/Llama-3.1-8B"], number(raw["n_decode"][at]), number(raw["kv_decode"][at])
    )  # fmt: skip
    one = np.ones(len(count))
    columns = {
        "heads": heads * one, "tiles": kv_heads * one, "dim": dim * one, "window": 0 * one, "new": one,
        "sequences": count, "context": context, "entry": 2 * kv_heads * dim * one, "query": 2 * heads * dim * one,
        "pair": 4 * heads * dim * one,
    }  # fmt: skip
    seconds = number(raw["time_us"][at]) * 1e-6
    return Rows(CARD, "vllm", VERSION, "decode", "bf16", TABLE, columns, seconds, named(count, context))


def _digest(steps: list[Batch], place: np.ndarray, picked: np.ndarray) -> str:
    """SHA-256 over the sorted rows of the fit: heads, sizes and seconds."""
    columns = [np.concatenate([getattr(step, name) for step in steps]) for name in (*SIZES, "seconds")]
    lines = sorted(
        f"{steps[place[row]].op.heads:g}x{float(steps[place[row]].op.tiles):g} "
        + " ".join(repr(float(column[row])) for column in columns)
        for row in picked
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
