"""Sections on kernels: fitted operator curves on rows they have not seen, and what carries over to other devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.ops import BACKEND, all_rows
from perfsim.calibrate.rows import Rows
from validation.ops.__main__ import fitted_report, summary, transfer_report
from validation.ops.predict import Compared, compare
from validation.ops.slice import KINDS, path_of, slice_rows
from validation.report.markdown import MISSING, percent, table
from validation.report.plots import Panel, Series, figure, residuals, scatter
from validation.report.store import Results, provenance, stamped

TABLES = ("aic_gemm", "aic_attention_decode", "aic_attention_prefill", "aic_mla", "aic_moe", "collectives")
WORDS = {"gemm": "products", "decode": "decode attention", "prefill": "prefill attention", "moe": "fused experts",
         "collective": "collectives in a node"}  # fmt: skip
# Over which column errors are shown.
AXES = {"gemm": ("m", "rows m of the product"), "decode": ("attended", "attended tokens, all sequences"),
        "prefill": ("context", "context (tokens)"), "moe": ("tokens", "tokens"),
        "collective": ("bytes", "message (bytes)")}  # fmt: skip


def run_whole(data: Path, figures: Path) -> Results:
    """All measured rows, and refits without each device and each architecture."""
    folder = data / "ops"
    groups = all_rows(folder)
    transfers = transfer_report([rows for rows in groups if rows.backend == BACKEND])
    results = _results(groups, figures, "operators")
    results["left_out"] = {by: summary(entries, "") for by, entries in transfers.items()}
    results["left_out_groups"] = {
        by: [{key: value for key, value in entry.items() if key != "errors"} for entry in entries]
        for by, entries in transfers.items()
    }
    return stamped(results, [folder / f"{name}.parquet" for name in TABLES])


def run_slice(figures: Path) -> Results:
    """The committed rows: a few of every group, half of them held out."""
    return stamped(_results(slice_rows(), figures, "operators-slice"), [path_of(kind) for kind in KINDS])


def _results(groups: list[Rows], figures: Path, name: str) -> Results:
    report = fitted_report(groups)
    compared = [found for found in map(compare, groups) if found is not None]
    panels = list(_panels(compared))
    text = figure(panels, label="Fitted operator curves on rows that were not fitted")
    (figures / f"{name}.svg").write_text(text, encoding="utf-8")
    return {
        "rows": sum(map(len, groups)),
        "summary": {key: summary(report, key) for key in ("fitted", "held_out", "cold")},
        "curves": [{key: entry[key] for key in ("kind", "device", "backend", "format", "fitted", "held_out", "cold")}
                   for entry in report],
    }  # fmt: skip


def _panels(compared: list[Compared]) -> Iterator[Panel]:
    """Per kind of kernel, a scatter and the errors over a size, of the rows that no fit saw, by device."""
    for kind in KINDS:
        of_kind = [found for found in compared if found.rows.kind == kind and found.held_out.any()]
        by_device: dict[str, list[Compared]] = {}
        for found in of_kind:
            by_device.setdefault(found.rows.device, []).append(found)
        both = [_series(device, found) for device, found in sorted(by_device.items())]
        yield scatter(WORDS[kind], "µs", [pair[0] for pair in both])
        yield residuals(WORDS[kind], AXES[kind][1], [pair[1] for pair in both])


def _series(device: str, found: list[Compared]) -> tuple[Series, Series]:
    parts = [(one.rows.seconds[one.held_out], one.errors[one.held_out], _size(one.rows)[one.held_out]) for one in found]
    seconds, errors, size = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Series(device, 1e6 * seconds, 1e6 * seconds * (1.0 + errors)), Series(device, size, errors)


def _size(rows: Rows) -> Any:
    name = AXES[rows.kind][0]
    if name == "attended":
        return rows.columns["sequences"] * rows.columns["context"]
    return rows.columns[name]


def render(results: Results, *, name: str) -> Iterator[str]:
    """Lines of a section on operators."""
    yield f"{provenance(results)} {results['rows']:,} rows."
    yield ""
    rows = []
    for kind in KINDS:
        cells = [WORDS[kind]]
        for key in ("fitted", "held_out", "cold"):
            found = results["summary"][key].get(kind)
            cells += [percent(found["median"]), percent(found["p90"])] if found else [MISSING] * 2
        found = results["summary"]["held_out"].get(kind, {"groups": 0, "rows": 0})
        rows.append((*cells, f"{found['groups']:,}", f"{found['rows']:,}"))
    yield from table(("kind", "fitted median", "p90", "not fitted median", "p90", "not in L2 median", "p90", "curves",
                      "rows not fitted"), rows)  # fmt: skip
    yield ""
    if "left_out" in results:
        yield from _left_out(results)
    yield from _by_device(results)
    yield f"![Fitted operator curves on rows that were not fitted](figures/{name}.svg)"
    yield ""


def _left_out(results: Results) -> Iterator[str]:
    yield "Refitted without a device, or without all devices of its architecture, and predicted from its datasheet:"
    yield ""
    rows = []
    for kind in KINDS:
        cells = [WORDS[kind]]
        for by in ("device", "architecture"):
            found = results["left_out"].get(by, {}).get(kind)
            cells += (
                [percent(found["median"]), percent(found["p90"]), f"{found['groups']:,.0f}"] if found else [MISSING] * 3
            )
        rows.append(cells)
    yield from table(("kind", "device left out: median", "p90", "groups", "architecture left out: median", "p90",
                      "groups"), rows)  # fmt: skip
    yield ""
    for by, entries in results["left_out_groups"].items():
        cells = [
            (WORDS[entry["kind"]], entry["device"], entry["format"], *_cells(entry)) for entry in entries if entry["n"]
        ]
        yield f"<details><summary>One {by} left out, group by group</summary>"
        yield ""
        yield from table(("kind", "device", "format", "n", "median", "p90", "median bias"), cells, left=3)
        yield ""
        yield "</details>"
        yield ""


def _by_device(results: Results) -> Iterator[str]:
    """Every curve, on rows that it was not fitted to."""
    cells = []
    for entry in results["curves"]:
        found = entry["held_out"]
        if found["n"]:
            cells.append((WORDS[entry["kind"]], entry["device"], entry["backend"], entry["format"], *_cells(found)))
    yield "<details><summary>Every curve on rows that were not fitted</summary>"
    yield ""
    yield from table(("kind", "device", "kernels", "format", "n", "median", "p90", "median bias"), cells, left=4)
    yield ""
    yield "</details>"
    yield ""


def _cells(found: dict[str, Any]) -> tuple[str, str, str, str]:
    return f"{found['n']:,}", percent(found["median"]), percent(found["p90"]), percent(found["bias"], sign=True)
