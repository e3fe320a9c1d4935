"""What whole measured runs say about the factors of `hardware/calibration/uncertainty.yaml`: its section `observed`.

    python -m validation.observed --table FILE.parquet [--where COLUMN=VALUE]...

The table is one of inference-sim's experiments (as `validation.compare` takes it). Of each model and number of GPUs,
runs that were not overloaded are simulated once: how the busy time is shared among kinds of operators and the host, and
how far off the mean time per token is. Prints YAML, one line per model and number of GPUs, and the spread of
ln(measured / predicted) over all of them on stderr. Runs of one model are no independent observations: they share
kernels and shapes, so they count as one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.metrics.result import Result
from perfsim.run import simulate
from perfsim.uncertainty.bands import PART_OF_HOST, WITHOUT_FACTOR
from perfsim.uncertainty.factors import KIND_OF_COMPONENT
from validation.compare.ask import scenario_of
from validation.compare.facts import InexpressibleError
from validation.compare.isim import question_of
from validation.compare.table import read_table, where

LEAST_SHARE = 0.005


def shares_of(result: Result) -> dict[str, float]:
    """Shares of the busy time by kind of operator and "host"; they sum to one."""
    spent: dict[str, float] = defaultdict(float)
    for component, seconds in result.breakdown.items():
        if component not in WITHOUT_FACTOR:
            spent[PART_OF_HOST.get(component) or KIND_OF_COMPONENT.get(component, "gemm")] += seconds
    busy = sum(spent.values())
    return {part: seconds / busy for part, seconds in spent.items()}


def observations(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[tuple[dict[str, float], float]]]:
    """(shares, ln(measured / predicted time per token)) of every run, by hardware, model and number of GPUs."""
    found = defaultdict(list)
    for row in rows:
        if row["stage_index"] != -1 or row.get("same_run_as") or not row.get("tpot_derived_ms"):
            continue
        if row.get("overloaded"):
            continue
        try:
            result = simulate(scenario_of(question_of(row)))
        except InexpressibleError as missing:
            print(f"{row['experiment']}: {missing}", file=sys.stderr)
            continue
        mean = {name: float(result.metrics[name]["mean"]) for name in ("e2e", "ttft")}
        predicted = 1e3 * (mean["e2e"] - mean["ttft"]) / (row["output_len"] - 1)
        error = math.log(row["tpot_derived_ms"] / predicted)
        print(f"{row['experiment']}: {error:+.3f}", file=sys.stderr, flush=True)
        key = (result.scenario["hardware"]["accelerator"]["name"], str(row["model"]), int(row["tp"]))
        found[key].append((shares_of(result), error))
    return dict(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m validation.observed", description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, required=True, metavar="FILE.parquet")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE")
    options = parser.parse_args(arguments)
    found = observations(where(read_table(options.table), options.where).rows())
    means = []
    for (device, model, tp), runs in sorted(found.items()):
        means.append(float(np.mean([error for _, error in runs])))
        parts = sorted({part for shares, _ in runs for part in shares})
        share = {part: float(np.mean([shares.get(part, 0.0) for shares, _ in runs])) for part in parts}
        text = ", ".join(f"{part}: {value:.3f}" for part, value in share.items() if value >= LEAST_SHARE)
        print(f"  # {model} on {tp} {device}, {len(runs)} runs: ln(measured / predicted) {means[-1]:+.3f} on average")
        print(f"  - {{device: {device}, shares: {{{text}}}}}")
    if means:
        print(f"root of the mean square over models: {math.sqrt(np.mean(np.square(means))):.4f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
