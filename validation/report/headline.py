"""The first tables of the report: errors by table, role and metric, targets, and what of every table is expressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from validation.report.kernels import WORDS
from validation.report.markdown import MISSING, SUMMARY, cells, percent, table
from validation.report.split import ALL, Listed, Target, split
from validation.report.store import Results

Everything = Mapping[str, Results]
STATISTIC = {"mape_mean": "mean", "mape_median": "median", "mape_p90": "p90"}
LEFT_OUT = "leave one out"
COVERED, FEWEST = (0.85, 0.95), 20  # what 90% bands should cover, where there are as many values


@dataclass(frozen=True, slots=True)
class Entry:
    """A metric of some rows of a table: their role, which they are, the summary, and the bound that it should keep."""

    table: str
    rows: str
    role: str
    metric: str
    found: Mapping[str, Any]
    target: Target | None


def entries(everything: Everything) -> Iterator[Entry]:
    """All metrics that were compared, tables in the order of split.yaml: all rows of a role, or those of subsets.

    Sections that refit without a group and predict it add what they found to a table's rows: their results have a list
    "leave one out" of {"section": of the table, "rows": a subset or "all", "metrics": {name: summary}}.
    """
    for listed in split().tables.values():
        results = everything.get(listed.section)
        if results is None:
            continue
        for subset in listed.headline:
            found = results["roles"] if subset == ALL else results["subsets"].get(subset, {})
            yield from _entries(listed, subset, found)
        for other in everything.values():
            for left in other.get(LEFT_OUT, ()):
                if left["section"] == listed.section:
                    yield from _entries(listed, left["rows"], {LEFT_OUT: left["metrics"]})


def _entries(listed: Listed, subset: str, by_role: Mapping[str, Mapping[str, Any]]) -> Iterator[Entry]:
    targets = {target.metric: target for target in listed.targets if (target.subset or ALL) == subset}
    for role, found in by_role.items():
        for name, title in listed.metrics.items():
            if name in found:
                yield Entry(listed.short, subset, role, title, found[name], targets.get(name))


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
        (("fitted",), "### Rows that coefficients were fitted to"),
    ):
        rows = [(one.table, one.rows, one.role, one.metric, *cells(one.found)) for one in found if one.role in roles]
        yield title
        yield ""
        if roles[0] != "fitted":
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
    yield from _targets(found, everything)
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


def _targets(found: list[Entry], everything: Everything) -> Iterator[str]:
    """What we want to reach, and whether it was."""
    rows = []
    for one in found:
        if one.target is not None:
            value = one.found[one.target.statistic]
            bound = f"{STATISTIC[one.target.statistic]} ≤ {percent(one.target.at_most)}"
            met = "met, on fitted rows" if one.role == "fitted" else "met"
            rows.append((one.table, one.rows, one.role, one.metric, bound, percent(value),
                         met if value <= one.target.at_most else "**missed**"))  # fmt: skip
    rows += _covered(found)
    parts = (("shapes not fitted", "kept out", "held_out", 0.05), ("device left out", LEFT_OUT, "device", 0.12))
    for what, what_role, key, limit in parts:
        results = everything.get("operators", {})
        by_kind = results.get("summary", {}).get(key) or results.get("left_out", {}).get(key) or {}
        for kind, values in by_kind.items():
            met = "met" if values["median"] <= limit else "**missed**"
            rows.append(("operator curves", what, what_role, WORDS.get(kind, kind), f"median ≤ {percent(limit)}",
                         percent(values["median"]), met))  # fmt: skip
    yield "### Targets"
    yield ""
    yield "Where rows of several roles are listed, those that no fit has seen are the ones that count."
    yield ""
    yield from table(("table", "rows", "role", "metric", "target", "reached", ""), rows, left=4)
    yield ""


def _covered(found: list[Entry]) -> Iterator[tuple[str, ...]]:
    """Whether bands are honest on rows that no fit has seen."""
    low, high = COVERED
    for one in found:
        share = one.found["coverage_90"]
        if one.role != "fitted" and share is not None and one.found["n"] >= FEWEST:
            yield (one.table, one.rows, one.role, f"{one.metric}, in band", f"{low:.0%} to {high:.0%}", f"{share:.0%}",
                   "met" if low <= share <= high else "**missed**")  # fmt: skip


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
