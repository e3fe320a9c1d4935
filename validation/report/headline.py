"""The first tables of the report: errors by table, role and metric, targets, and what of every table is expressed."""

from __future__ import annotations

from collections.abc import Iterator

from validation.report import targets
from validation.report.entries import FITTED, LEFT_OUT, Everything, entries
from validation.report.kernels import WORDS
from validation.report.markdown import MISSING, SUMMARY, cells, percent, table
from validation.report.split import split
from validation.report.store import Results


def render(everything: Everything) -> Iterator[str]:
    """Lines of the section in Markdown."""
    yield "Errors are |predicted / measured - 1|; bias is the mean of predicted / measured - 1, so plus is too slow or"
    yield "too much. *In band* is the share of measured values inside the 5-95% band (right: 90%), *width* the band's"
    yield "median width over the prediction. What was fitted to which rows is in `report/split.yaml`."
    yield ""
    found = list(entries(everything))
    for roles, title in (
        (("kept out",), "### Rows that no fit has seen"),
        ((LEFT_OUT,), "### Groups that were left out of a fit"),
        (FITTED, "### Rows that coefficients were fitted to"),
    ):
        rows = [(one.table, one.rows, one.role, one.metric, *cells(one.found)) for one in found if one.role in roles]
        yield title
        yield ""
        if roles != FITTED:
            rows += [row for row in _kernels(everything) if row[2] == roles[0]]
        if roles[0] == LEFT_OUT:
            yield "What `validation.engines` fits is fitted again without the group; samplers, compilation of kernels"
            yield "and how the client behaves stay as these runs, among others, showed them."
            yield ""
        if rows:
            yield from table(("table", "rows", "role", "metric", *SUMMARY), rows, left=4)
        else:
            yield "None of these tables has been run."
        yield ""
    yield from targets.render(found, everything)
    yield from _expressed(everything)


def _kernels(everything: Everything) -> Iterator[tuple[str, ...]]:
    """Operator curves: medians over curves of the median and 90th percentile on rows that were not fitted."""
    results = everything.get("operators")
    if results is None:
        return
    parts = [("kept out", "shapes not fitted", results["summary"]["held_out"])]
    parts += [(LEFT_OUT, f"{by} left out", found) for by, found in results.get("left_out", {}).items()]
    for role, what, by_kind in parts:
        for kind, found in by_kind.items():
            yield ("operator curves", what, role, f"{WORDS.get(kind, kind)}, time", f"{found['rows']:,}",
                   percent(found["median"]), MISSING, percent(found["p90"]), MISSING, MISSING, MISSING)  # fmt: skip


def _expressed(everything: Everything) -> Iterator[str]:
    """Rows that can be expressed as scenarios, and the most frequent reason of the others."""
    rows = []
    for stem, listed in split().tables.items():
        results = everything.get(listed.section)
        if results is not None:
            rows.append((f"`{stem}`", listed.licence, f"{results['rows']:,}", f"{results['expressible']:,}",
                         _reason(results)))  # fmt: skip
    yield "### What is compared"
    yield ""
    yield from table(("table", "licence", "rows", "expressed", "most frequent reason of the others"), rows, left=2)
    yield ""


def _reason(results: Results) -> str:
    ordered = sorted(results["reasons"].items(), key=lambda item: (-item[1], item[0]))
    return f"{ordered[0][0]} ({ordered[0][1]:,})" if ordered else MISSING
