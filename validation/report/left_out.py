"""Engine overheads refitted without a group of runs, and that group predicted.

A group is a model of inference-sim's load tests, or a model on a device of aiconfigurator's closed loops. The fit is
that of `validation.engines`: the overheads of all engines that runs can tell, with the whole simulator in the loop,
linear around the packaged values. What is left out of it is predicted by the whole simulator for load tests, whose
tails are judged, too, and by the linear form for closed loops (a few rows of each configuration, mean TPOT).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.spec.load import find_calibration
from validation.compare.ask import answers
from validation.compare.isim import compare_stages
from validation.compare.outcome import Outcome, Values, columns_of, summary
from validation.compare.table import Table
from validation.engines.fit import ENGINES, STEPS, Fit, Linear, fit, linearised
from validation.engines.runs import LOOPS, STAGE_ENGINE, STAGES, Floats, Runs, read, stages_group, without
from validation.report.markdown import SUMMARY, cells, percent, table
from validation.report.served import summaries
from validation.report.split import ALL, Listed, meeting, split
from validation.report.store import Results, provenance, stamped

DEVICE = "h100-80gb-sxm"  # any: profiles are those of engines
TABLES = (STAGES, LOOPS)
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM"}  # subsets of the closed loops


def run(data: Path) -> Results:
    """Fit once with all runs and once without each group; simulate the load tests of each model left out."""
    runs = read(data)
    start = {engine: _packaged(engine) for engine in ENGINES}
    linear = linearised(runs, start)
    found = fit(runs, linear)
    listed = split().tables[STAGES]
    parts: dict[str, tuple[Table, Outcome]] = {}
    refitted: dict[str, Floats] = {}
    for model in sorted(set(runs.stages.texts("model").tolist())):
        others = without(runs, linear.usable, stages_group(model))
        refitted[model] = fit(runs, replace(linear, usable=others)).values
        own = runs.stages.keep(runs.stages.texts("model") == model)
        engine = {**start[STAGE_ENGINE], **_values(linear, refitted[model], STAGE_ENGINE)}
        parts[model] = compare_stages(own, solve=partial(answers, engine=tuple(engine.items()), bands=False))
    everything = _together(parts, listed, [])
    loops = {NAMES[engine]: metrics for engine in ENGINES if (metrics := _loops(runs, linear, found, engine))}
    return stamped({
        "rows": sum(len(kept) for kept, _ in parts.values()) + len(runs.loops),
        "overheads": _overheads(linear, found, refitted),
        "leave one out": [
            {"section": listed.section, "rows": "not overloaded", "metrics": everything},
            *({"section": split().tables[LOOPS].section, "rows": name, "metrics": one} for name, one in loops.items()),
        ],
        "left_out": {ALL: everything, "whole runs": _together(parts, listed, ["stage_index=-1"])},
        "models": {model: _means(_together({model: part}, listed, [])) for model, part in parts.items()},
        "loops": loops,
        "groups": _groups(runs, linear, found),
    }, [data / "serving" / f"{stem}.parquet" for stem in TABLES])  # fmt: skip


def _means(found: dict[str, Any]) -> dict[str, Any]:
    """Mean errors alone: of a model with two rows more figures would tell the errors, and so what was measured."""
    return {name: {key: one[key] for key in ("n", "mape_mean")} for name, one in found.items()}


def _packaged(engine: str) -> dict[str, float]:
    profile = find_calibration(accelerator=DEVICE, engine=engine).engine
    return {field: float(getattr(profile, field)) for field in {**STEPS[None], **STEPS[engine]}}


def _values(linear: Linear, values: Floats, engine: str) -> dict[str, float]:
    """The overheads of one engine, by field."""
    return {field: float(value) for (owner, field), value in zip(linear.names, values, strict=True)
            if owner in ("", engine)}  # fmt: skip


def _overheads(linear: Linear, found: Fit, refitted: dict[str, Floats]) -> list[dict[str, Any]]:
    """What was fitted, and the range of what fits without each model of the load tests give."""
    kept = np.stack(list(refitted.values()))
    error = np.sqrt(np.diag(found.covariance))
    return [
        {"engine": engine or "all", "field": field, "packaged": float(linear.start[at]),
         "fitted": float(found.values[at]), "stderr": float(error[at]), "low": float(kept[:, at].min()),
         "high": float(kept[:, at].max())}
        for at, (engine, field) in enumerate(linear.names)
    ]  # fmt: skip


def _loops(runs: Runs, linear: Linear, found: Fit, engine: str) -> dict[str, Any]:
    """The summary of an engine's closed loops, every model and device predicted without it."""
    own = (runs.metric == "silicon_tpot_ms") & (runs.engine == engine) & linear.usable
    rows = np.flatnonzero(own)
    if not len(rows):
        return {}
    measured = runs.measured[rows]
    return {"silicon_tpot_ms": summary(columns_of(rows, measured, measured * (1.0 + found.left_out[rows])))}


