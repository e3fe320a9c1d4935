"""Tables and numbers of the report in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

MISSING = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Iterator[str]:
    """Lines of a Markdown table; the first `left` columns are aligned left, the rest right."""
    yield f"| {' | '.join(header)} |"
    yield f"| {' | '.join('---' if index < left else '---:' for index in range(len(header)))} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def percent(value: float | None, *, sign: bool = False) -> str:
    """A fraction as percent: one decimal below ten percent, none above.

    >>> percent(0.0412), percent(0.2), percent(-0.03, sign=True), percent(12.0), percent(None)
    ('4.1%', '20%', '-3.0%', '1,200%', '–')
    """
    if value is None:
        return MISSING
    decimals = 1 if abs(value) < 0.0995 else 0
    return f"{100 * value:{'+' if sign else ''},.{decimals}f}%"


def error(found: Mapping[str, Any], name: str, *, sign: bool = False) -> str:
    """One figure of a summary, without a decimal that it does not have.

    >>> error({"mape_mean": 0.02, "coarse": True}, "mape_mean"), error({"mape_mean": 0.024}, "mape_mean")
    ('2%', '2.4%')
    """
    value = found[name]
    return f"{100 * value:{'+' if sign else ''},.0f}%" if found.get("coarse") else percent(value, sign=sign)


SUMMARY = ("n", "median", "mean", "p90", "bias", "in band", "width")


def cells(found: Mapping[str, Any]) -> list[str]:
    """A summary of `validation.compare.outcome` as the columns SUMMARY; one that was made coarse in whole percents."""
    errors = [error(found, name) for name in ("mape_median", "mape_mean", "mape_p90")]
    return [
        f"{found['n']:,}", *errors, error(found, "bias", sign=True),
        MISSING if found["coverage_90"] is None else f"{found['coverage_90']:.0%}",
        MISSING if found["band_width_median"] is None else f"{found['band_width_median']:.0%}",
    ]  # fmt: skip


def seconds(value: float) -> str:
    """Three digits in a fitting unit.

    >>> seconds(0.0123), seconds(431.2), seconds(2.5e-5), seconds(5000)
    ('12.3 ms', '431 s', '25.0 µs', '5,000 s')
    """
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= 0.9995 * size:
            shown = value / size
            decimals = 0 if shown >= 99.95 else 1 if shown >= 9.995 else 2
            return f"{shown:,.{decimals}f} {unit}"
    return f"{value * 1e9:.0f} ns"
