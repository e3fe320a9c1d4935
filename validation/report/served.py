"""Sections of tables that `validation.compare` understands: errors by role and group, plots, reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from validation.compare.kinds import kind_of
from validation.compare.outcome import Outcome, Values, report, summary
from validation.compare.table import Table, read_table
from validation.compare.values import value_text
from validation.report.markdown import MISSING, SUMMARY, cells, table
from validation.report.plots import Panel, Series, figure, residuals, scatter
from validation.report.split import ALL, Listed, Plot, meeting, roles, split
from validation.report.store import Results, provenance, stamped
from validation.report.twins import SEEN, with_twins

MOST_REASONS = 8
# Of a table whose values may not be published: below MANY rows a summary is coarse, below FEWEST there is none. The
# median of a few rows is the error of one of them, and perfsim's own prediction would then tell what was measured.
FEWEST, MANY = 3, 10
WORST_GROUPS = 12  # of a column with more values


def run(stem: str, path: Path, figures: Path, *, section: str | None = None, twins: Path | None = None) -> Results:
    """Compare the table at `path` as `split.yaml` lists it under `stem`, and write its figure as that of `section`.

    `twins` is the table that holds some of these runs as well.
    """
    listed = split().tables[stem]
    found = read_table(path)
    kept, outcome = kind_of(found).compare(found)
    results = summarised(kept, outcome, listed, twins=None if twins is None else read_table(twins))
    panels = list(_panels(kept, outcome, listed))
    if panels:
        text = figure(panels, label=listed.title)
        (figures / f"{section or listed.section}.svg").write_text(text, encoding="utf-8")
    if listed.publish == "residuals":
        results = {name: coarse(value) for name, value in results.items()}
    return stamped({**results, "figure": bool(panels)}, [path] if twins is None else [path, twins])


def coarse(value: Any) -> Any:
    """Summaries of fewer than `MANY` rows to a hundredth and marked so, and none of fewer than `FEWEST`."""
    if not isinstance(value, dict):
        return value
    count = value.get("n", MANY)
    if count < MANY:
        small = {key: round(one, 2) if isinstance(one, float) else one for key, one in value.items()}
        return {**small, "coarse": True}
    kept = {
        key: coarse(one) for key, one in value.items() if not isinstance(one, dict) or one.get("n", FEWEST) >= FEWEST
    }
    return {key: one for key, one in kept.items() if one != {} or value[key] == {}}


def summarised(kept: Table, outcome: Outcome, listed: Listed, *, twins: Table | None = None) -> Results:
    """Rows, reasons, and summaries of the headline metrics by role and by the columns that `listed` names."""
    whole = report(kept, outcome, name=kept.path.name)
    of_row, counts = roles(kept, listed), None
    if twins is not None:
        of_row, counts = with_twins(of_row, kept, twins, listed)
    by_role = {role: summaries(outcome, listed.metrics, of_row == role) for role in sorted(set(of_row.tolist()))}
    subsets: dict[str, dict[str, Any]] = {}
    for name, conditions in listed.subsets.items():
        mask = _mask(kept, conditions)
        found = {role: summaries(outcome, listed.metrics, mask & (of_row == role)) for role in by_role}
        subsets[name] = {role: metrics for role, metrics in found.items() if metrics}
    groups = {
        column: {value: {name: found[name] for name in listed.metrics if name in found}
                 for value, found in whole["groups"][column].items()}
        for column in listed.groups if column in whole["groups"]
    }  # fmt: skip
    return {
        "rows": whole["rows"], "expressible": whole["expressible"], "reasons": whole["not_expressible"],
        "roles": {role: found for role, found in by_role.items() if found}, "subsets": subsets, "groups": groups,
        **({} if counts is None else {"twins": counts}),
    }  # fmt: skip


def summaries(outcome: Outcome, metrics: Iterable[str], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Summaries of the metrics that have pairs on the rows of `mask`, bool[rows]."""
    found = {}
    for metric in metrics:
        values = outcome.values.get(metric)
        chosen = None if values is None else values.take(values.usable & mask[values.rows])
        if chosen is not None and len(chosen.rows):
            found[metric] = summary(chosen)
    return found


def _mask(kept: Table, conditions: Sequence[str]) -> NDArray[np.bool_]:
    mask = np.zeros(len(kept), dtype=bool)
    mask[meeting(kept, conditions)] = True
    return mask


def _panels(kept: Table, outcome: Outcome, listed: Listed) -> Iterator[Panel]:
    for plot in listed.plots:
        if plot.kind == "scatter" and listed.publish != "values":
            raise InputError(f"split.yaml: {listed.section}: a scatter would show measured values of this table")
        series = list(_series(kept, outcome, plot))
        if listed.publish != "values":
            series = [replace(one, y=np.round(one.y, 2)) for one in series]
        if not series:
            continue
        if plot.kind == "scatter":
            yield scatter(plot.label, plot.unit, series)
        else:
            title = f"{listed.metrics.get(plot.metric, plot.metric)}, by {_WORDS.get(plot.by, plot.by)}"
            yield residuals(title, plot.label, series, log_x=not plot.linear)