def _groups(runs: Runs, linear: Linear, found: Fit) -> list[dict[str, Any]]:
    """Median errors of the closed loops by engine and group: fitted, and left out."""
    rows = []
    loops = (runs.metric == "silicon_tpot_ms") & linear.usable
    for engine in ENGINES:
        for group in sorted(set(runs.group[loops & (runs.engine == engine)].tolist())):
            own = loops & (runs.engine == engine) & (runs.group == group)
            rows.append({
                "engine": engine, "group": str(group), "n": int(own.sum()),
                "fitted": float(np.median(np.abs(found.errors[own]))),
                "left_out": float(np.median(np.abs(found.left_out[own]))),
                "bias": float(np.median(found.left_out[own])),
            })  # fmt: skip
    return rows


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
    listed = split().tables[STAGES]
    yield "### Engine overheads, refitted without each group"
    yield ""
    yield f"{provenance(results)} Overheads are those that `python -m validation.engines` fits. A group is a model of"
    yield "the load tests, or a model on a device of the closed loops. There are no bands: their sizes belong to the"
    yield "packaged overheads. The same model on another device, or under another engine, stays in. Load tests are"
    yield "simulated with the overheads of the fit without their model:"
    yield ""
    yield from table(("rows", "metric", *SUMMARY[:-2]), [
        (rows, listed.metrics[name], *cells(found[name])[:-2])
        for rows, found in results["left_out"].items() for name in listed.metrics if name in found
    ], left=2)  # fmt: skip
    yield ""
    names = ("tpot_derived_ms", "e2e_mean_ms", "ttft_mean_ms", "e2e_p99_ms")
    yield from table(("model left out", "rows", *(f"{listed.metrics[name]}, mean error" for name in names)), [
        (model, f"{found[names[0]]['n']}", *(percent(found.get(name, {}).get("mape_mean")) for name in names))
        for model, found in results["models"].items()
    ])  # fmt: skip
    yield ""
    yield "Closed loops, mean TPOT, a few rows of each configuration, by the linear form:"
    yield ""
    yield from table(("engine", *SUMMARY[:-2]), [
        (engine, *cells(found["silicon_tpot_ms"])[:-2]) for engine, found in results["loops"].items()
    ])  # fmt: skip
    yield ""
    yield from table(("engine", "group", "n", "fitted median", "left out median", "left out bias"), [
        (NAMES[one["engine"]], one["group"], f"{one['n']}", percent(one["fitted"]), percent(one["left_out"]),
         percent(one["bias"], sign=True)) for one in results["groups"]
    ], left=2)  # fmt: skip
    yield ""
    yield "What the fits find, in SI units; low and high are the ends over fits without a model of the load tests:"
    yield ""
    yield from table(("engine", "overhead", "packaged", "fitted", "stderr", "low", "high"), [
        (one["engine"], one["field"], *(_shown(one[key]) for key in ("packaged", "fitted", "stderr", "low", "high")))
        for one in results["overheads"]
    ], left=2)  # fmt: skip
    yield ""


def _shown(value: float) -> str:
    """Three digits; what a search leaves above a bound of zero is zero."""
    return f"{value:.3g}" if value > 1e-8 else "0"
