"""A robust fit of overheads to runs, linear in the overheads, and what it misses when a model on a device is left out.

Each overhead adds to the step or to the first token, so predictions are nearly linear in it; the whole simulator is in
the loop and is linearised around the packaged values by difference quotients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from validation.engines.runs import STAGE_ENGINE, Floats, Overheads, Runs, predict, without

SOFT = 0.1  # relative errors far beyond it stop to count: settings that nobody published
ENGINES = ("sglang", "trtllm", "vllm")
SHARED = "expert_popularity"  # of models and prompts rather than of engines: one value for all of them
# By engine (None: one for all): the fields that are fitted, with the step of the difference quotient. A time per
# sequence came out at 8 +- 7 us for TensorRT-LLM, at 0 +- 2 us for vLLM: neither is told from nothing.
STEPS: dict[str | None, dict[str, float]] = {
    None: {SHARED: 0.25},
    "sglang": {"step_host": 2e-4, "sequence_host": 5e-6},
    "trtllm": {"step_host": 2e-4},
    "vllm": {"step_host": 2e-4, "schedule_host": 5e-4, "ingress": 1e-3},
}  # fmt: skip
LEAST_EFFECT = 1e-4  # of a step on any run: below it the runs say nothing about an overhead


@dataclass(frozen=True, slots=True)
class Linear:
    """base[n] + slope[n, k] (x - start[k]) for the k overheads `names`, (engine or "", field)."""

    names: tuple[tuple[str, str], ...]
    start: Floats
    scale: Floats
    base: Floats
    slope: Floats
    usable: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fit:
    """Overheads float64[k] with their covariance, and relative errors float64[n] of every run's group left out."""

    values: Floats
    covariance: Floats
    errors: Floats
    left_out: Floats


def linearised(runs: Runs, start: Overheads) -> Linear:
    """Difference quotients around `start`; overheads of different engines are moved together."""
    base = predict(runs, start)
    names: list[tuple[str, str]] = []
    slopes, starts, scales = [], [], []
    fields = list(dict.fromkeys(field for own in STEPS.values() for field in own))
    for field in fields:
        moved = {
            engine: {**start[engine], field: start[engine][field] + step}
            for engine in ENGINES
            if (step := STEPS[engine].get(field, STEPS[None].get(field)))
        }
        change = predict(runs, {**start, **moved}, engines=moved) - base
        for engine in ("",) if field in STEPS[None] else tuple(moved):
            step = STEPS[engine or None][field]
            own = np.where((runs.engine == engine) | (engine == ""), change / step, 0.0)
            if np.nanmax(np.abs(own * step / base)) > LEAST_EFFECT:
                names.append((engine, field))
                slopes.append(own)
                starts.append(start[engine or STAGE_ENGINE][field])
                scales.append(step)
    slope = np.stack(slopes, axis=1)
    usable = np.isfinite(base) & np.isfinite(slope).all(axis=1)
    return Linear(tuple(names), np.array(starts), np.array(scales), base, slope, usable)


def fit(runs: Runs, linear: Linear) -> Fit:
    """Overheads >= 0; every group of runs weighs the same, and so do the metrics of a group.

    The covariance is the sandwich estimate clustered by group. Overheads at zero have a one-sided error.
    """
    everything = linear.usable
    values = _solve(runs, linear, everything)
    left_out = np.full(len(runs.measured), np.nan)
    for group in np.unique(runs.group[everything]):
        own = runs.group == group
        kept = _solve(runs, linear, without(runs, everything, str(group)))
        left_out[own] = _relative(runs, linear, kept)[own]
    errors = np.where(everything, _relative(runs, linear, values), np.nan)
    return Fit(values, _covariance(runs, linear, values), errors, np.where(everything, left_out, np.nan))


def _relative(runs: Runs, linear: Linear, values: Floats) -> Floats:
    said: Floats = (linear.base + linear.slope @ (values - linear.start)) / runs.measured - 1.0
    return said


def _weights(runs: Runs, keep: NDArray[np.bool_]) -> Floats:
    key = np.char.add(runs.group[keep].astype(str), runs.metric[keep].astype(str))
    _, place, count = np.unique(key, return_inverse=True, return_counts=True)
    result: Floats = 1.0 / np.sqrt(count[place])
    return result


def _solve(runs: Runs, linear: Linear, keep: NDArray[np.bool_]) -> Floats:
    from scipy.optimize import least_squares

    weight = _weights(runs, keep)

    def errors(scaled: Floats) -> Floats:
        found: Floats = weight * _relative(runs, linear, scaled * linear.scale)[keep]
        return found

    begin = np.maximum(linear.start / linear.scale, 1e-3)
    found = least_squares(errors, begin, bounds=(0.0, np.inf), loss="cauchy", f_scale=SOFT)
    result: Floats = np.asarray(found.x * linear.scale)
    return result


def _covariance(runs: Runs, linear: Linear, values: Floats) -> Floats:
    keep = linear.usable
    weight = _weights(runs, keep)
    errors = weight * _relative(runs, linear, values)[keep]
    robust = (1.0 + (errors / SOFT) ** 2) ** -0.5  # of Cauchy's loss
    jacobian = (weight * robust)[:, None] * (linear.slope / runs.measured[:, None])[keep]
    _, place = np.unique(runs.group[keep], return_inverse=True)
    gradients = np.zeros((place.max() + 1, len(linear.names)))
    np.add.at(gradients, place, jacobian * (robust * errors)[:, None])
    inverse = np.linalg.pinv(jacobian.T @ jacobian)
    result: Floats = inverse @ (gradients.T @ gradients) @ inverse
    return result
