"""Numbers for people: three significant digits and a unit that fits the size."""

from __future__ import annotations

import math
from collections.abc import Sequence

# (smallest value shown in this unit, its size, its name), from small to large
_SCALES: dict[str, tuple[tuple[float, float, str], ...]] = {
    "s": ((0.0, 1e-9, "ns"), (1e-6, 1e-6, "µs"), (1e-3, 1e-3, "ms"), (1.0, 1.0, "s"), (180.0, 60.0, "min"),
          (7200.0, 3600.0, "h"), (259200.0, 86400.0, "d")),
    "bytes": ((0.0, 1.0, "B"), (1e3, 1e3, "kB"), (1e6, 1e6, "MB"), (1e9, 1e9, "GB"), (1e12, 1e12, "TB")),
    "bytes/s": ((0.0, 1.0, "B/s"), (1e3, 1e3, "kB/s"), (1e6, 1e6, "MB/s"), (1e9, 1e9, "GB/s"), (1e12, 1e12, "TB/s")),
    "J": ((0.0, 1e-3, "mJ"), (1.0, 1.0, "J"), (1e3, 1e3, "kJ"), (1e6, 1e6, "MJ"), (1e9, 1e9, "GJ")),
    "W": ((0.0, 1.0, "W"), (1e4, 1e3, "kW"), (1e6, 1e6, "MW")),
}  # fmt: skip


def significant(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits, thousands separated, never in exponent form below 1e15."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    # The exponent of the rounded value: 999.6 has four digits before the point once it is 1,000.
    exponent = int(f"{value:.{digits - 1}e}".rpartition("e")[2])
    if exponent >= 15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def axis_unit(unit: str, largest: float) -> tuple[float, str]:
    """The size and name of the unit in which an axis up to `largest` is easiest to read."""
    scales = _SCALES.get(unit)
    if scales is None:
        return 1.0, {"": "", "USD": "$"}.get(unit, unit)
    # Three significant digits decide, so that 999.7 ms becomes 1.00 s and not 1,000 ms.
    shown = float(f"{abs(largest):.2e}")
    if shown == 0:
        return 1.0, unit.replace("bytes", "B")
    _, size, name = next(scale for scale in reversed(scales) if shown >= scale[0])
    return size, name


def human(value: float | None, unit: str) -> str:
    """A value in SI with its unit, as text: `412 ms`, `61.5%`, `$0.83`; `–` for a missing one."""
    if value is None:
        return "–"
    if unit == "fraction":
        return f"{_percent(100.0 * value)}%"
    if unit == "USD":
        return f"${value:,.2f}" if abs(value) >= 10 else f"${significant(value)}"
    size, name = axis_unit(unit, value)
    number = f"{value:,}" if isinstance(value, int) and size == 1.0 else significant(value / size)
    return f"{number} {name}".rstrip()


def human_band(band: Sequence[float | None] | None, value: float | None, unit: str) -> str:
    """A 5-95% band in the unit of its value: `[120, 201]`; empty without a band, `∞` for no upper limit."""
    if band is None or value is None:
        return ""
    size = 0.01 if unit == "fraction" else axis_unit(unit, value)[0]
    ends = ["∞" if end is None else significant(end / size) for end in band]
    return f"[{', '.join(ends)}]"


def _percent(value: float) -> str:
    """One decimal, more where it decides: 0.02% is not 0% and 99.97% is not 100%."""
    if value in {0.0, 100.0}:
        return f"{value:.0f}"
    if 0.0 < value < 0.005:
        return "<0.01"
    if 1.0 <= value < 99.0:
        return f"{value:.1f}"
    return significant(value, 2) if value < 1.0 else f"{min(value, 99.99) if value < 100.0 else value:.2f}"


def words(key: str) -> str:
    """A label made of a JSON key: `attention_decode` becomes `Attention decode`; names such as HBM keep capitals."""
    special = {"hbm": "HBM", "kv": "KV", "gpu": "GPU", "lm": "LM", "moe": "MoE", "tp": "TP", "cuda": "CUDA",
               "nvlink": "NVLink", "pcie": "PCIe", "slo": "SLO", "gpus": "GPUs", "usd": "USD",
               "xgmi": "xGMI", "hccs": "HCCS", "ici": "ICI", "infiniband": "InfiniBand"}  # fmt: skip
    parts = [special.get(part, part) for part in key.replace("-", "_").split("_") if part]
    text = " ".join(parts)
    return text[:1].upper() + text[1:]
