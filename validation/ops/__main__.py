"""Errors of the operator curves: `python -m validation.ops [--data DIR] [--transfer] [--device] [--architecture]`.

Without `--data` the committed slice is used. Errors are absolute relative ones, in percent. "held out" rows belong to
the quarter of shapes that no fit saw; "cold" rows are those of them that the L2 cache cannot hold. `--transfer` refits
without each device and without each architecture, and predicts what was left out from its datasheet. `--device` and
`--architecture` print nothing but one table each of that: kinds against what was left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.ops import BACKEND, all_rows
from perfsim.calibrate.rows import Rows
from perfsim.calibrate.transfer import Transfer, left_out
from perfsim.errors import InputError
from validation.ops.predict import Compared, compare
from validation.ops.slice import slice_rows
from validation.ops.transfer import By, leave_out
from validation.ops.transfer import show as show_left_out

WORST = 3


def statistics(errors: np.ndarray) -> dict[str, float]:
    """Count, median and 90th percentile of absolute errors, and the median signed one."""
    if not len(errors):
        return {"n": 0}
    absolute = np.abs(errors)
    return {
        "n": len(errors), "median": float(np.median(absolute)), "p90": float(np.quantile(absolute, 0.9)),
        "bias": float(np.median(errors)),
    }  # fmt: skip


def fitted_report(groups: Iterable[Rows]) -> list[dict[str, Any]]:
    """One entry per device, backend, kind and format that has a curve."""
    report = []
    for rows in groups:
        found = compare(rows)
        if found is not None:
            report.append({
                "kind": rows.kind, "device": rows.device, "backend": f"{rows.backend} {rows.version}",
                "format": rows.format, "fitted": statistics(found.errors[~found.held_out]),
                "held_out": statistics(found.errors[found.held_out]),
                "cold": statistics(found.errors[found.held_out & found.cold]), "worst": worst(found),
            })  # fmt: skip
    return sorted(report, key=lambda entry: (entry["kind"], entry["backend"], entry["device"], entry["format"]))


def worst(found: Compared) -> list[str]:
    """The shapes that were not fitted with the largest median error."""
    shapes = np.unique(found.rows.shape[found.held_out])
    medians = [(float(np.median(np.abs(found.errors[found.rows.shape == shape]))), str(shape)) for shape in shapes]
    return [f"{shape}: {100 * median:.0f}%" for median, shape in sorted(medians, reverse=True)[:WORST]]


def transfer_report(groups: list[Rows]) -> dict[str, list[dict[str, Any]]]:
    """Errors on whatever was left out, by kind, device and format."""

    def entry(found: Transfer) -> dict[str, Any]:
        rows = found.rows
        return {"kind": rows.kind, "device": rows.device, "backend": rows.backend, "format": rows.format,
                "errors": found.errors, **statistics(found.errors)}  # fmt: skip

    return {
        by: sorted(
            (entry(found) for found in left_out(groups, by)), key=lambda e: (e["kind"], e["backend"], e["device"])
        )
        for by in ("device", "architecture")
    }


def summary(entries: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Per kind: groups, the median over groups of their medians and of their 90th percentiles."""
    kinds = sorted({entry["kind"] for entry in entries})
    found: dict[str, dict[str, float]] = {}
    for kind in kinds:
        cells = [entry[key] if key else entry for entry in entries if entry["kind"] == kind]
        cells = [cell for cell in cells if cell["n"]]
        found[kind] = {
            "groups": len(cells), "rows": sum(cell["n"] for cell in cells),
            "median": float(np.median([cell["median"] for cell in cells])),
            "p90": float(np.median([cell["p90"] for cell in cells])),
        }  # fmt: skip
    return found


def _cell(cell: dict[str, float]) -> str:
    return f"{100 * cell['median']:6.1f}{100 * cell['p90']:6.0f}{cell['n']:7d}" if cell["n"] else " " * 19


def show(report: list[dict[str, Any]], transfers: dict[str, list[dict[str, Any]]]) -> None:
    """Print the tables."""
    print(f"{'kind':8}{'device':28}{'kernels':20}{'format':10}{'fitted: median p90 n':>20}{'held out':>19}{'cold':>19}")
    for entry in report:
        print(f"{entry['kind']:8}{entry['device']:28}{entry['backend']:20}{entry['format']:10} "
              f"{_cell(entry['fitted'])}{_cell(entry['held_out'])}{_cell(entry['cold'])}  "
              f"{'; '.join(entry['worst'])}")  # fmt: skip
    for key in ("fitted", "held_out", "cold"):
        print(f"\nmedians over groups, {key.replace('_', ' ')}:")
        _show_summary(summary(report, key))
    for by, entries in transfers.items():
        print(f"\nleave one {by} out:")
        for entry in entries:
            print(f"{entry['kind']:8}{entry['device']:28}{entry['backend']:10}{entry['format']:10} {_cell(entry)}"
                  f"  bias {100 * entry['bias']:+.0f}%")  # fmt: skip
        _show_summary(summary(entries, ""))


def _show_summary(found: dict[str, dict[str, float]]) -> None:
    for kind, cell in found.items():
        print(f"  {kind:8}{cell['groups']:4.0f} groups {cell['rows']:9,.0f} rows   median {100 * cell['median']:5.1f}%"
              f"   p90 {100 * cell['p90']:5.1f}%")  # fmt: skip


def _print_left_out(groups: list[Rows], chosen: list[By], style: str) -> int:
    tables = {by: leave_out(groups, by=by) for by in chosen}
    if style == "json":
        print(json.dumps({by: [asdict(cell) for cell in table] for by, table in tables.items()}, indent=1))
        return 0
    for by, table in tables.items():
        show_left_out(table, by=by)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m validation.ops", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the aic_*.parquet tables; else the committed slice")
    parser.add_argument("--transfer", action="store_true", help="leave devices and architectures out, too")
    parser.add_argument("--device", action="store_true", help="a table of kinds against devices left out, only")
    parser.add_argument("--architecture", action="store_true", help="the same of architectures")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args(arguments)
    try:
        groups = all_rows(options.data) if options.data else slice_rows()
        chosen: list[By] = [by for by in ("device", "architecture") if getattr(options, by)]
        if chosen:
            return _print_left_out(groups, chosen, options.format)
        report = fitted_report(groups)
        transfers = transfer_report([g for g in groups if g.backend == BACKEND]) if options.transfer else {}
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if options.format == "table":
        show(report, transfers)
        return 0
    plain = {by: [{k: v for k, v in e.items() if k != "errors"} for e in entries] for by, entries in transfers.items()}
    print(json.dumps({"curves": report, "left_out": plain}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
