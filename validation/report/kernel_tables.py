"""Every table of kernels and exchanges as `validation.compare` prices it: one line per metric."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from validation.compare.kinds import kind_of
from validation.compare.table import read_table
from validation.report.markdown import SUMMARY, cells, table
from validation.report.served import summaries
from validation.report.split import split
from validation.report.store import Results, provenance, stamped


def paths(data: Path) -> list[Path]:
    """The tables that `split.yaml` lists, where they lie."""
    return [data / "ops" / f"{stem}.parquet" for stem in split().kernels]


def run(data: Path) -> Results:
    """Compare all of them; no figures."""
    tables: dict[str, Any] = {}
    for path in paths(data):
        print(f"kernel tables: {path.stem}", file=sys.stderr)
        found = read_table(path)
        kept, outcome = kind_of(found).compare(found)
        everything = np.ones(len(kept), dtype=bool)
        expressible = sum(reason is None for reason in outcome.reasons)
        tables[path.stem] = {
            "rows": len(kept), "expressible": expressible,
            "metrics": summaries(outcome, sorted(outcome.values), everything),
        }  # fmt: skip
    return stamped({"rows": sum(one["rows"] for one in tables.values()), "kernels": tables}, paths(data))


def render(results: Results) -> Iterator[str]:
    """Lines of the section in Markdown."""
    yield "### All tables of kernels"
    yield ""
    yield f"{provenance(results)} Every row of every table, fitted or not, small or large, as"
    yield "`python -m validation.compare` predicts it, under the conditions of its benchmark where these are known."
    yield ""
    rows = []
    for stem, found in results["kernels"].items():
        entry = split().kernels[stem]
        for metric, values in found["metrics"].items():
            shown = f"{found['expressible']:,} of {found['rows']:,}"
            rows.append((f"`{stem}`", f"{entry.role}: {entry.why}", metric, shown, *cells(values)[:-2]))
    yield from table(("table", "rows", "metric", "expressed", *SUMMARY[:-2]), rows, left=3)
    yield ""
