"""Prints, and with --write stores, the overheads of serving engines that fit measured runs best, with their errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.engines_file import ENGINES_FOLDER
from perfsim.spec.load import find_calibration
from validation.engines.fit import ENGINES, SHARED, STEPS, Fit, Linear, fit, linearised
from validation.engines.runs import LEFT_OUT, STAGE_ENGINE, Runs, read

DEVICE = "h100-80gb-sxm"  # any: profiles are those of engines
TINY = 1e-12  # an overhead at its bound
PER_TOKEN = ("tpot_derived_ms", "silicon_tpot_ms")
VERSIONS = {"sglang": "0.5.1 to 0.5.9", "trtllm": "1.0 to 1.2", "vllm": "0.12 to 0.19"}
SOURCES = {
    "loops": "aiconfigurator's sample of serving measurements (ai-dynamo/aiconfigurator@095f58a, Apache-2.0)",
    "stages": "vLLM 0.15.1 on H100, stages that were not overloaded (inference-sim/training@ed5c1d2)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.engines", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder whose serving/ holds the measured tables")
    parser.add_argument("--write", action="store_true", help=f"write hardware/calibration/{ENGINES_FOLDER}/*.yaml")
    options = parser.parse_args(arguments)
    try:
        runs = read(options.data)
    except InputError as error:
        print(f"--data: {str(error).removeprefix('--table: ')}", file=sys.stderr)
        return 2
    start = {engine: _packaged(engine) for engine in ENGINES}
    linear = linearised(runs, start)
    found = fit(runs, linear)
    print("\n".join(_table(runs, linear, found)))
    if options.write:
        for engine in ENGINES:
            path = catalog.data_directories()[0] / "hardware" / "calibration" / ENGINES_FOLDER / f"{engine}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(_document(runs, linear, found, engine)) + "\n", encoding="utf-8")
    return 0


def _packaged(engine: str) -> dict[str, float]:
    profile = find_calibration(accelerator=DEVICE, engine=engine).engine
    fields = {**STEPS[None], **STEPS[engine]}
    return {field: float(getattr(profile, field)) for field in fields}


def _index(linear: Linear, engine: str) -> list[int]:
    return [at for at, (owner, _) in enumerate(linear.names) if owner in ("", engine)]


def _table(runs: Runs, linear: Linear, found: Fit) -> Iterator[str]:
    yield f"{'engine':8} {'overhead':18} {'packaged':>12} {'fitted':>12} {'stderr':>12}"
    spread = np.sqrt(np.diag(found.covariance))
    for (engine, field), start, value, error in zip(linear.names, linear.start, found.values, spread, strict=True):
        yield f"{engine or 'all':8} {field:18} {start:12.5g} {value:12.5g} {error:12.5g}"
    yield ""
    yield "median and mean of absolute relative errors"
    before = linear.base / runs.measured - 1.0
    yield f"{'engine':8} {'metric':18} {'runs':>5} {'packaged':>16} {'fitted':>16} {'group left out':>16}"
    for engine in ENGINES:
        for metric in np.unique(runs.metric[runs.engine == engine]):
            own = (runs.engine == engine) & (runs.metric == metric) & linear.usable
            cells = [f"{_median(errors[own]):7.3f} {_mean(errors[own]):8.3f}"
                     for errors in (before, found.errors, found.left_out)]  # fmt: skip
            yield f"{engine:8} {metric:18} {own.sum():5d} " + " ".join(cells)
    yield ""
    for group in np.unique(runs.group):
        own = (runs.group == group) & np.isin(runs.metric, PER_TOKEN) & linear.usable
        if own.any():
            signed = [float(np.median(errors[own])) for errors in (before, found.errors, found.left_out)]
            owner = runs.engine[own][0]
            yield f"{owner:8} {group:60} {own.sum():4d} " + " ".join(f"{value:+7.3f}" for value in signed)


def _document(runs: Runs, linear: Linear, found: Fit, engine: str) -> Iterator[str]:
    """The file of one engine; errors are those of the linearised simulator."""
    index = _index(linear, engine)
    spread = np.sqrt(np.diag(found.covariance))
    own = (runs.engine == engine) & np.isin(runs.metric, PER_TOKEN) & linear.usable
    errors, left_out = found.errors[own], found.left_out[own]
    tables = [SOURCES["loops"], *([SOURCES["stages"]] if engine == STAGE_ENGINE else [])]
    yield "# Overheads fitted to measured runs; do not edit: `python -m validation.engines --data DIR --write` writes"
    yield f"# this file. {SHARED} is one value for all engines. Errors are those of the time per token."
    for (owner, model, device), reason in LEFT_OUT.items():
        if owner == engine:
            yield f"# Left out: {model} on {device}: {reason}."
    yield f"engine: {engine}"
    yield f'versions: "{VERSIONS[engine]}"'
    yield f'source: "{"; ".join(tables)}"'
    yield "coefficients:"
    for at in index:
        yield f"  {linear.names[at][1]}: {{value: {max(found.values[at], TINY) - TINY:.4g}, stderr: {spread[at]:.3g}}}"
    lower = [[f"{found.covariance[row, column]:.3g}" for column in index[: at + 1]] for at, row in enumerate(index)]
    yield f"covariance: [{', '.join('[' + ', '.join(row) + ']' for row in lower)}]"
    yield f"rows: {int(own.sum())}"
    yield f"sha256: {runs.hashes[engine]}"
    yield f"range: {_mapping(runs.ranges[engine])}"
    yield f"median: {_median(errors):.4f}"
    yield f"mean: {_mean(errors):.4f}"
    yield f"left_out_median: {_median(left_out):.4f}"
    yield f"left_out_mean: {_mean(left_out):.4f}"


def _mapping(ranges: Mapping[str, tuple[float, float]]) -> str:
    return "{" + ", ".join(f"{name}: [{low:.0f}, {high:.0f}]" for name, (low, high) in ranges.items()) + "}"


def _median(errors: Any) -> float:
    return float(np.median(np.abs(errors)))


def _mean(errors: Any) -> float:
    return float(np.mean(np.abs(errors)))


if __name__ == "__main__":
    sys.exit(main())
