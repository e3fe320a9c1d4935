"""Sections on collectives: within a node and between nodes, by operation and machine, from `validation.collectives`."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp
from pathlib import Path
from typing import Any

import numpy as np

from validation.collectives.compare import LARGE, SMALL, Compared, compare
from validation.collectives.rows import MEASURED, Row, all_rows, slice_rows
from validation.report.markdown import MISSING, percent, table
from validation.report.plots import Series, figure, residuals
from validation.report.store import Results, provenance, stamped

TABLES = ("collectives", "collectives_more", "aic_deepep")
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
    groups = compare(rows, curves=True)
    operations = sorted({operation for operation, *_ in groups})
    panels = []
    for operation in operations:
        for where in ("one node", "several nodes"):
            by_node: dict[str, list[Compared]] = {}
            for (kind, node, nodes, _), found in groups.items():
                if kind == operation and (nodes == 1) == (where == "one node"):
                    by_node.setdefault(node, []).extend(found)
            series = [Series(node, np.array([one.row.published_bytes for one in found]),
                             np.array([exp(one.error) - 1.0 for one in found]))
                      for node, found in sorted(by_node.items())]  # fmt: skip
            if series:
                panels.append(residuals(f"{operation}, {where}", "message (bytes)", series))
    text = figure(panels, label="Errors of collectives over message size")
    (figures / f"{name}.svg").write_text(text, encoding="utf-8")
    return {"rows": len(rows), "groups": [
        {"operation": operation, "node": node, "nodes": nodes, "backend": backend, **_group(found)}
        for (operation, node, nodes, backend), found in groups.items()
    ]}  # fmt: skip


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
    """Lines of a section: medians over machines and backends by operation, then every group."""
    yield f"{provenance(results)} {results['rows']:,} rows, fitted ones and others. Small is up to 64 KiB, large from"
    yield "16 MiB; ratios are medians of predicted over measured time."
    yield ""
    head = ("n", "median error", "p90", *BANDS, "measured beats the bound")
    rows = []
    for operation in dict.fromkeys(group["operation"] for group in results["groups"]):
        for inside in (True, False):
            same = [one for one in results["groups"] if one["operation"] == operation and (one["nodes"] == 1) == inside]
            if same:
                cells = [_ratio(_middle([one["ratios"][band] for one in same])) for band in BANDS]
                rows.append((operation, "one node" if inside else "several nodes", f"{sum(one['n'] for one in same):,}",
                             percent(_middle([one["median"] for one in same])),
                             percent(_middle([one["p90"] for one in same])), *cells,
                             str(sum(one["faster_than_light"] for one in same))))  # fmt: skip
    yield "Medians over machines and backends:"
    yield ""
    yield from table(("operation", "where", *head), rows, left=2)
    yield ""
    yield "<details><summary>Every machine and backend</summary>"
    yield ""
    every = [(one["operation"], one["node"], str(one["nodes"]), one["backend"], f"{one['n']:,}", percent(one["median"]),
              percent(one["p90"]), *(_ratio(one["ratios"][band]) for band in BANDS),
              str(one["faster_than_light"])) for one in results["groups"]]  # fmt: skip
    yield from table(("operation", "node", "nodes", "backend", *head), every, left=4)
    yield ""
    yield "</details>"
    yield ""
    yield f"![Errors of collectives over message size](figures/{name}.svg)"
    yield ""


def _middle(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"
