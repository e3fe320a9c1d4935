"""Engine coefficients refitted without each model, and that model predicted: inference-sim's runs by stage.

Those coefficients of vLLM's profile that the runs can tell (host time per step, sampling passes, latency of the client
before the queue, compilation of kernels) are fitted again, all others and the operator curves stay. The whole simulator
is in the loop: its predictions are linearised around the packaged values (they are nearly linear: each coefficient adds
to the step or to the first token), a robust least-squares fit (soft L1 of relative errors of mean TPOT and TTFT, every
model weighs the same) finds new values, and the model that was left out is simulated with these.
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
# Coefficients that a fit may move: the step of the difference quotient, in the coefficient's own unit.
STEPS = {
    "step_host": 2e-4, "sampling_passes": 30.0, "plain_sampling_passes": 10.0, "ingress": 1e-3, "kernel_compile": 0.1,
}  # fmt: skip
LEAST_EFFECT = 1e-6  # of a step on any prediction, as a fraction: below it the runs say nothing about a coefficient
TOLERANCE = 0.05  # relative errors beyond it weigh less
UNITS = {"step_host": (1e6, "µs"), "ingress": (1e3, "ms"), "kernel_compile": (1e3, "ms")}


@dataclass(frozen=True, slots=True)
class Linear:
    """Predictions of `FITTED` as a function of the k coefficients `names`: base[n] + slope[n, k] (c - start[k])."""

    names: tuple[str, ...]
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
        engine = coefficients(linear.names, fits[model])
        parts[model] = compare_stages(own, solve=partial(answers, engine=engine))
    everything = _together(parts, listed, [])
    return stamped({
        "rows": sum(len(kept) for kept, _ in parts.values()), "names": linear.names,
        "start": dict(coefficients(linear.names, linear.start)),
        "leave one out": [{"section": listed.section, "rows": "not overloaded", "metrics": everything}],
        "fits": {model or "none left out": dict(coefficients(linear.names, values)) for model, values in fits.items()},
        "left_out": {"all rows": everything,
                     "whole runs": _together(parts, listed, ["stage_index=-1"])},
        "models": {model: _together({model: part}, listed, []) for model, part in parts.items()},
    }, [path])  # fmt: skip


def coefficients(names: Sequence[str], values: Sequence[float] | Floats) -> tuple[tuple[str, float], ...]:
    """The values by name."""
    return tuple((name, float(value)) for name, value in zip(names, values, strict=True))


def linearised(found: Table) -> Linear:
    """Simulate all runs with the packaged coefficients and with each of them moved."""
    profile = calibration(DEVICE, ENGINE).engine
    packaged = {name: getattr(profile, name, None) for name in STEPS}
    start = {name: float(value) for name, value in packaged.items() if value is not None}
    # Set explicitly, so that all of them are simulated alike: without bands.
    kept, base = compare_stages(found, solve=partial(answers, engine=tuple(start.items())))
    values = [base.values[name] for name in FITTED]
    said = np.concatenate([one.predicted for one in values])
    slopes = {}
    for name, value in start.items():
        moved = {**start, name: value + STEPS[name]}
        _, outcome = compare_stages(found, solve=partial(answers, engine=tuple(moved.items())))
        change = np.concatenate([outcome.values[metric].predicted for metric in FITTED]) - said
        if np.abs(change / said).max() > LEAST_EFFECT:
            slopes[name] = change / STEPS[name]
    return Linear(
        tuple(slopes), np.array([start[name] for name in slopes]), said, np.stack(list(slopes.values()), axis=1),
        np.concatenate([one.measured for one in values]),
        np.concatenate([kept.texts("model")[one.rows].astype(str) for one in values]),
    )  # fmt: skip


def fit(linear: Linear, keep: NDArray[np.bool_]) -> Floats:
    """Coefficients >= 0 that bring the kept rows closest; float64[k]."""
    from scipy.optimize import least_squares

    _, place, count = np.unique(linear.model[keep], return_inverse=True, return_counts=True)
    weight = 1.0 / np.sqrt(count[place])
    scale = np.array([STEPS[name] for name in linear.names])

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
    names = results["names"]
    head = [f"{name} ({UNITS[name][1]})" if name in UNITS else name for name in names]
    rows = []
    for model, values in {"packaged": results["start"], **results["fits"]}.items():
        errors = results["models"].get(model, {})
        cells_of = [f"{UNITS.get(name, (1.0, ''))[0] * values[name]:.1f}" for name in names]
        own = [errors.get(metric) for metric in ("tpot_derived_ms", "e2e_mean_ms", "ttft_mean_ms")]
        rows.append((model, *cells_of, *(percent(one["mape_mean"]) if one else "–" for one in own)))
    yield from table(("left out", *head, "TPOT mean error", "E2E", "TTFT"), rows)
    yield ""
