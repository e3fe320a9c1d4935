"""Measured runs that overheads are fitted to, and what perfsim says about them with other overheads.

inference-sim's runs of vLLM by stage (mean TPOT and TTFT, overloaded ones left out) and aiconfigurator's sample of
closed loops (mean TPOT): of the latter a few rows, chosen by hash, of each engine version, model, format, device and
plan, so that no sweep outweighs the others. What samplers move is held (first-guess.yaml): runs of models that sort
their logits are too few to tell it from other costs of a sequence. Disaggregated deployments are left out: their rows
seldom tell the plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from validation.compare import plans, silicon
from validation.compare.ask import Ask, answers
from validation.compare.isim import compare_stages
from validation.compare.table import Table, read_table, where

Floats = NDArray[np.float64]
Overheads = Mapping[str, Mapping[str, float]]  # by engine, by field of EngineProfile
STAGES, LOOPS = "isim_vllm_experiments", "aic_silicon_sample"
EACH = 3  # rows of one configuration
STAGE_METRICS = ("tpot_derived_ms", "ttft_mean_ms")
STAGE_ENGINE = "vllm"
# Groups of rows that no overhead could explain, with what speaks against them as times of the engine alone.
LEFT_OUT = {
    ("vllm", "nvidia/Llama-3.1-8B-Instruct-FP8", "h200_sxm"):
        "on eight GPUs they imply 360,000 prompt tokens/s, more than products at FP8 peak and all-reduces at the best"
        " measured rate leave time for (350,000): prompts were repeated, and found in the cache",
    ("trtllm", "Qwen/Qwen3-32B", "gb200"): "two clients get a token in 42 ms, one client in 8 ms",
}  # fmt: skip
CONFIGURATION = ("backend", "backend_version", "model_path", "system", "precision", "tp_size", "attention_dp_size",
                 "moe_ep_size")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Runs:
    """Measured values float64[n] with the engine, the model with the device, and the metric of each, object[n].

    `hashes` are SHA-256 of the rows, by engine; `ranges` what they span.
    """

    stages: Table
    loops: list[tuple[str, Ask]]
    measured: Floats
    engine: NDArray[Any]
    group: NDArray[Any]
    metric: NDArray[Any]
    hashes: dict[str, str]
    ranges: dict[str, dict[str, tuple[float, float]]]


def stages_group(model: str) -> str:
    """The group of a model's load tests, which all ran on one device."""
    return f"{STAGE_ENGINE} {model} {STAGES}"


def loops_group(engine: str, model: str, system: str) -> str:
    """The group of an engine's closed loops with a model on a device."""
    return f"{engine} {model} {system}"


def without(runs: Runs, usable: NDArray[np.bool_], group: str) -> NDArray[np.bool_]:
    """The usable rows of all other groups, bool[n]; InputError where that leaves nothing out, or nothing to fit."""
    own = usable & (runs.group == group)
    if not own.any():
        raise InputError(f"no usable run is in the group '{group}': a fit without it would be the fit with all runs")
    if own.sum() == usable.sum():
        raise InputError(f"all usable runs are in the group '{group}': nothing is left to fit")
    return usable & ~own


def read(data: Path) -> Runs:
    """The runs in the tables of `data`/serving."""
    stages = where(read_table(data / "serving" / f"{STAGES}.parquet"), ["overloaded=false", "hardware=H100"])
    kept, said = compare_stages(stages, solve=partial(answers, bands=False))
    rows = _chosen(read_table(data / "serving" / f"{LOOPS}.parquet").rows())
    loops = [(plans.engine(row["backend"]), silicon.question_of(row)) for row in rows]
    columns: list[tuple[float, str, str, str]] = []
    for name in STAGE_METRICS:
        values = said.values[name]
        models = kept.texts("model")
        columns += [
            (float(measured), STAGE_ENGINE, stages_group(models[row]), name)
            for row, measured in zip(values.rows, values.measured, strict=True)
        ]
    columns += [
        (float(row["silicon_tpot_ms"]), engine, loops_group(engine, row["model_path"], row["system"]),
         "silicon_tpot_ms")
        for row, (engine, _) in zip(rows, loops, strict=True)
    ]  # fmt: skip
    measured, engine, group, metric = (np.array(column) for column in zip(*columns, strict=True))
    used = {STAGE_ENGINE: [{**row, "table": STAGES} for row in stages.rows()]}
    for row, (name, _) in zip(rows, loops, strict=True):
        used.setdefault(name, []).append(row)
    hashes = {name: _hash(own) for name, own in used.items()}
    ranges = {name: _ranges([row for row, (each, _) in zip(rows, loops, strict=True) if each == name])
              for name in used}  # fmt: skip
    return Runs(stages, loops, measured.astype(np.float64), engine, group, metric, hashes, ranges)


def predict(runs: Runs, overheads: Overheads, *, engines: Collection[str] | None = None) -> Floats:
    """What perfsim says, float64[n] in the order of `runs.measured`; NaN where it refuses, and beside `engines`."""
    wanted = set(runs.engine) if engines is None else set(engines)
    found: list[float] = []
    if STAGE_ENGINE in wanted:
        own = tuple(overheads.get(STAGE_ENGINE, {}).items())
        _, said = compare_stages(runs.stages, solve=partial(answers, bands=False, engine=own))
        found += [value for name in STAGE_METRICS for value in said.values[name].predicted.tolist()]
    else:
        found += [np.nan] * (len(runs.measured) - len(runs.loops))
    replies = {}
    for engine in sorted(wanted & {engine for engine, _ in runs.loops}):
        questions = [question for each, question in runs.loops if each == engine]
        for question, answer in answers(
            questions, bands=False, engine=tuple(overheads.get(engine, {}).items())
        ).items():
            replies[engine, question] = answer
    for key in runs.loops:
        answer = replies.get(key)
        found.append(np.nan if answer is None or answer.refused else 1e3 * float(answer.metrics["tpot"]["mean"]))
    return np.array(found)


def _chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    reasons, _ = silicon.questions_of(list(rows), silicon.question_of)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row, reason in zip(rows, reasons, strict=True):
        odd = (row["backend"], row["model_path"], row["system"]) in LEFT_OUT
        if reason is None and not odd and row["mode"] == "agg" and row["silicon_tpot_ms"]:
            groups.setdefault(tuple(str(row[name]) for name in CONFIGURATION), []).append(row)
    return [row for key in sorted(groups) for row in sorted(groups[key], key=_digest)[:EACH]]


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()


def _hash(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256("".join(sorted(_digest(row) for row in rows)).encode()).hexdigest()


def _ranges(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    found = {}
    for name in ("concurrency", "isl", "osl", "tp_size"):
        values = [float(row[name]) for row in rows if row[name]]
        if values:
            found[name] = (min(values), max(values))
    return found
