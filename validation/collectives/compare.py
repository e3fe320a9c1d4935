"""Measured collectives against the cost model: `python -m validation.collectives.compare [--data DIR] [--plot FILE]`.

Nothing was fitted to these rows: the coefficients are those of `hardware/calibration/first-guess.yaml`. An error is
|ln(predicted / measured)| as a factor minus one; a bias is predicted / measured, so 0.5 means half the measured time.
Sizes are the published ones, small up to 64 KiB and large from 16 MiB. Without `--data` the committed slice is used.
Exit status 0 always.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path

from validation.collectives.plot import Curve, page
from validation.collectives.predict import Prediction, predict
from validation.collectives.rows import Row, all_rows, bus_factor, slice_rows

SMALL, LARGE = 1 << 16, 1 << 24


@dataclass(frozen=True, slots=True)
class Compared:
    """One row with its prediction; `error` is ln(predicted / measured)."""

    row: Row
    prediction: Prediction

    @property
    def error(self) -> float:
        return log(self.prediction.seconds / self.row.seconds)


Group = tuple[str, str, int, str]


def compare(rows: Iterable[Row], *, curves: bool = False) -> dict[Group, list[Compared]]:
    """Rows with predictions by (operation, node, nodes, backend), sorted; `curves` as in `predict`."""
    groups: dict[Group, list[Compared]] = {}
    for row in rows:
        group = (row.operation, row.node, row.nodes, row.backend)
        groups.setdefault(group, []).append(Compared(row, predict(row, curves=curves)))
    return dict(sorted(groups.items()))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def table(groups: dict[Group, list[Compared]]) -> Iterable[str]:
    """Lines of the table, one per group."""
    yield (f"{'operation':15}{'node':13}{'nodes':>6}  {'backend':20}{'rows':>6}{'median':>8}{'p90':>8}"
           f"{'bias small':>12}{'middle':>8}{'large':>8}{'impossible':>12}")  # fmt: skip
    for (operation, node, nodes, backend), found in groups.items():
        errors = [abs(item.error) for item in found]
        bias = "".join(f"{_bias(found, low, high):>{width}}" for low, high, width in
                       ((0.0, SMALL, 12), (SMALL, LARGE, 8), (LARGE, float("inf"), 8)))  # fmt: skip
        faster = sum(item.row.seconds < item.prediction.bound for item in found)
        median, high = (exp(quantile(errors, share)) - 1 for share in (0.5, 0.9))
        yield (f"{operation:15}{node:13}{nodes:>6}  {backend:20}{len(found):>6}{median:>8.0%}{high:>8.0%}{bias}"
               f"{faster:>12}")  # fmt: skip


def _bias(found: list[Compared], low: float, high: float) -> str:
    errors = [item.error for item in found if low < item.row.published_bytes <= high or item.row.published_bytes == low]
    return f"{exp(quantile(errors, 0.5)):.2f}" if errors else "–"


def misses(groups: dict[Group, list[Compared]], count: int) -> Iterable[str]:
    """The largest misses, the worst one of each group."""
    worst = [max(found, key=lambda item: abs(item.error)) for found in groups.values()]
    for item in sorted(worst, key=lambda item: -abs(item.error))[:count]:
        row, said = item.row, item.prediction
        yield (
            f"  x{exp(item.error):.3f}  {row.operation} of {_size(row.published_bytes)} on {row.work.group} GPUs, "
            f"{row.nodes} x {row.node}, {row.backend}: {row.seconds * 1e6:,.1f} us measured, "
            f"{said.seconds * 1e6:,.1f} predicted ({said.algorithm}); {row.source}"
        )


def _size(size: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:,.3g} {unit}"
    return f"{size:,.0f} B"


def all_reduce_curves(groups: dict[Group, list[Compared]]) -> list[tuple[str, list[Curve]]]:
    """Panels of the plot: bus bandwidth of all-reduce over its size, per machine, by backend, on all its GPUs.

    Of the GB200 rack one tray of four was measured.
    """
    panels: dict[str, list[Curve]] = {}
    for (operation, node, nodes, backend), found in sorted(groups.items(), key=lambda group: group[0][2]):
        gpus = 4 if node == "gb200-nvl72" else 8 * nodes
        rows = [item.row for item in found if item.row.work.group == gpus]
        if operation != "all_reduce" or not rows or backend.endswith("eager"):
            continue
        factor = bus_factor("all_reduce", gpus)
        measured = sorted((row.published_bytes, factor * row.published_bytes / row.seconds) for row in rows)
        grid = [2.0**power for power in range(9, 36)]
        asked = (replace(rows[0], work=replace(rows[0].work, bytes=size)) for size in grid)
        predicted = [(size, factor * size / predict(row).seconds) for size, row in zip(grid, asked, strict=True)]
        title = f"{nodes} x {node}, {gpus} GPUs" if nodes > 1 else f"{node}, {gpus} GPUs"
        panels.setdefault(title, []).append(Curve(backend, tuple(measured), tuple(predicted)))
    return list(panels.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the largest misses, and write the plot."""
    parser = argparse.ArgumentParser(prog="python -m validation.collectives.compare", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory with the whole tables instead of the committed slice")
    parser.add_argument("--plot", type=Path, help="write an HTML page with log-log plots of all-reduce")
    parser.add_argument("--misses", type=int, default=15, help="how many of the largest misses to name")
    options = parser.parse_args(arguments)
    rows = slice_rows() if options.data is None else all_rows(options.data)
    groups = compare(rows)
    print(f"{len(rows):,} rows; predicted / measured, before any fit")
    print("\n".join(table(groups)))
    print("\nLargest misses, one per line of the table")
    print("\n".join(misses(groups, options.misses)))
    if options.plot is not None:
        options.plot.write_text(page(all_reduce_curves(groups)), encoding="utf-8")
        print(f"\nPlot in {options.plot}")


if __name__ == "__main__":
    main()
