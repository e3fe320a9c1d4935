"""DeepEP's dispatch and combine as their benchmark times them: on a given number of SMs, warm, on an idle machine.

launch + log2(nodes) hop + the longest of: the bytes over the scale-up links, the bytes over what the kernel's SMs can
copy, the bytes that leave a node over its network cards. `deepep.yaml` holds the coefficients per mode and direction,
pooled over all systems; `python -m validation.compare.deepep --data DIR` fits and writes them. The cost model prices
such exchanges as all-to-alls and has none of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.calibrate.fit import SOFT
from perfsim.spec.yaml import load_yaml
from validation.collectives.predict import network
from validation.collectives.rows import Row, expert_rows, expert_times

FILE = Path(__file__).with_name("deepep.yaml")
HEADER = """\
# DeepEP's kernels in SGLang (ai-dynamo/aiconfigurator@095f58a, Apache-2.0); do not edit: `python -m
# validation.compare.deepep --data DIR` writes this file. Per mode and direction, pooled over H100, H200, B200 and
# GB200: seconds of launch and per doubling of the nodes, shares of the links' and the cards' rate, bytes/s that one SM
# copies and its seconds per row (throughput kernels), rows, median absolute error.
"""
USUAL_SMS = 20.0
SHARPNESS = 6.0  # of the longest of three, rounded where they cross
START = {"launch": 20e-6, "hop": 5e-6, "link": 0.6, "network": 0.6, "sm": 20e9, "row": 1e-7}
BOUNDS = {
    "launch": (1e-6, 2e-4),
    "hop": (1e-7, 1e-4),
    "link": (0.05, 1.0),
    "network": (0.05, 1.0),
    "sm": (1e9, 1e12),
    "row": (1e-9, 1e-5),
}
Floats = NDArray[np.float64]


@cache
def coefficients() -> dict[str, Any]:
    """The file, by mode and direction; empty before the first fit."""
    return load_yaml(FILE) if FILE.is_file() else {}


@dataclass(frozen=True)
class Kernel:
    """How a row ran: on so many SMs (None: those that are free), with so many tokens and experts per token."""

    sms: float | None
    tokens: float
    top: float


def expressed(row: Mapping[str, Any]) -> tuple[list[Row], Kernel]:
    """(dispatch and combine of a row of the table, how they ran); SMs other than the usual are no reason."""
    sms = None if row["mode"] == "low_latency" else float(row["dispatch_sms"] or USUAL_SMS)
    usual = {**row, "dispatch_sms": None if sms is None else USUAL_SMS}
    return list(expert_rows(expert_times([usual]))), Kernel(sms, float(row["num_token"]), float(row["num_topk"]))


def bound_seconds(row: Row, kernel: Kernel) -> tuple[float, float, float, float, float]:
    """(log2 of the nodes, seconds at the links' rate, bytes and rows per SM, seconds at the cards' rate).

    SMs read every token once and write a copy per GPU that gets it, their own included.
    """
    path, group = network(row.node, row.nodes).path(row.work.group, stride=row.work.stride), float(row.work.group)
    inside = float(row.work.bytes) * (group - 1.0) / group
    leaving = row.work.across_bytes
    across = float(row.work.bytes) * (row.nodes - 1) / row.nodes if leaving is None else float(leaving)
    cards = across / path[-1].spread if row.nodes > 1 else 0.0
    one = row.published_bytes / (kernel.tokens * kernel.top)
    copied = float(row.work.bytes) + kernel.tokens * one
    sms = kernel.sms or float("inf")
    return log2(row.nodes), inside / path[0].spread, copied / sms, copied / one / sms, cards


def seconds(values: Mapping[str, float], columns: Floats) -> Floats:
    """The formula over rows of `bound_seconds`."""
    doublings, link, per_sm, rows, cards = columns.T
    copying = per_sm / values.get("sm", 1.0) + rows * values.get("row", 0.0)
    parts = np.stack([link / values["link"], copying, cards / values["network"]])
    longest = np.sum((parts / 1e-6) ** SHARPNESS, axis=0) ** (1.0 / SHARPNESS) * 1e-6
    result: Floats = values["launch"] + values["hop"] * doublings + longest
    return result


def predicted(row: Row, kernel: Kernel) -> float | None:
    """Seconds of one dispatch or combine; None where nothing was fitted."""
    found = coefficients().get(_mode(row), {}).get(row.work.name)
    return None if found is None else float(seconds(found, np.array([bound_seconds(row, kernel)]))[0])


def _mode(row: Row) -> str:
    return row.backend.removeprefix("deepep ")


def fit(columns: Floats, measured: Floats) -> tuple[dict[str, float], float]:
    """(coefficients, median absolute error) by soft-L1 relative errors over logarithms."""
    from scipy.optimize import least_squares

    low, high = (np.log([bounds[at] for bounds in BOUNDS.values()]) for at in (0, 1))

    def errors(logs: Floats) -> Floats:
        result: Floats = np.log(seconds(dict(zip(START, np.exp(logs), strict=True)), columns) / measured)
        return result

    found = least_squares(errors, np.log(list(START.values())), bounds=(low, high), loss="soft_l1", f_scale=SOFT)
    values = {name: float(value) for name, value in zip(START, np.exp(found.x), strict=True)}
    return values, float(np.median(np.abs(np.expm1(errors(found.x)))))


def document(table: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Lines of the file, fitted to all rows of a table."""
    groups: dict[tuple[str, str], list[tuple[tuple[float, ...], float]]] = {}
    for entry in table:
        rows, kernel = expressed(entry)
        for row in rows:
            groups.setdefault((_mode(row), row.work.name), []).append((bound_seconds(row, kernel), row.seconds))
    yield HEADER.rstrip("\n")
    before = ""
    for (mode, direction), each in sorted(groups.items()):
        if mode != before:
            yield f"{mode}:"
            before = mode
        known = START if mode == "normal" else START.keys() - {"sm", "row"}  # low-latency kernels use whatever is free
        values, error = fit(np.array([columns for columns, _ in each]), np.array([taken for _, taken in each]))
        numbers = ", ".join(f"{name}: {value:.4g}" for name, value in values.items() if name in known)
        yield f"  {direction}: {{{numbers}, rows: {len(each)}, median: {error:.3f}}}"


def main(arguments: list[str] | None = None) -> int:
    """Fit the table and write the file."""
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(prog="python -m validation.compare.deepep", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of aic_deepep.parquet")
    table = pq.read_table(parser.parse_args(arguments).data / "aic_deepep.parquet").to_pylist()
    FILE.write_text("\n".join(document(table)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
