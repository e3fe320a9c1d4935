"""How long decodes alone wait for the longest of them: fitted to batches of unequal context."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from perfsim.calibrate.fit import SOFT, sandwich
from perfsim.calibrate.mixed import HARDWARE, HEADS, kernel_op, left_out_half
from perfsim.calibrate.rows import Array, number, read
from perfsim.cost.mixed import kernel_of
from perfsim.spec.catalog import accelerator
from perfsim.spec.curves import DecodeCurve, MixedCurve, PrefillCurve

TABLE = "llmservingsim_attention_skew"
ITERATIONS = 3.0  # whose times a row adds up: its equal batches take three times as long as in the table of mixed steps
BOUNDS = (0.5, 0.001, 2.0)  # start, lowest and highest value of `last`


def waits(
    folder: Path, curve: MixedCurve, decode: DecodeCurve, prefill: PrefillCurve, device: str, hardware: str = HARDWARE
) -> tuple[Array, Array, Array, Array, np.ndarray]:
    """(measured seconds, those of equal contexts, seconds per `last`, group, held out) where nothing is split."""
    names = ["hardware", "model", "tp", "regime", "n", "nb", "kvs", "kv_big", "kv_mean", "t_mean_us", "t_skew_us"]
    raw, parts = read(folder, TABLE, names), []
    whole = curve.model_copy(update={"last": 1.0})
    for index, (model, (heads, kv_heads, dim)) in enumerate(HEADS.items()):
        for tp in (1, 2):
            kernel = kernel_of(kernel_op(heads / tp, kv_heads / tp, dim), whole, decode, prefill, accelerator(device))
            at = (raw["hardware"] == hardware) & (raw["model"] == model) & (raw["tp"] == tp)
            at &= (raw["regime"] == "pure") & (number(raw["n"]) >= kernel.unsplit)
            count, many, short, long, mean, equal, mixed = (number(raw[name][at]) for name in names[4:])
            parts.append((
                mixed * 1e-6 / ITERATIONS, equal * 1e-6 / ITERATIONS, np.asarray(kernel.waits(count, long - mean)),
                np.full(len(count), 2.0 * index + tp), left_out_half(count, many, short, long),
            ))  # fmt: skip
    measured, alone, each, group, out = (np.concatenate(column) for column in zip(*parts, strict=True))
    return measured, alone, each, group, out


class Last(NamedTuple):
    """`last`, the variance of its logarithm, median and p90 of errors on the half not fitted, SHA-256 of the rows."""

    last: float
    variance: float
    median: float
    p90: float
    digest: str


def fit_last(folder: Path, curve: MixedCurve, decode: DecodeCurve, prefill: PrefillCurve, device: str) -> Last:
    """`last` from the measured times of equal contexts, so that it tells the wait alone."""
    from scipy.optimize import least_squares

    measured, alone, each, group, out = waits(folder, curve, decode, prefill, device)

    def errors(logs: Array, at: np.ndarray) -> Array:
        result: Array = np.log(alone + np.exp(logs[0]) * each)[at] - np.log(measured)[at]
        return result

    start, low, high = np.log(BOUNDS)
    found = least_squares(errors, [start], bounds=([low], [high]), loss="soft_l1", f_scale=SOFT, args=(~out,))
    missed = np.abs(np.expm1(errors(found.x, out)))
    variance = sandwich(found.jac, found.fun, group[~out])[0, 0]
    columns = (part[~out].tolist() for part in (group, alone, measured))
    lines = sorted(repr(row) for row in zip(*columns, strict=True))
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Last(
        float(np.exp(found.x[0])), float(variance), float(np.median(missed)), float(np.quantile(missed, 0.9)), digest
    )