_WORDS = {"model_path": "model", "system": "device", "hardware": "device", "backend": "engine", "framework": "engine"}


def _series(kept: Table, outcome: Outcome, plot: Plot) -> Iterator[Series]:
    names = [value_text(value).rpartition("/")[2] for value in kept.data[plot.by].to_pylist()]
    label = np.array(names, dtype=str)
    pairs = [outcome.values[name] for name in plot.metric.split(",") if name in outcome.values]
    pairs = [values.take(values.usable) for values in pairs]
    if not pairs:
        return
    joined = replace(pairs[0], **{key: np.concatenate([getattr(one, key) for one in pairs])
                                  for key in ("rows", "measured", "predicted", "low", "high")})  # fmt: skip
    for name in sorted(set(label[joined.rows].tolist())):
        chosen = joined.take(label[joined.rows] == name)
        if plot.kind == "scatter":
            yield Series(name, chosen.measured, chosen.predicted)
        else:
            yield Series(name, kept.numbers(plot.against)[chosen.rows], _errors(chosen))


def _errors(values: Values) -> Any:
    return values.predicted / values.measured - 1.0


def render(stem: str, results: Results, *, section: str | None = None, note: str = "") -> Iterator[str]:
    """Lines of the section in Markdown; `section` and `note` where it shows only some rows of the table."""
    listed = split().tables[stem]
    yield f"### {listed.title}{', a part' if section else ''}"
    yield ""
    if note:
        yield note
    yield f"Source: {listed.source}; licence: {listed.licence}. {provenance(results)}"
    yield f"{results['expressible']:,} of {results['rows']:,} rows are expressed."
    yield ""
    if results["reasons"]:
        yield from _reasons(results["reasons"])
        yield ""
    for rule in listed.rules:
        what = f" ({rule.coefficients})" if rule.coefficients else ""
        others = "all other rows" if len(listed.rules) > 1 else "all rows"
        rows = f"rows with {', '.join(rule.where)}" if rule.where else others
        yield f"- {rule.role}: {rows}; {rule.why.strip()}{what}"
    if "twins" in results:
        yield _twins(listed, results["twins"])
    if listed.publish == "residuals" and results["roles"]:
        yield f"- Only errors of this table may be shown. Summaries of fewer than {MANY} rows, and the dots of figures,"
        yield f"  are whole percents, and there are none of fewer than {FEWEST}: no measured value can be worked out."
    yield ""
    if results["roles"]:
        parts = [(ALL, results["roles"]), *results["subsets"].items()]
        yield from table(("rows", "role", "metric", *SUMMARY), [
            (which, role, listed.metrics[name], *cells(found[name]))
            for which, by_role in parts for role, found in by_role.items() for name in listed.metrics if name in found
        ], left=3)  # fmt: skip
        yield ""
        yield from _groups(listed, results["groups"])
    if results.get("figure"):
        yield f"![{listed.title}](figures/{section or listed.section}.svg)"
        yield ""


def _twins(listed: Listed, counts: dict[str, int]) -> str:
    return (
        f"- {SEEN}: {counts['fitted']:,} rows, expressed or not, that are also fitted rows of `{listed.twins}`;"
        f" {counts['kept out']:,}"
        f" more are kept-out rows there as well and count in both. {counts['by time']:,} of these twins were told"
        f" by their time, {counts['by load']:,}, of which only medians are stated, by load and day: some may be others."
    )


def _reasons(reasons: dict[str, int]) -> Iterator[str]:
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    yield "Not expressed: " + "; ".join(f"{count:,} {reason}" for reason, count in ordered[:MOST_REASONS]) + (
        f"; {sum(count for _, count in ordered[MOST_REASONS:]):,} for {len(ordered) - MOST_REASONS} other reasons."
        if len(ordered) > MOST_REASONS else "."
    )  # fmt: skip


def _groups(listed: Listed, groups: dict[str, Any]) -> Iterator[str]:
    """Median and mean error and bias of the first two metrics by every column; of many values those with most rows."""
    names = list(listed.metrics)[:2]
    rows = []
    for column, values in groups.items():
        shown = [(value, found) for value, found in values.items() if names[0] in found]
        if len(shown) < 2:
            continue
        shown.sort(key=lambda item: (-item[1][names[0]]["n"], item[0]))
        for value, found in sorted(shown[:WORST_GROUPS]):
            row = [column, value, f"{found[names[0]]['n']:,}"]
            for name in names:
                one = found.get(name)
                row += cells(one)[1:3] + cells(one)[4:5] if one else [MISSING] * 3
            rows.append(row)
    if rows:
        head = [f"{listed.metrics[name]} {word}" for name in names for word in ("median", "mean", "bias")]
        yield from table(("column", "value", "n", *head), rows, left=2)
        yield ""
