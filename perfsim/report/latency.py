"""The latency part of the report: percentiles, verdicts of the SLO, distributions."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from perfsim.metrics.definitions import LATENCIES, STATISTICS, metric
from perfsim.report import figures
from perfsim.report.format import human, human_band

if TYPE_CHECKING:
    from perfsim.metrics.result import Result


def section(result: Result) -> str:
    head = "".join(f"<th>{stat}</th>" for stat in STATISTICS)
    rows = []
    for name in LATENCIES:
        definition = metric(name)
        cells = "".join(_cell(result, f"{name}.{stat}") for stat in STATISTICS)
        label = f'<abbr title="{escape(definition.formula)}">{escape(definition.label)}</abbr>'
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    table = f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    methods = set(result.metrics["percentile_method"].values())
    note = "Percentiles over requests, ITL over tokens" + (
        "; some come from logarithmic bins and err by at most 0.05%." if len(methods) > 1 or "exact" not in methods
        else "."
    )  # fmt: skip
    cards = "".join(
        f"<div class=card><h3>{escape(metric(name).label)}: share of "
        f"{'gaps' if name == 'itl' else 'requests'} within</h3>{figures.latency_cdf(result, name)}</div>"
        for name in ("ttft", "tpot", "itl", "e2e")
    )
    return (
        f"<h2>Latency</h2><div class=card>{table}<p class=note>{note}</p></div>{_verdicts(result)}"
        f'<div class=grid style="margin-top:14px">{cards}</div>'
        "<p class=note>Dots mark p50, p95 and p99; dashed lines are bounds of the SLO.</p>"
    )


def _cell(result: Result, path: str) -> str:
    value = result.value(path)
    band = human_band(result.bands.get(path), value, "s")
    return f"<td>{human(value, 's')}{f'<br><small>{band}</small>' if band else ''}</td>"


def _verdicts(result: Result) -> str:
    verdicts: list[dict[str, Any]] = result.metrics["slo"]["verdicts"]
    if not verdicts:
        return ""
    rows = []
    for verdict in verdicts:
        class_, text = {True: ("met", "met"), False: ("broken", "broken"), None: ("open", "no samples")}[
            verdict["holds"]
        ]
        rows.append(
            f"<tr><td>{escape(metric(verdict['metric']).label)} {verdict['stat']}</td>"
            f"<td>≤ {human(verdict['bound_s'], 's')}</td><td>{human(verdict['measured_s'], 's')}</td>"
            f"<td class={class_}>{text}</td></tr>"
        )
    head = "<tr><th>Service-level objective</th><th>Bound</th><th>Measured</th><th>Verdict</th></tr>"
    return f'<div class=card style="margin-top:14px"><table>{head}{"".join(rows)}</table></div>'
