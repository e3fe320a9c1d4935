"""Scatter and residual plots as SVG files that stand alone, in the look of perfsim's own reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import perfsim.report
from perfsim.report import svg

Floats = NDArray[np.float64]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 300, 64, 14, 30, 46
LEGEND = 20  # pixels of one line of the legend
COLOURS = tuple(f"var(--c{index})" for index in (0, 2, 1, 5, 3, 7, 6, 4))
MOST_POINTS = 400  # of one series in one panel; an even choice of more, so that a file stays small
NEAR = 0.1  # the lines beside the diagonal, and around no error
LIMITS = (0.25, 0.5, 1.0, 2.0)  # ends of an axis of errors


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour; `x` and `y` are float64[n]."""

    name: str
    x: Floats
    y: Floats


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: `against` is measured against predicted with a diagonal, else `y` is an error as a fraction."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    against: bool = False
    log_x: bool = True
    note: str = ""


def scatter(title: str, unit: str, series: Iterable[Series]) -> Panel:
    """Predicted over measured, both by logarithm, with the diagonal and lines at 10% beside it."""
    return Panel(title, f"measured ({unit})", f"predicted ({unit})", tuple(series), against=True)


def residuals(title: str, x_label: str, series: Iterable[Series], *, log_x: bool = True) -> Panel:
    """(predicted - measured) / measured over a property of the rows, with lines at plus and minus 10%.

    What lies beyond the axis stands at its end, and is counted below the title.
    """
    found = tuple(series)
    errors = np.concatenate([one.y for one in found]) if found else np.zeros(0)
    wide = float(np.quantile(np.abs(errors), 0.95)) if len(errors) else 0.0
    limit = next((limit for limit in LIMITS if wide <= limit), LIMITS[-1])
    beyond = int((np.abs(errors) > limit).sum())
    note = f"{beyond} of {len(errors)} beyond ±{limit:.0%}" if beyond else ""
    clipped = tuple(replace(one, y=np.clip(one.y, -limit, limit)) for one in found)
    return Panel(title, x_label, "error of the prediction", clipped, log_x=log_x, note=note)


def figure(panels: Sequence[Panel], *, label: str, columns: int = 2) -> str:
    """The panels on a grid, as the text of an SVG file; a legend stands above the rows whose series it names."""
    columns = min(columns, len(panels))
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    width, y, parts = columns * WIDTH, 0, []
    for group in _groups(rows):
        y += 10
        names = _names(group)
        legend, lines = _legend(names, width, y)
        parts.append(legend)
        y += lines * LEGEND
        for row in group:
            for column, panel in enumerate(row):
                parts.append(svg.tag("g", _panel(panel, names), transform=f"translate({column * WIDTH} {y})"))
            y += HEIGHT
    head = f"<style>{_style()}</style>" + svg.tag("rect", x=0, y=0, width=width, height=y, class_="page")
    return svg.tag(
        "svg", head + "".join(parts), xmlns="http://www.w3.org/2000/svg", width=width, height=y,
        viewBox=f"0 0 {width} {y}", role="img", aria_label=label,
    ) + "\n"  # fmt: skip


def _names(rows: Sequence[Sequence[Panel]]) -> list[str]:
    return list(dict.fromkeys(one.name for row in rows for panel in row for one in panel.series))


