"""The replicas of a service side by side: a table, and how evenly the router loaded them."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from perfsim.metrics.definitions import metric
from perfsim.report import svg
from perfsim.report.figures import COLOURS
from perfsim.report.format import human, words

if TYPE_CHECKING:
    from perfsim.metrics.result import Result

    Json = dict[str, Any]

_COLUMNS = ("requests", "output_tokens", "busy_fraction", "mean_batch", "kv_peak_fraction", "prefix_hit_rate",
            "preemptions", "failures")  # fmt: skip
_STRIPS = ("requests", "busy_fraction", "mean_batch", "kv_peak_fraction")
# A bar needs two pixels to be seen, a table more than these would not be read; `result.json` has all of them.
_MOST_BARS, _MOST_ROWS = 512, 200


def section(result: Result) -> str:
    """Load balance and table; empty for a single replica."""
    if len(result.replicas) < 2:
        return ""
    replicas = result.replicas
    note = ""
    if len(replicas) > _MOST_ROWS:
        note = f"<p class=note>The first {_MOST_ROWS} of {len(replicas):,} replicas; result.json has all of them.</p>"
    return (
        f"<h2>Replicas</h2><div class=card><h3>Load per replica</h3>{balance(replicas)}</div>"
        f'<div class="card scroll" style="margin-top:14px">{_table(replicas[:_MOST_ROWS])}{note}</div>'
    )


def balance(replicas: list[Json]) -> str:
    """A bar per replica and measure, coloured by group, a dashed line at the mean of each group, how uneven it is."""
    shown = replicas[:_MOST_BARS]
    groups = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(dict.fromkeys(r["group"] for r in replicas))}
    names = [name for name in _STRIPS if any(replica.get(name) for replica in shown)]
    if not names:
        return "<p class=empty>No replica did anything</p>"
    width, left, right, tall, gap = 1160, 64, 1144, 70, 34
    parts = []
    for index, name in enumerate(names):
        top = 20 + index * (tall + gap)
        parts.append(_strip(name, shown, groups, left, right, top, top + tall))
    picture = svg.svg(width, 20 + len(names) * (tall + gap) - gap + 6, "".join(parts), label="Load per replica")
    key = "".join(f'<span><i style="background:{groups[name]}"></i>{escape(name)}</span>' for name in groups)
    return f"{picture}<p class=key>{key}<span>Dashed: mean of the group</span></p>"


def _strip(name: str, replicas: list[Json], groups: dict[str, str], left: float, right: float, top: float,
           bottom: float) -> str:  # fmt: skip
    definition = metric(f"replicas.{name}")
    values = [float(replica.get(name) or 0.0) for replica in replicas]
    y = svg.Scale(0.0, max(values) * 1.06 or 1.0, bottom, top)
    slot = (right - left) / len(values)
    bar = max(min(slot - 2.0, 40.0), slot * 0.6)
    parts = [svg.segment(left, bottom, right, bottom, "base"),
             svg.text(left, top - 7, definition.label, class_="strip"),
             svg.text(right, top - 7, _evenness(name, replicas, values), anchor="end"),
             svg.text(left - 7, y(max(values)) + 4, human(_short(max(values)), definition.unit).split(" ")[0],
                      anchor="end")]  # fmt: skip
    for index, (replica, value) in enumerate(zip(replicas, values, strict=True)):
        x = left + index * slot + (slot - bar) / 2
        title = svg.tag("title", escape(f"{replica['name']}: {human(value, definition.unit)}"))
        parts.append(svg.tag("rect", title, x=x, y=y(value), width=bar, height=bottom - y(value),
                             fill=groups[replica["group"]]))  # fmt: skip
    for group in groups:
        inside = [index for index, replica in enumerate(replicas) if replica["group"] == group]
        if inside:
            mean = y(sum(values[index] for index in inside) / len(inside))
            parts.append(svg.segment(left + inside[0] * slot, mean, left + (inside[-1] + 1) * slot, mean, "mean"))
    return "".join(parts)


def _short(value: float) -> float | int:
    return int(value) if value == int(value) and value >= 1000 else value


def _evenness(name: str, replicas: list[Json], values: list[float]) -> str:
    """Highest over mean per group: 1.00 is perfect balance."""
    found = []
    for group in dict.fromkeys(replica["group"] for replica in replicas):
        own = [value for replica, value in zip(replicas, values, strict=True) if replica["group"] == group]
        mean = sum(own) / len(own)
        if mean and len(own) > 1:
            spread = math.sqrt(sum((value - mean) ** 2 for value in own) / len(own)) / mean
            found.append(f"{group}: highest / mean {max(own) / mean:.2f}, deviation {human(spread, 'fraction')}")
    return " · ".join(found[:3]) + (" · …" if len(found) > 3 else "")


def _table(replicas: list[Json]) -> str:
    columns = [name for name in _COLUMNS if any(replica.get(name) is not None for replica in replicas)]
    labels = "".join(f"<th>{escape(metric(f'replicas.{name}').label)}</th>" for name in columns)
    rows = []
    for replica in replicas:
        cells = "".join(f"<td>{_cell(replica.get(name), metric(f'replicas.{name}').unit)}</td>" for name in columns)
        role = words(replica["role"]) if replica.get("role") else "–"
        rows.append(f"<tr><td>{escape(str(replica['name']))}</td><td>{escape(str(replica['group']))}</td>"
                    f"<td>{escape(role)}</td>{cells}</tr>")  # fmt: skip
    return f"<table><tr><th>Replica</th><th>Group</th><th>Role</th>{labels}</tr>{''.join(rows)}</table>"


def _cell(value: float | None, unit: str) -> str:
    """The unit stands in the head of the column, where it is not a percent sign."""
    return human(value, unit if unit == "fraction" else "")
