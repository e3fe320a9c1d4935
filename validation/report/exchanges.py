"""Sections on collectives: within a node and between nodes, by operation and machine, from `validation.collectives`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from validation.collectives.compare import LARGE, SMALL, Compared, compare
from validation.collectives.rows import MEASURED, Row, all_rows, slice_rows
from validation.compare.exchanges import deepep_seconds, library_seconds
from validation.report.markdown import MISSING, percent, table
from validation.report.plots import Series, figure, residuals
from validation.report.store import Results, provenance, stamped

TABLES = ("collectives", "collectives_more", "aic_deepep")
WHERE = ("one node", "several nodes")
BANDS = ("small", "middle", "large")
SLICES = ("collectives.csv", "expert-dispatch.csv")


def run_whole(data: Path, figures: Path) -> Results:
    """All measured rows."""
    folder = data / "ops"
    return stamped(_results(all_rows(folder), figures, "collectives"), [folder / f"{name}.parquet" for name in TABLES])


def run_slice(figures: Path) -> Results:
    """The committed rows."""
    return stamped(_results(slice_rows(), figures, "collectives-slice"), [MEASURED / name for name in SLICES])


def _results(rows: list[Row], figures: Path, name: str) -> Results:
    groups = {key: [_by_library(one) for one in found] for key, found in compare(rows).items()}
    operations = sorted({operation for operation, *_ in groups})
    panels = []
    for operation in operations:
        for where in WHERE:
            by_node: dict[str, list[Compared]] = {}
            for (kind, node, nodes, _), found in groups.items():
                if kind == operation and WHERE[nodes > 1] == where:
                    by_node.setdefault(node, []).extend(found)
            series = [Series(node, np.array([one.row.published_bytes for one in found]),
                             np.array([exp(one.error) - 1.0 for one in found]))
                      for node, found in sorted(by_node.items())]  # fmt: skip
            if series:
                panels.append(residuals(f"{operation}, {where}", "message (bytes)", series))
    text = figure(panels, label="Errors of collectives over message size")
    (figures / f"{name}.svg").write_text(text, encoding="utf-8")
    pooled: dict[tuple[str, str], list[Compared]] = {}
    for (operation, _, nodes, _), found in groups.items():
        pooled.setdefault((operation, WHERE[nodes > 1]), []).extend(found)
    return {
        "rows": len(rows),
        "operations": [{"operation": operation, "where": where, **_group(found)}
                       for (operation, where), found in sorted(pooled.items())],
        "groups": [{"operation": operation, "node": node, "nodes": nodes, "backend": backend, **_group(found)}
                   for (operation, node, nodes, backend), found in groups.items()],
    }  # fmt: skip


def _by_library(one: Compared) -> Compared:
    """By the curves of the library that ran it, DeepEP's kernels by their own, as in a simulation that says so."""
    if one.row.backend.startswith("deepep"):
        return replace(one, prediction=replace(one.prediction, seconds=deepep_seconds(one.row)))
    return replace(one, prediction=replace(one.prediction, seconds=library_seconds(one.row)))


def _group(found: list[Compared]) -> dict[str, Any]:
    """Errors |predicted / measured - 1|, and the median of predicted / measured by size."""
    ratio = np.array([exp(one.error) for one in found])
    size = np.array([one.row.published_bytes for one in found])
    bands = {"small": size <= SMALL, "middle": (size > SMALL) & (size < LARGE), "large": size >= LARGE}
    error = np.abs(ratio - 1.0)
    return {
        "n": len(found), "median": float(np.median(error)), "p90": float(np.quantile(error, 0.9)),
        "ratios": {band: float(np.median(ratio[mask])) if mask.any() else None for band, mask in bands.items()},
        "faster_than_light": sum(one.row.seconds < one.prediction.bound for one in found),
    }  # fmt: skip


def render(results: Results, *, name: str) -> Iterator[str]:
    """Lines of a section: by operation, then by machine and backend."""
    yield f"{provenance(results)} {results['rows']:,} rows, fitted ones and others. Small is up to 64 KiB, large from"
    yield "16 MiB; ratios are medians of predicted over measured time. Eager launches are priced as if in a graph,"
    yield "DeepEP's dispatch and combine by its own kernels' law, as in a simulation whose policy names them."
    yield ""
    head = ("n", "median error", "p90", *BANDS, "measured beats the bound")
    yield from table(("operation", "where", *head), [
        (one["operation"], one["where"], *_cells(one)) for one in results["operations"]
    ], left=2)  # fmt: skip
    yield ""
    yield "<details><summary>Every machine and backend</summary>"
    yield ""
    every = [(one["operation"], one["node"], str(one["nodes"]), one["backend"], *_cells(one))
             for one in results["groups"]]  # fmt: skip
    yield from table(("operation", "node", "nodes", "backend", *head), every, left=4)
    yield ""
    yield "</details>"
    yield ""
    yield f"![Errors of collectives over message size](figures/{name}.svg)"
    yield ""


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    ratios = (_ratio(one["ratios"][band]) for band in BANDS)
    return f"{one['n']:,}", percent(one["median"]), percent(one["p90"]), *ratios, str(one["faster_than_light"])


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
