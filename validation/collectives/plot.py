"""Log-log plots of bus bandwidth over message size: dots are measured, lines predicted."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from math import log2, log10

from perfsim.report.svg import Scale, px

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 280, 68, 22, 30, 30
SIZES, RATES = (512.0, float(1 << 35)), (1e7, 1e12)
# Okabe and Ito's colours, which stay apart for the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000", "#56b4e9", "#888888")
BACKENDS = ("nccl", "vllm_graph", "sglang_graph", "trtllm", "nccl ring", "nccl nvls", "nccl nvls_tree", "nccl torch")


@dataclass(frozen=True, slots=True)
class Curve:
    """One backend: measured and predicted (bytes, bytes/s), by bytes."""

    backend: str
    measured: tuple[tuple[float, float], ...]
    predicted: tuple[tuple[float, float], ...]


def page(panels: list[tuple[str, list[Curve]]]) -> str:
    """A page with one plot per machine, on common axes; what lies outside them (below 512 B, 10 MB/s) is left out."""
    plots = "\n".join(_plot(title, curves) for title, curves in panels)
    legend = "".join(f'<span style="color:{_colour(name)}">&#9679; {escape(name)}</span> ' for name in BACKENDS)
    return ("<!doctype html><meta charset=utf-8><title>All-reduce</title>"
            "<style>body{font:14px sans-serif;margin:16px}svg{margin:4px}text{font:11px sans-serif}"
            "span{margin-right:12px}</style>"
            "<h1>All-reduce: bus bandwidth over message size</h1>"
            f"<p>Dots: measured. Lines: predicted, before any fit. {legend}</p>{plots}\n")  # fmt: skip


def _colour(backend: str) -> str:
    return COLOURS[BACKENDS.index(backend)] if backend in BACKENDS else "#888888"


def _plot(title: str, curves: list[Curve]) -> str:
    across = Scale(*SIZES, LEFT, WIDTH - RIGHT, log=True)
    up = Scale(*RATES, HEIGHT - BOTTOM, TOP, log=True)
    parts = [f'<svg width="{WIDTH}" height="{HEIGHT}" role="img"><text x="{LEFT}" y="18" style="font-weight:bold">'
             f"{escape(title)}</text>"]  # fmt: skip
    for power in range(int(log2(SIZES[0])), int(log2(SIZES[1])) + 1):
        if power % 5 == 0:
            at, below = px(across(2.0**power)), HEIGHT - BOTTOM + 14
            parts.append(f'<line x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
            parts.append(f'<text x="{at}" y="{below}" text-anchor="middle">{_bytes(power)}</text>')
    for power in range(round(log10(RATES[0])), round(log10(RATES[1])) + 1):
        at, label = px(up(10.0**power)), f"{10.0 ** (power - 9):g} GB/s"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at}" text-anchor="end" dy="4">{label}</text>')
    for curve in curves:
        colour = _colour(curve.backend)
        line = " ".join(f"{px(across(size))},{px(up(rate))}" for size, rate in curve.predicted if rate >= RATES[0])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{px(across(size))}" cy="{px(up(rate))}" r="2.2" fill="{colour}" fill-opacity="0.6"/>'
                  for size, rate in curve.measured if size >= SIZES[0] and rate >= RATES[0]]  # fmt: skip
    return "".join([*parts, "</svg>"])


def _bytes(power: int) -> str:
    return f"{2 ** (power % 10)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power // 10]}"
