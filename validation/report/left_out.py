"""Engine coefficients refitted without each model, and that model predicted: inference-sim's runs by stage.

Three coefficients of vLLM's profile are fitted again, all others and the operator curves stay: host time per step,
sampling passes and latency of the client before the queue. The whole simulator is in the loop: its predictions are
linearised in the three around the packaged values (they are nearly linear: each adds to the step or to the first
token), a robust least-squares fit (soft L1 of relative errors of mean TPOT and TTFT, every model weighs the same) finds
new values, and the model that was left out is simulated with these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.compare.ask import answers
from validation.compare.isim import compare_stages
from validation.compare.lowered import calibration
from validation.compare.outcome import Outcome, Values
from validation.compare.table import Table, read_table
from validation.report.markdown import SUMMARY, cells, percent, table
from validation.report.served import summaries
from validation.report.split import Listed, meeting, split
from validation.report.store import Results, provenance, stamped

Floats = NDArray[np.float64]
STEM = "isim_vllm_experiments"
DEVICE, ENGINE = "h100-80gb-sxm", "vllm"
FITTED = ("tpot_derived_ms", "ttft_mean_ms")
# Coefficient: the step of its difference quotient, in its own unit.
STEPS = {"step_host": 2e-4, "sampling_passes": 30.0, "ingress": 1e-3}  # all that a fit of vLLM's profile may move
TOLERANCE = 0.05  # relative errors beyond it weigh less
UNITS = {"step_host": (1e6, "µs"), "sampling_passes": (1.0, ""), "ingress": (1e3, "ms")}


@dataclass(frozen=True, slots=True)
class Linear:
    """Predictions of `FITTED` as a function of the coefficients: base[n] + slope[n, 3] (c - start[3])."""

    start: Floats
    base: Floats
    slope: Floats
    measured: Floats
    model: NDArray[np.str_]


def run(path: Path) -> Results:
    """Leave every model out once; the results of all of them together and one by one."""
    listed = split().tables[STEM]
    found = read_table(path)
    found = found.keep(np.isin(np.arange(len(found)), meeting(found, ["overloaded=false", "hardware=H100"])))
    linear = linearised(found)
    models = sorted(set(linear.model.tolist()))
    fits = {"": fit(linear, np.ones(len(linear.base), dtype=bool))}
    parts: dict[str, tuple[Table, Outcome]] = {}
    for model in models:
        fits[model] = fit(linear, linear.model != model)
        own = found.keep(found.texts("model") == model)
        parts[model] = compare_stages(own, solve=partial(answers, engine=coefficients(fits[model])))
    everything = _together(parts, listed, [])
    return stamped({
        "rows": sum(len(kept) for kept, _ in parts.values()), "start": dict(zip(STEPS, linear.start, strict=True)),
        "leave one out": [{"section": listed.section, "rows": "not overloaded", "metrics": everything}],
        "fits": {model or "none left out": dict(zip(STEPS, values, strict=True)) for model, values in fits.items()},
        "left_out": {"all rows": everything,
                     "whole runs": _together(parts, listed, ["stage_index=-1"])},
        "models": {model: _together({model: part}, listed, []) for model, part in parts.items()},
    }, [path])  # fmt: skip


def coefficients(values: Sequence[float] | Floats) -> tuple[tuple[str, float], ...]:
    """The fitted values by name."""
    return tuple((name, float(value)) for name, value in zip(STEPS, values, strict=True))


def linearised(found: Table) -> Linear:
    """Simulate all runs with the packaged coefficients and with each of them moved."""
    profile = calibration(DEVICE, ENGINE).engine
    start = np.array([float(getattr(profile, name)) for name in STEPS])
    kept, base = compare_stages(found, solve=partial(answers, engine=coefficients(start)))
    moved = []
    for at, step in enumerate(STEPS.values()):
        changed = start.copy()
        changed[at] += step
        moved.append(compare_stages(found, solve=partial(answers, engine=coefficients(changed)))[1])
    values = [base.values[name] for name in FITTED]
    slopes = [
        np.concatenate([(outcome.values[name].predicted - base.values[name].predicted) / step for name in FITTED])
        for outcome, step in zip(moved, STEPS.values(), strict=True)
    ]
    return Linear(
        start, np.concatenate([one.predicted for one in values]), np.stack(slopes, axis=1),
        np.concatenate([one.measured for one in values]),
        np.concatenate([kept.texts("model")[one.rows].astype(str) for one in values]),
    )  # fmt: skip


def fit(linear: Linear, keep: NDArray[np.bool_]) -> Floats:
    """Coefficients >= 0 that bring the kept rows closest; float64[3]."""
    from scipy.optimize import least_squares

    _, place, count = np.unique(linear.model[keep], return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(count[place])
    scale = np.array(list(STEPS.values()))

    def errors(scaled: Floats) -> Floats:
        said = linear.base[keep] + linear.slope[keep] @ (scaled * scale - linear.start)
        result: Floats = weight * (said / linear.measured[keep] - 1.0)
        return result

    first = np.maximum(linear.start / scale, 1e-3)
    found = least_squares(errors, first, bounds=(0.0, np.inf), loss="soft_l1", f_scale=TOLERANCE, x_scale=1.0)
    result: Floats = np.asarray(found.x * scale)
    return result


def _together(parts: dict[str, tuple[Table, Outcome]], listed: Listed, conditions: Sequence[str]) -> dict[str, Any]:
    """Summaries over the left-out rows of all parts that meet the conditions."""
    pooled: dict[str, list[Values]] = {}
    for kept, outcome in parts.values():
        chosen = meeting(kept, conditions)
        for name, values in outcome.values.items():
            pooled.setdefault(name, []).append(values.take(np.isin(values.rows, chosen)))
    joined = {
        name: Values(*(np.concatenate([getattr(one, key) for one in found]) for key in Values.__slots__))
        for name, found in pooled.items()
    }
    count = sum(len(kept) for kept, _ in parts.values())
    return summaries(Outcome([None] * count, joined), listed.metrics, np.ones(count, dtype=bool))


def render(results: Results) -> Iterator[str]:
    """Lines of the section in Markdown."""
    listed = split().tables[STEM]
    yield "### The same runs, each model predicted by coefficients fitted without it"
    yield ""
    yield f"{provenance(results)} {results['rows']:,} rows that are not overloaded. There are no bands: their sizes"
    yield "belong to the packaged coefficients."
    yield ""
    yield from table(("rows", "metric", *SUMMARY), [
        (rows, listed.metrics[name], *cells(found[name]))
        for rows, found in results["left_out"].items() for name in listed.metrics if name in found
    ], left=2)  # fmt: skip
    yield ""
    names = list(STEPS)
    head = [f"{name} ({UNITS[name][1]})" if UNITS[name][1] else name for name in names]
    rows = []
    for model, values in {"packaged": results["start"], **results["fits"]}.items():
        errors = results["models"].get(model, {})
        cells_of = [f"{UNITS[name][0] * values[name]:.1f}" for name in names]
        own = [errors.get(metric) for metric in ("tpot_derived_ms", "e2e_mean_ms", "ttft_mean_ms")]
        rows.append((model, *cells_of, *(percent(one["mape_mean"]) if one else "–" for one in own)))
    yield from table(("left out", *head, "TPOT mean error", "E2E", "TTFT"), rows)
    yield ""
