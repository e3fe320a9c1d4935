"""The figures of a report as inline SVG: latency CDFs, the run over time, where time and memory went.

Each function takes a `Result` and returns one SVG or HTML fragment, deterministic to the byte. A figure that can be
read with the pointer carries its values in `data-plot`, which `report.js` reads; without a script it is still whole.
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING, Any

from perfsim.metrics.definitions import metric
from perfsim.report import svg
from perfsim.report.format import axis_unit, human, significant, words

if TYPE_CHECKING:
    from perfsim.metrics.result import Result

# Defined in report.css, once for light and once for dark.
COLOURS = tuple(f"var(--c{index})" for index in range(8))
IDLE = "var(--idle)"
_LATENCY_COLOURS = {"ttft": COLOURS[0], "tpot": COLOURS[1], "itl": COLOURS[3], "e2e": COLOURS[2]}
# A latency axis is logarithmic when its ends (1st percentile, maximum and the SLO's bounds) are this far apart.
_WIDE = 20.0


def latency_cdf(result: Result, name: str) -> str:
    """The share of samples at or below each latency, with the SLO's bounds on it; `name` is a latency metric."""
    definition = metric(name)
    curve: list[float] | None = result.curves.get(name)
    if not curve:
        return _no_data(f"{definition.label}: no samples in this run")
    width, height, left, right, top, bottom = 560, 270, 46, 544, 14, 226
    probability: list[float] = result.curves["probability"]
    bounds = [verdict for verdict in result.metrics["slo"]["verdicts"] if verdict["metric"] == name]
    x, ticks, labels, title = _latency_axis(curve, [verdict["bound_s"] for verdict in bounds], left, right)
    y = svg.Scale(0.0, 1.0, bottom, top)
    parts = [_rows(y, [0.0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"], left, right)]
    parts.append(_columns(x, ticks, labels, top, bottom))
    parts.append(svg.text((left + right) / 2, height - 6, f"{definition.label}{title}", class_="axis", anchor="middle"))
    for index, verdict in enumerate(bounds):
        # Left of the median the curve is low and the label goes to the top, right of it the other way round.
        high = verdict["bound_s"] < curve[probability.index(0.5)]
        parts.append(_bound(x, verdict, top, bottom, top + 14 + 15 * index if high else bottom - 12 - 15 * index))
    colour = _LATENCY_COLOURS[name]
    at = [x(max(value, x.low)) for value in curve]
    parts.append(svg.polyline(zip(at, map(y, probability), strict=True), colour))
    parts.append(_percentiles(at, curve, probability, y, right, colour))
    plot = {
        "left": left, "right": right, "top": top, "bottom": bottom,
        "px": [float(svg.px(value)) for value in at],
        "p": probability, "rows": [{"name": definition.label, "unit": "s", "y": curve}],
    }  # fmt: skip
    return _interactive(width, height, parts, plot, f"Cumulative distribution of {definition.label}")


def _percentiles(at: list[float], curve: list[float], probability: list[float], y: svg.Scale, right: float,
                 colour: str) -> str:  # fmt: skip
    """Dots at p50, p95 and p99 with their values: right of and below the curve, or left of it where room ends."""
    parts, line = [], 0.0  # the line of text under the label before, where that stands below the curve
    for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99")):
        index = probability.index(share)
        x, height = at[index], y(share)
        parts.append(svg.tag("circle", cx=x, cy=height, r=3.2, class_="dot", fill=colour))
        label = f"{name} {human(curve[index], 's')}"
        if x + 96 < right:
            line = max(height + 13, line)
            parts.append(svg.text(x + 7, line, label, class_="mark"))
        elif line and name == "p99":
            parts.append(svg.text(right, line, label, class_="mark", anchor="end"))
        else:
            parts.append(svg.text(x - 8, height + (-1 if name == "p99" else 5), label, class_="mark", anchor="end"))
        line = line + 13 if line and name == "p95" else 0.0
    return "".join(parts)


def _latency_axis(curve: list[float], bounds: list[float], left: float, right: float,
                  ) -> tuple[svg.Scale, list[float], list[str], str]:  # fmt: skip
    """Scale, ticks, their labels and the end of the axis title; curve and bounds both lie inside."""
    first, last = min(curve[2:3] + [bound for bound in bounds if bound > 0]), max([curve[-1], *bounds])
    if first > 0 and last / first > _WIDE:
        x = svg.Scale(first / 1.15, last * 1.15, left, right, log=True)
        ticks = svg.log_time_ticks(x.low, x.high)
        return x, ticks, [_time(tick) for tick in ticks], ", log scale"
    x = svg.Scale(0.0, (last or 1.0) * 1.06, left, right)
    size, unit = axis_unit("s", x.high)
    ticks = svg.linear_ticks(0.0, x.high / size, 6)
    return x, [tick * size for tick in ticks], [f"{tick:g}" for tick in ticks], f" ({unit})"


def _time(seconds: float) -> str:
    """A tick on a logarithmic axis of durations: 200 ms, 5 s, 20 min, 2 h."""
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.999 * size:
            return f"{round(seconds / size):,} {unit}"
    return f"{round(seconds / 1e-9)} ns"


def _bound(x: svg.Scale, verdict: dict[str, Any], top: float, bottom: float, text_y: float) -> str:
    """A dashed line at a bound of the SLO, its label at height `text_y` on the side with more room."""
    at, name = x(max(verdict["bound_s"], x.low)), f"{verdict['stat']} ≤ {human(verdict['bound_s'], 's')}"
    class_ = {True: "met", False: "broken", None: "open"}[verdict["holds"]]
    right_half = at > (x.first + x.last) / 2
    label = svg.text(at - 5 if right_half else at + 5, text_y, name, class_=f"bound {class_}",
                     anchor="end" if right_half else "start")  # fmt: skip
    return svg.segment(at, top, at, bottom, f"limit {class_}") + label


def over_time(result: Result) -> str:
    """KV occupancy, batch, queue and token rates on one time axis."""
    line = result.timeline
    if not line.get("running"):
        return _no_data("Nothing ran: there is no timeline")
    blocks = result.metrics["kv_cache"]["blocks"]
    strips = [
        ("timeline.kv_occupancy", [value / blocks for value in line["kv_blocks"]]),
        ("timeline.running", line["running"]),
        ("timeline.waiting", line["waiting"]),
        ("timeline.prefill_tokens_per_s", line["prefill_tokens_per_s"]),
        ("timeline.output_tokens_per_s", line["output_tokens_per_s"]),
    ]
    width, left, right, tall, gap, top = 1160, 64, 1144, 92, 34, 22
    height = top + len(strips) * (tall + gap) + 12
    size, unit = axis_unit("s", line["duration_s"])
    x = svg.Scale(0.0, line["duration_s"] / size, left, right)
    ticks = svg.linear_ticks(0.0, x.high, 12)
    edges = [x(min(index * line["bin_s"] / size, x.high)) for index in range(len(line["running"]) + 1)]
    parts, rows = [], []
    for index, (key, values) in enumerate(strips):
        definition, above = metric(key), top + index * (tall + gap)
        labels = [f"{tick:g}" for tick in ticks] if index == len(strips) - 1 else [""] * len(ticks)
        parts.append(_strip(key, values, x, ticks, labels, edges, above, above + tall, COLOURS[index]))
        rows.append({"name": definition.label, "unit": definition.unit, "y": [float(f"{v:.4g}") for v in values]})
    title = f"Time since the first step ({unit}), averages over {human(line['bin_s'], 's')}"
    parts.append(svg.text((left + right) / 2, height - 6, title, class_="axis", anchor="middle"))
    plot = {
        "left": left, "right": right, "top": top, "bottom": height - 12 - gap, "px0": edges[0],
        "pxw": (right - left) * line["bin_s"] / line["duration_s"], "dt": line["bin_s"], "rows": rows,
    }  # fmt: skip
    return _interactive(width, height, parts, plot, "The run over time")


def _strip(key: str, values: list[float], x: svg.Scale, ticks: list[float], labels: list[str], edges: list[float],
           top: float, bottom: float, colour: str) -> str:  # fmt: skip
    definition = metric(key)
    largest = max(values) or 1.0
    high = min(1.0, largest * 1.08) if definition.unit == "fraction" else largest * 1.08
    y = svg.Scale(0.0, high, bottom, top)
    shown = svg.linear_ticks(0.0, high * (100.0 if definition.unit == "fraction" else 1.0), 3)
    factor, sign = (0.01, "%") if definition.unit == "fraction" else (1.0, "")
    peak = human(max(values), definition.unit) + (" of the pool" if definition.unit == "fraction" else "")
    return "".join((
        _rows(y, [tick * factor for tick in shown], [_short(tick) + sign for tick in shown], x.first, x.last),
        _columns(x, ticks, labels, top, bottom),
        svg.steps(edges, [y(value) for value in values], bottom, colour),
        svg.text(x.first, top - 7, definition.label, class_="strip"),
        svg.text(x.last, top - 7, f"highest {peak}", anchor="end"),
    ))  # fmt: skip


def breakdown(result: Result) -> str:
    """Horizontal bars: time of the run per component in one unit, largest first, idle last and grey."""
    items = sorted(((value, key) for key, value in result.breakdown.items() if value > 0 and key != "idle"),
                   key=lambda item: (-item[0], item[1]))  # fmt: skip
    if result.breakdown.get("idle", 0.0) > 0:
        items.append((result.breakdown["idle"], "idle"))
    if not items:
        return _no_data("No time was spent")
    total = sum(value for value, _ in items)
    size, unit = axis_unit("s", max(value for value, _ in items))
    rows = []
    for value, key in items:
        time = f"{significant(value / size)} {unit}" if value >= size else human(value, "s")
        colour = IDLE if key == "idle" else COLOURS[0]
        rows.append((words(key), value / total, f"{time} · {human(value / total, 'fraction')}", colour))
    return bars(rows, "Time by component")


def bound(result: Result) -> str:
    """Horizontal bars: share of busy time per limiting resource, largest first."""
    items = sorted(((share, key) for key, share in result.bound.items() if share > 0), key=lambda i: (-i[0], i[1]))
    rows = [(metric(f"bound.{key}").label, share, human(share, "fraction"), COLOURS[3]) for share, key in items]
    return bars(rows, "What bound the run") if rows else _no_data("The run was never busy")


def energy(result: Result) -> str:
    """Horizontal bars: where the joules of the run went; empty when the run has no energy figures."""
    parts = [(metric(f"energy.{key}").label, result.energy.get(key)) for key in
             ("gpu_dynamic_joules", "gpu_idle_joules", "host_joules")]  # fmt: skip
    known = [(name, value) for name, value in parts if value]
    total = sum(value for _, value in known)
    rows = [(name, value / total, f"{human(value, 'J')} · {human(value / total, 'fraction')}", COLOURS[1])
            for name, value in known]  # fmt: skip
    return bars(rows, "Energy by part") if rows else ""


def bars(rows: list[tuple[str, float, str, str]], label: str) -> str:
    """Horizontal bars from (name, share in [0, 1], text at the end, colour), scaled to the longest."""
    width, left, room, step = 560, 150, 128, 28
    longest = max(share for _, share, _, _ in rows)
    parts = []
    for index, (name, share, note, colour) in enumerate(rows):
        y, length = index * step + 5, (width - left - room) * share / longest
        parts.append(svg.text(left - 10, y + 14, name, class_="name", anchor="end"))
        parts.append(svg.tag("rect", x=left, y=y, width=max(length, 1.0), height=20, rx=2, fill=colour))
        parts.append(svg.text(left + max(length, 1.0) + 8, y + 14, note, class_="value"))
    return svg.svg(width, len(rows) * step + 6, "".join(parts), label=label)


def memory(result: Result) -> str:
    """One stacked bar: what fills the memory of each GPU, against its capacity, with a legend that carries numbers."""
    items = [(key, size) for key, size in result.memory.items() if size > 0]
    items.sort(key=lambda item: (item[0] == "unused", -item[1], item[0]))
    capacity = sum(size for _, size in items)
    if not capacity:
        return _no_data("No memory figures in this result")
    width, x, parts, legend = 560, 0.0, [], []
    colours = {key: IDLE if key == "unused" else COLOURS[index % len(COLOURS)] for index, (key, _) in enumerate(items)}
    for key, size in items:
        length = width * size / capacity
        note = f"{words(key)}: {human(size, 'bytes')} ({human(size / capacity, 'fraction')})"
        parts.append(svg.tag("rect", svg.tag("title", escape(note)), x=x, y=0, width=max(length - 1.0, 0.5), height=34,
                             fill=colours[key]))  # fmt: skip
        x += length
        legend.append(
            f'<tr><td><i style="background:{colours[key]}"></i>{escape(words(key))}</td>'
            f"<td>{human(size, 'bytes')}</td><td>{human(size / capacity, 'fraction')}</td></tr>"
        )
    total = f"<tr class=total><td>Capacity of one GPU</td><td>{human(capacity, 'bytes')}</td><td></td></tr>"
    bar = svg.svg(width, 36, "".join(parts), label="Memory of one GPU")
    return f"{bar}<table class=legend>{''.join(legend)}{total}</table>"


def _rows(y: svg.Scale, ticks: list[float], labels: list[str], left: float, right: float) -> str:
    return "".join(
        svg.segment(left, y(tick), right, y(tick), "rule" if tick else "base")
        + svg.text(left - 7, y(tick) + 4, label, anchor="end")
        for tick, label in zip(ticks, labels, strict=True)
    )


def _columns(x: svg.Scale, ticks: list[float], labels: list[str], top: float, bottom: float) -> str:
    return "".join(
        svg.segment(x(tick), top, x(tick), bottom, "rule")
        + (svg.text(x(tick), bottom + 16, label, anchor="middle") if label else "")
        for tick, label in zip(ticks, labels, strict=True)
    )


def _short(value: float) -> str:
    """A tick label: 12,000 as 12k."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}" if value else significant(0.0)


def _interactive(width: int, height: int, parts: list[str], plot: dict[str, Any], label: str) -> str:
    data = json.dumps(plot, separators=(",", ":"), allow_nan=False)
    return svg.svg(width, height, "".join(parts), label=label, class_="plot", data_plot=data)


def _no_data(message: str) -> str:
    """What stands where a figure would be when the run holds nothing to draw."""
    return f"<p class=empty>{escape(message)}</p>"