def _groups(rows: Sequence[Sequence[Panel]]) -> list[list[Sequence[Panel]]]:
    """Rows that follow each other and share series, as far as the colours last: equal names have equal colours."""
    groups: list[list[Sequence[Panel]]] = []
    for row in rows:
        if groups:
            joined = _names([*groups[-1], row])
            if len(joined) <= len(COLOURS) and len(joined) < len(_names(groups[-1])) + len(_names([row])):
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def _legend(names: Sequence[str], width: int, top: int) -> tuple[str, int]:
    """The names with their colours, below `top`, and on how many lines they stand."""
    x, line, parts = 14.0, 0, []
    for index, name in enumerate(names):
        room = 30.0 + 7.6 * len(name)
        if x + room > width and x > 14.0:
            x, line = 14.0, line + 1
        y = top + line * LEGEND + 8
        parts.append(svg.tag("circle", cx=x, cy=float(y - 4), r=4, fill=_colour(index)))
        parts.append(svg.text(x + 9, y, name, class_="name"))
        x += room
    return "".join(parts), line + 1


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _panel(panel: Panel, names: Sequence[str]) -> str:
    shown = [replace_points(one, panel) for one in panel.series]
    x = _scale(np.concatenate([one.x for one in shown]), LEFT, WIDTH - RIGHT, log=panel.log_x)
    if panel.against:
        x = y = _scale(np.concatenate([*(one.x for one in shown), *(one.y for one in shown)]), 0, 1, log=True)
        x, y = (svg.Scale(x.low, x.high, *ends, log=True) for ends in ((LEFT, WIDTH - RIGHT), (HEIGHT - BOTTOM, TOP)))
        lines = _diagonals(x, y)
    else:
        limit = next(limit for limit in LIMITS if all(np.abs(one.y).max(initial=0) <= limit + 1e-9 for one in shown))
        y = svg.Scale(-limit, limit, HEIGHT - BOTTOM, TOP)
        lines = "".join(_across(x, y(value), "limit" if value else "base") for value in (-NEAR, 0.0, NEAR))
    parts = [svg.text(LEFT, 16, panel.title, class_="strip")]
    parts += [_x_axis(x), _y_axis(x, y, fraction=not panel.against), lines]
    for one in shown:
        dots = "".join(f"M{svg.px(x(at))} {svg.px(y(value))}h0" for at, value in zip(one.x, one.y, strict=True))
        if dots:
            parts.append(svg.tag("path", d=dots, class_="dots", stroke=_colour(names.index(one.name))))
    if panel.note:
        parts.append(svg.text(WIDTH - RIGHT - 4, TOP + 13, panel.note, class_="mark", anchor="end"))
    parts.append(svg.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, panel.x_label, class_="axis", anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = svg.text(0, 0, panel.y_label, class_="axis", anchor="middle")
    parts.append(svg.tag("g", turned, transform=f"translate(12 {svg.px(middle)}) rotate(-90)"))
    return "".join(parts)


def replace_points(one: Series, panel: Panel) -> Series:
    """The points that can be drawn, at most MOST_POINTS of them, evenly chosen along x."""
    keep = np.isfinite(one.x) & np.isfinite(one.y)
    if panel.log_x:
        keep &= one.x > 0
    if panel.against:
        keep &= one.y > 0
    x, y = one.x[keep], one.y[keep]
    if len(x) > MOST_POINTS:
        order = np.lexsort((y, x))
        chosen = order[np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int)]
        x, y = x[chosen], y[chosen]
    return Series(one.name, x, y)


def _scale(values: Floats, first: float, last: float, *, log: bool) -> svg.Scale:
    if not len(values):
        return svg.Scale(1.0, 10.0, first, last, log=log)
    low, high = float(values.min()), float(values.max())
    if log:
        return svg.Scale(low / 1.3, high * 1.3, first, last, log=True)
    room = 0.05 * (high - low) or 0.5
    return svg.Scale(low - room, high + room, first, last)


def _diagonals(x: svg.Scale, y: svg.Scale) -> str:
    """Equal values, and 10% more and less, cut at the ends of the axes."""
    parts = []
    for factor, class_ in ((1.0, "base"), (1.0 + NEAR, "limit"), (1.0 - NEAR, "limit")):
        low, high = max(x.low, x.low / factor), min(x.high, x.high / factor)
        parts.append(svg.segment(x(low), y(low * factor), x(high), y(high * factor), class_))
    return "".join(parts)


def _across(x: svg.Scale, at: float, class_: str) -> str:
    return svg.segment(x.first, at, x.last, at, class_)


def _ticks(scale: svg.Scale, about: int) -> list[float]:
    """Round values: powers of ten by logarithm, with 2 and 5 between them where there are few."""
    if not scale.log:
        return svg.linear_ticks(scale.low, scale.high, about)
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    found: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in powers for digit in digits]
        found = [tick for tick in found if scale.low <= tick <= scale.high]
        if len(found) <= about:
            return found
    return found[:: math.ceil(len(found) / about)]


def _x_axis(x: svg.Scale) -> str:
    bottom = HEIGHT - BOTTOM
    return svg.segment(x.first, bottom, x.last, bottom, "base") + "".join(
        svg.segment(x(tick), TOP, x(tick), bottom, "rule")
        + svg.text(x(tick), bottom + 15, short(tick), anchor="middle")
        for tick in _ticks(x, 7)
    )


def _y_axis(x: svg.Scale, y: svg.Scale, *, fraction: bool) -> str:
    show: Callable[[float], str] = (lambda value: f"{value:+.0%}" if value else "0") if fraction else short
    return "".join(
        svg.segment(x.first, y(tick), x.last, y(tick), "rule") + svg.text(x.first - 6, y(tick) + 4, show(tick),
                                                                          anchor="end")
        for tick in _ticks(y, 7)
    )  # fmt: skip


def short(value: float) -> str:
    """A tick label: 12,000 as 12k, a ten-thousandth as 0.0001.

    >>> short(12_000), short(2e6), short(0.05), short(300)
    ('12k', '2M', '0.05', '300')
    """
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


@cache
def _style() -> str:
    """Colours and text of perfsim's report, for light and dark."""
    rules = (Path(perfsim.report.__file__).parent / "report.css").read_text(encoding="utf-8").splitlines()
    kept = [rule for rule in rules if rule.startswith((":root", "@media screen", "svg .", "svg text"))]
    own = ("svg{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Arial,sans-serif}.page{fill:var(--card)}"
           ".dots{fill:none;stroke-width:3.6;stroke-linecap:round;stroke-opacity:.55}")  # fmt: skip
    return "".join(kept) + own
