"""Sections on kernels: fitted operator curves on rows they have not seen, and what carries over to other devices."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.forms import fit_range
from perfsim.calibrate.ops import all_rows
from perfsim.calibrate.rows import Rows
from validation.ops.__main__ import fitted_report, summary
from validation.ops.predict import Compared, compare
from validation.ops.slice import KINDS, path_of, slice_rows
from validation.ops.transfer import By, LeftOutKind, leave_out
from validation.report.markdown import MISSING, percent, table
from validation.report.plots import Panel, Series, figure, residuals, scatter
from validation.report.store import Results, provenance, stamped

TABLES = ("aic_gemm", "aic_attention_decode", "aic_attention_prefill", "aic_mla", "aic_moe", "aic_quantize",
          "collectives")  # fmt: skip
WORDS = {"gemm": "products", "decode": "decode attention", "prefill": "prefill attention", "moe": "fused experts",
         "collective": "collectives in a node", "stream": "quantisation"}  # fmt: skip
# Over which column errors are shown.
AXES = {"gemm": ("m", "rows m of the product"), "decode": ("attended", "attended tokens, all sequences"),
        "prefill": ("context", "context (tokens)"), "moe": ("tokens", "tokens"),
        "collective": ("bytes", "message (bytes)"), "stream": ("bytes", "bytes moved")}  # fmt: skip
BY: tuple[By, ...] = ("device", "architecture")


def run_whole(data: Path, figures: Path) -> Results:
    """All measured rows, and refits without each device and each architecture."""
    folder = data / "ops"
    groups = all_rows(folder)
    results = _results(groups, figures, "operators")
    errors: dict[str, dict[str, list[np.ndarray]]] = {by: {} for by in BY}
    left_out = {by: leave_out(groups, by=by, seen=errors[by]) for by in BY}
    results["pooled"] |= {by: _pooled(found) for by, found in errors.items()}
    results["left_out"] = {by: _by_kind(cells) for by, cells in left_out.items()}
    results["left_out_groups"] = {by: [asdict(cell) for cell in cells] for by, cells in left_out.items()}
    return stamped(results, [folder / f"{name}.parquet" for name in TABLES])


def run_slice(figures: Path) -> Results:
    """The committed rows: a few of every group, half of them held out."""
    return stamped(_results(slice_rows(), figures, "operators-slice"), slices())


def slices() -> list[Path]:
    """The committed files, one per kind."""
    return [path for path in map(path_of, KINDS) if path.is_file()]


def _by_kind(cells: list[LeftOutKind]) -> dict[str, dict[str, float]]:
    """Per kind: what was left out, rows, and medians over them of the median and the 90th percentile."""
    kinds: dict[str, list[LeftOutKind]] = {}
    for cell in cells:
        kinds.setdefault(cell.kind, []).append(cell)
    return {
        kind: {"groups": len(found), "rows": sum(cell.rows for cell in found),
               "median": float(np.median([cell.median for cell in found])),
               "p90": float(np.median([cell.p90 for cell in found]))}
        for kind, found in kinds.items()
    }  # fmt: skip


def _pooled(errors: dict[str, list[np.ndarray]]) -> dict[str, dict[str, float]]:
    """Per kind, the median absolute error over all rows, every row weighing the same."""
    joined = {kind: np.concatenate(parts) for kind, parts in errors.items()}
    return {kind: {"rows": len(each), "median": float(np.median(np.abs(each)))}
            for kind, each in joined.items() if len(each)}  # fmt: skip


def _results(groups: list[Rows], figures: Path, name: str) -> Results:
    report = fitted_report(groups)
    compared = [found for found in map(compare, groups) if found is not None]
    panels = list(_panels(compared))
    text = figure(panels, label="Fitted operator curves on rows that were not fitted")
    (figures / f"{name}.svg").write_text(text, encoding="utf-8")
    held_out: dict[str, list[np.ndarray]] = {}
    ranges: dict[str, dict[str, int]] = {}
    for found in compared:
        held_out.setdefault(found.rows.kind, []).append(found.errors[found.held_out])
    for rows in groups:
        counts = ranges.setdefault(rows.kind, {"rows": 0, "inside": 0})
        counts["rows"] += len(rows)
        counts["inside"] += len(fit_range(rows))
    return {
        "pooled": {"held_out": _pooled(held_out)}, "ranges": ranges,
        "rows": sum(map(len, groups)),
        "summary": {key: summary(report, key) for key in ("fitted", "held_out", "cold")},
        "curves": [{key: entry[key] for key in ("kind", "device", "backend", "format", "fitted", "held_out", "cold")}
                   for entry in report],
    }  # fmt: skip


def _panels(compared: list[Compared]) -> Iterator[Panel]:
    """Per kind of kernel, a scatter and the errors over a size, of the rows that no fit saw, by device."""
    for kind, word in WORDS.items():
        of_kind = [found for found in compared if found.rows.kind == kind and found.held_out.any()]
        by_device: dict[str, list[Compared]] = {}
        for found in of_kind:
            by_device.setdefault(found.rows.device, []).append(found)
        both = [_series(device, found) for device, found in sorted(by_device.items())]
        if not both:
            continue
        yield scatter(word, "µs", [pair[0] for pair in both])
        yield residuals(word, AXES[kind][1], [pair[1] for pair in both])


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
    for kind in _kinds(results["summary"]["held_out"]):
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
    """Median errors with their bias: kinds against what was left out."""
    for by in BY:
        entries = results["left_out_groups"][by]
        what = "a device" if by == "device" else "all devices of an architecture"
        yield f"Refitted without {what} and predicted from its datasheet: median error (median bias), vLLM's kernels,"
        yield "every row in range."
        yield ""
        names = sorted({entry["name"] for entry in entries})
        found = {(entry["kind"], entry["name"]): entry for entry in entries}
        rows = [(WORDS[kind], *(_short(found.get((kind, name))) for name in names))
                for kind in _kinds({kind for kind, _ in found})]  # fmt: skip
        yield from table(("kind", *names), rows)
        yield ""


def _short(cell: dict[str, Any] | None) -> str:
    return MISSING if cell is None else f"{percent(cell['median'])} ({percent(cell['bias'], sign=True)})"


def _kinds(known: Container[str]) -> list[str]:
    return [kind for kind in WORDS if kind in known]


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
