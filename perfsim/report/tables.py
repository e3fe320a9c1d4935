"""The result for a terminal (rich) and for a spreadsheet (CSV rows)."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from perfsim.metrics.definitions import LATENCIES, STATISTICS, metric
from perfsim.report import scenario
from perfsim.report.format import human, human_band

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from perfsim.metrics.result import Result

# What the terminal shows below the latencies; `result.json` has the rest.
_SHOWN = (
    "throughput.requests_per_s", "throughput.output_tokens_per_s", "goodput.fraction", "prefix_cache.hit_rate",
    "kv_cache.occupancy_mean", "kv_cache.occupancy_peak", "batch.mean_sequences", "queue.max_waiting",
    "counts.completed", "counts.rejected", "counts.preemptions", "makespan_s", "cost.usd",
    "cost.usd_per_million_output_tokens", "energy.joules", "energy.joules_per_output_token",
)  # fmt: skip


def summary_table(result: Result) -> Group:
    """Headline numbers, SLO verdicts, what bound the run, cost, energy and warnings, ready for `rich.print`."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [
        Text(scenario.title(result.scenario), style="bold"),
        Text(scenario.subtitle(result), style="dim"),
        Text(),
        _latencies(result),
        Text(),
        _headline(result),
    ]
    if result.metrics["slo"]["verdicts"]:
        parts.extend((Text(), _verdicts(result)))
    parts.append(Text())
    parts.append(Text(scenario.bands_note(result), style="dim"))
    if scenario.first_guess(result):
        parts.append(Text("Some coefficients are first guesses: not fitted to measurements.", style="yellow"))
    parts.extend(Text(f"Warning: {warning}", style="yellow") for warning in result.warnings)
    return Group(*parts)


def rows(result: Result) -> list[tuple[str, str, float | None, str]]:
    """(metric, stat, value, unit) for every number in the result; `stat` is empty for what is not a distribution.

    Ends of bands follow, with `p95_low` and `p95_high`, or `low` and `high`, as `stat`.
    """
    found = []
    for path, value in result.numbers().items():
        name, _, stat = path.rpartition(".")
        if name in LATENCIES and stat in STATISTICS:
            found.append((name, stat, value, "s"))
        else:
            unit = {"breakdown": "s", "bound": "fraction", "memory": "bytes"}.get(name) or metric(path).unit
            found.append((path, "", value, unit))
    for path, band in result.bands.items():
        name, _, stat = path.rpartition(".")
        latency = name in LATENCIES
        for side, end in zip(("low", "high"), band, strict=True):
            row = (name, f"{stat}_{side}", end, "s") if latency else (path, side, end, metric(path).unit)
            found.append(row)
    return found


def to_csv(result: Result) -> str:
    """`rows` as CSV text with a header; a missing value is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("metric", "stat", "value", "unit"))
    writer.writerows(rows(result))
    return text.getvalue()


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _latencies(result: Result) -> Table:
    table = _table("Latency", *STATISTICS)
    for name in LATENCIES:
        values = result.metrics[name]
        table.add_row(metric(name).label, *(human(values[stat], "s") for stat in STATISTICS))
        bands = [human_band(result.bands.get(f"{name}.{stat}"), values[stat], "s") for stat in STATISTICS]
        if any(bands):
            table.add_row("", *bands, style="dim")
    return table


def _headline(result: Result) -> Table:
    banded = bool(result.bands)
    table = _table("Run", "", *(["5–95%"] if banded else []))
    numbers = result.numbers()
    for key in _SHOWN:
        if numbers.get(key) is not None:
            definition = metric(key)
            band = human_band(result.bands.get(key), numbers[key], definition.unit)
            table.add_row(definition.label, human(numbers[key], definition.unit), *([band] if banded else []))
    if result.bound:
        shares = sorted(((share, name) for name, share in result.bound.items() if share > 0), reverse=True)[:2]
        table.add_row(
            "Bound by",
            ", ".join(f"{metric(f'bound.{name}').label} {human(share, 'fraction')}" for share, name in shares),
        )
    return table


def _verdicts(result: Result) -> Table:
    from rich.text import Text

    table = _table("SLO", "bound", "measured", "verdict")
    for verdict in result.metrics["slo"]["verdicts"]:
        text, style = {True: ("met", "green"), False: ("broken", "red"), None: ("no samples", "dim")}[verdict["holds"]]
        table.add_row(
            f"{metric(verdict['metric']).label} {verdict['stat']}",
            f"≤ {human(verdict['bound_s'], 's')}",
            human(verdict["measured_s"], "s"),
            Text(text, style=style),
        )
    return table
