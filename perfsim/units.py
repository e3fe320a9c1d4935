"""SI constants and the parsing of quantities such as "80GB", "500ms" or "3.35 TB/s".

Inside perfsim every number is a plain SI float: seconds, bytes, bytes/s, FLOP/s, watts. Decimal and binary
prefixes are different units (GB = 1e9 bytes, GiB = 2**30 bytes) and are never mixed.
"""

from __future__ import annotations

import math
import re

from perfsim.errors import InputError

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
KIB, MIB, GIB, TIB = 2.0**10, 2.0**20, 2.0**30, 2.0**40
MICROSECOND, MILLISECOND = 1e-6, 1e-3
HOUR, DAY = 3600.0, 86400.0

_BYTES = {
    "B": 1.0, "KB": KB, "MB": MB, "GB": GB, "TB": TB, "PB": 1e15,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB, "PIB": 2.0**50,
}  # fmt: skip
_SECONDS = {"NS": 1e-9, "US": 1e-6, "MS": 1e-3, "S": 1.0, "MIN": 60.0, "H": HOUR, "D": DAY}
_FLOPS = {"FLOP/S": 1.0, "GFLOP/S": 1e9, "TFLOP/S": 1e12, "PFLOP/S": 1e15, "TOP/S": 1e12}
_HERTZ = {"HZ": 1.0, "KHZ": 1e3, "MHZ": 1e6, "GHZ": 1e9}
_WATTS = {"W": 1.0, "KW": 1e3, "MW": 1e6}

UNITS: dict[str, dict[str, float]] = {
    "bytes": _BYTES,
    "bytes/s": {f"{unit}/S": scale for unit, scale in _BYTES.items()},
    "seconds": _SECONDS,
    "FLOP/s": _FLOPS,
    "hertz": _HERTZ,
    "watts": _WATTS,
}
_EXAMPLE = {
    "bytes": "80GB", "bytes/s": "3.35TB/s", "seconds": "500ms",
    "FLOP/s": "989TFLOP/s", "hertz": "1.41GHz", "watts": "700W",
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([a-zA-Zµ/]*)\s*\Z")


def parse_quantity(text: str | float | int, dimension: str) -> float:
    """The SI value of a quantity: a bare number is already SI, text may carry one of the units of `dimension`.

    `dimension` is a key of `UNITS`. Raises InputError on an unknown or wrong unit, NaN and infinity.
    """
    if isinstance(text, bool):
        raise InputError(f"expected {dimension} such as '{_EXAMPLE[dimension]}', got {text}")
    if isinstance(text, (int, float)):
        value = float(text)
    else:
        match = _QUANTITY.match(text)
        if match is None:
            raise InputError(f"expected {dimension} such as '{_EXAMPLE[dimension]}', got '{text[:60]}'")
        number, unit = match.groups()
        scale = 1.0 if not unit else UNITS[dimension].get(unit.upper().replace("µ", "U"))
        if scale is None:
            valid = ", ".join(UNITS[dimension])
            raise InputError(f"'{unit}' is not a unit of {dimension}; expected one of {valid}")
        value = float(number) * scale
    if not math.isfinite(value):
        raise InputError(f"expected a finite number of {dimension}, got {text}")
    return value
