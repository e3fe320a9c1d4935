"""The few SVG pieces the figures are made of: scales, ticks, gridlines, text. Coordinates are pixels, y grows down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to pixels from `first` to `last`, linearly or by logarithm."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.first + (self.last - self.first) * part


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (steps of 1, 2 or 5 x 10^n) inside [low, high], about `about` of them."""
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1.0, 2.0, 5.0, 10.0) if size * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_time_ticks(low: float, high: float) -> list[float]:
    """At most eight round durations inside [low, high] seconds: 1, 2, 5 x 10^n seconds, minutes or hours."""
    inside: list[float] = []
    for digits in ((1, 2, 5), (1, 3), (1,)):
        # 50 s and 50 min would crowd the minute and the hour that follow.
        ticks = [digit * 10.0**power for power in range(-9, 2) for digit in digits if digit * 10.0**power < 50]
        ticks += [60.0 * digit * 10**power for power in range(2) for digit in digits if digit * 10**power < 50]
        ticks += [3600.0 * digit * 10.0**power for power in range(12) for digit in digits]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(inside) <= 8:
            return inside
    return inside[:: math.ceil(len(inside) / 8)]


def px(value: float) -> str:
    """A coordinate with one decimal at most: enough on a screen, and half the bytes."""
    return f"{value:.1f}".removesuffix(".0")


def tag(name: str, body: str = "", **attributes: object) -> str:
    """One element; `class_` and `stroke_width` become `class` and `stroke-width`; attribute values are escaped."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(px(value) if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name}{text}>{body}</{name}>" if body else f"<{name}{text}/>"


def text(x: float, y: float, content: str, *, class_: str = "tick", anchor: str = "start") -> str:
    """A line of text whose baseline is at `y`."""
    return tag("text", escape(content), x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def segment(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def polyline(points: Iterable[tuple[float, float]], colour: str) -> str:
    """A line through points; points closer than a tenth of a pixel are drawn once."""
    coordinates: list[str] = []
    for x, y in points:
        point = f"{px(x)} {px(y)}"
        if not coordinates or coordinates[-1] != point:
            coordinates.append(point)
    return tag("path", d="M" + "L".join(coordinates), class_="line", stroke=colour)


def steps(edges: Sequence[float], heights: Sequence[float], base: float, colour: str) -> str:
    """A filled staircase: `heights[i]` (pixels) from `edges[i]` to `edges[i + 1]`, filled down to `base`."""
    moves: list[str] = []
    for index, height in enumerate(heights):
        if index == 0 or px(height) != px(heights[index - 1]):
            moves.append(f"H{px(edges[index])}V{px(height)}" if index else f"V{px(height)}")
    moves.append(f"H{px(edges[len(heights)])}")
    stair = "".join(moves)
    start, top = px(edges[0]), px(heights[0])
    area = tag("path", d=f"M{start} {px(base)}{stair}V{px(base)}Z", class_="area", fill=colour)
    line = tag("path", d=f"M{start} {top}{stair.removeprefix(f'V{top}')}", class_="line", stroke=colour)
    return area + line


def svg(width: int, height: int, body: str, *, label: str, **attributes: object) -> str:
    """The picture, which scales with its container; `label` is what a screen reader says."""
    return tag("svg", body, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, **attributes)
