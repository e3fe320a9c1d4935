"""What we want to reach, and whether it was: of served runs, of bands, and of operator curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from validation.report.entries import FITTED, LEFT_OUT, Entry, Everything
from validation.report.kernels import WORDS
from validation.report.markdown import MISSING, error, percent, table
from validation.report.split import ALL, split

STATISTIC = {"mape_mean": "mean", "mape_median": "median", "mape_p90": "p90"}
COVERED, FEWEST = (0.85, 0.95), 20  # what 90% bands should cover, where there are as many values
HALF = 0.005  # what rounding to whole percents may hide
Which = Literal["held_out", "device"]
PARTS: tuple[tuple[Which, str, str, str], ...] = (
    ("held_out", "shapes not fitted", "kept out", "curves"), ("device", "device left out", LEFT_OUT, "devices"),
)  # fmt: skip
MISSED, ABSENT = "**missed**", "**no data**"


def render(found: Sequence[Entry], everything: Everything) -> Iterator[str]:
    """Lines of the section in Markdown."""
    rows = [_judged(one, one.target.statistic, one.target.at_most) for one in found if one.target is not None]
    rows += [*_absent(found, everything), *_covered(found), *_operators(everything)]
    yield "### Targets"
    yield ""
    yield "Where rows of several roles are listed, those that no fit has seen are the ones that count."
    yield ""
    yield from table(("table", "rows", "role", "metric", "target", "reached", ""), rows, left=4)
    yield ""
    yield from _medians(everything)


def _judged(one: Entry, statistic: str, at_most: float) -> tuple[str, ...]:
    """A row; what was rounded to whole percents has met a bound only if no rounding can have helped it."""
    met = one.found[statistic] + (HALF if one.found.get("coarse") else 0.0) <= at_most
    good = "met, on fitted rows" if one.role in FITTED else "met"
    return (one.table, one.rows, one.role, one.metric, f"{STATISTIC[statistic]} ≤ {percent(at_most)}",
            error(one.found, statistic), good if met else MISSED)  # fmt: skip


def _absent(found: Sequence[Entry], everything: Everything) -> Iterator[tuple[str, ...]]:
    """Targets that nothing was held against: no row has a measured value, or the section was not run since."""
    held = {(one.table, one.rows, one.metric) for one in found if one.target is not None}
    for listed in split().tables.values():
        results = everything.get(listed.section)
        for target in listed.targets:
            subset, metric = target.subset or ALL, listed.metrics[target.metric]
            if (listed.short, subset, metric) in held:
                continue
            run = results is not None and (subset == ALL or subset in results["subsets"])
            yield (listed.short, subset, MISSING, metric, f"{STATISTIC[target.statistic]} ≤ {percent(target.at_most)}",
                   MISSING, ABSENT if run else "not run yet")  # fmt: skip


def _covered(found: Sequence[Entry]) -> Iterator[tuple[str, ...]]:
    """Whether bands are honest on rows that no fit has seen."""
    low, high = COVERED
    for one in found:
        share = one.found["coverage_90"]
        if one.role not in FITTED and share is not None and one.found["n"] >= FEWEST:
            yield (one.table, one.rows, one.role, f"{one.metric}, in band", f"{low:.0%} to {high:.0%}", f"{share:.0%}",
                   "met" if low <= share <= high else MISSED)  # fmt: skip


def _operators(everything: Everything) -> Iterator[tuple[str, ...]]:
    for which, what, role, units in PARTS:
        limit = split().operators[which]
        for kind, cells in _cells(everything.get("operators"), which).items():
            middle = _summary(everything["operators"], which)[kind]["median"]
            kept = sum(cell["median"] <= limit for cell in cells)
            judged = "met in the median" if middle <= limit else MISSED
            yield ("operator curves", what, role, WORDS.get(kind, kind), f"median of {units} ≤ {percent(limit)}",
                   percent(middle), f"{judged} ({kept} of {len(cells)} {units} keep it)")  # fmt: skip


def _summary(results: dict[str, Any], which: Which) -> dict[str, Any]:
    found: dict[str, Any] = results["summary"][which] if which == "held_out" else results.get("left_out", {})[which]
    return found


def _cells(results: dict[str, Any] | None, which: Which) -> dict[str, list[dict[str, Any]]]:
    """The median errors by kind, one per curve or per device that was left out."""
    if results is None or (which == "device" and which not in results.get("left_out", {})):
        return {}
    kinds = _summary(results, which)
    if which == "device":
        return {kind: [cell for cell in results["left_out_groups"][which] if cell["kind"] == kind] for kind in kinds}
    curves = [{**entry, **entry[which]} for entry in results["curves"]]
    return {kind: [cell for cell in curves if cell["kind"] == kind and cell["n"]] for kind in kinds}


def _medians(everything: Everything) -> Iterator[str]:
    """What stands behind the medians of operator curves, beside the targets that they are held against."""
    results = everything.get("operators")
    if results is None:
        return
    yield "Targets of operator curves are held against a median of medians: every curve (a kind of kernel in one format"
    yield "of one engine on one device), or every device that was left out, has the median error of its rows, and the"
    yield "middle one of these is judged, so that half of them may miss. Only rows *inside the range* that a curve"
    yield "describes take part, in fits as in errors: sides n and k of a product from 256; attention with heads of 64,"
    yield "128 or 256, at most 16 query heads per K/V head, contexts from 128 (prefill: new tokens from 128) and, where"
    yield "vLLM runs FlashAttention-2, no decodes with a window or one query head per K/V head; experts on one rank. A"
    yield "simulation may ask for what lies outside, and nothing here says how far off that is. *All rows alike* is the"
    yield "median over all rows inside the range, *rows inside* their share of the rows of the newest kernels. A device"
    yield "that is left out often has a sibling: H100 and H200, and B200 and GB200, stand in for each other."
    yield ""
    pooled, ranges = results.get("pooled", {}), results.get("ranges", {})
    rows = []
    for which, what, _, units in PARTS:
        limit = split().operators[which]
        for kind, cells in _cells(results, which).items():
            above = [cell for cell in cells if cell["median"] > limit]
            inside = ranges.get(kind) if which == "held_out" else None
            names = (
                ", ".join(f"{cell['name']} {percent(cell['median'])}" for cell in above) if which == "device" else ""
            )
            rows.append((
                WORDS.get(kind, kind), what, f"{len(above)} of {len(cells)} {units} above {percent(limit)}",
                names or MISSING, percent(_summary(results, which)[kind]["median"]),
                percent(pooled.get(which, {}).get(kind, {}).get("median")),
                MISSING if inside is None else f"{inside['inside'] / inside['rows']:.0%}",
            ))  # fmt: skip
    head = ("kind", "rows", "above the target", "which", "median of medians", "all rows alike", "rows inside")
    yield from table(head, rows, left=4)
    yield ""
