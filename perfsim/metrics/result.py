"""The one output type, and its canonical JSON: equal results give equal bytes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from perfsim.errors import InputError, nearest

SCHEMA_VERSION = 1

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Everything one run found out, as plain JSON values in SI units.

    `scenario` is the resolved scenario; `metrics`, `curves` (latency quantiles at `curves.probability`), `timeline`
    and `simulation` come from `metrics.aggregate`. `breakdown` is seconds per component and sums to the makespan,
    `bound` the share of busy time per limiting resource, `memory` bytes per GPU. `provenance` says where the
    coefficients come from and which are unverified. `bands` has, per path of a headline metric, its 5% and 95%
    quantiles, None for no upper limit (`run.quantify`; empty without). `replicas` has one entry per replica of a
    service (name, group, role, requests, output_tokens, busy_fraction, mean_batch, kv_peak_fraction, prefix_hit_rate,
    preemptions, failures), none for a single engine. Missing values are None. No clock, host or path is in it.
    Construction copies every field to plain values; raises ValueError on NaN and infinity, TypeError on other types.
    """

    perfsim_version: str
    scenario: Json
    scenario_hash: str
    seed: int
    metrics: Json
    breakdown: dict[str, float]
    bound: dict[str, float]
    memory: dict[str, float]
    cost: Json
    energy: Json
    timeline: Json
    curves: Json
    simulation: Json
    provenance: Json
    warnings: list[str] = field(default_factory=list)
    replicas: list[Json] = field(default_factory=list)
    bands: dict[str, list[float | None]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for part in fields(self):
            object.__setattr__(self, part.name, plain(getattr(self, part.name), part.name))

    def to_dict(self) -> Json:
        """A fresh dict of all fields, safe to change."""
        return {part.name: plain(getattr(self, part.name), part.name) for part in fields(self)}

    def to_json(self) -> str:
        """Canonical JSON text, ending in a newline."""
        return canonical_json(self.to_dict())

    def value(self, path: str) -> float | None:
        """The number at a metric path such as `ttft.p95` or `cost.usd`; None when the run has no such value.

        Raises InputError, with the nearest valid path, when there is no such metric.
        """
        numbers = self.numbers()
        if path not in numbers:
            raise InputError(f"no metric '{path}' in this result{nearest(path, numbers)}")
        return numbers[path]

    def numbers(self) -> dict[str, float | None]:
        """Every scalar metric by path, in the order of `result.json`: metrics first, then the other parts."""
        found = _numbers(self.metrics, "")
        for part in ("breakdown", "bound", "memory", "cost", "energy", "simulation"):
            found.update(_numbers(getattr(self, part), f"{part}."))
        return found


def _numbers(tree: Json, prefix: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found.update(_numbers(value, f"{prefix}{key}."))
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found[prefix + key] = value
    return found


def plain(value: Any, where: str) -> Any:
    """A deep copy in dict, list, str, bool, int, float and None; NumPy scalars and arrays become these.

    Raises ValueError on a non-finite float and TypeError on any other type, naming the place `where`.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}, which is not a string")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; a result holds finite numbers or None")
        return value + 0.0  # -0.0 becomes 0.0
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def canonical_json(data: Any) -> str:
    """JSON with sorted keys, `repr` floats and one line per list of scalars, ending in a newline; NaN is an error."""
    return _encode(data, "\n") + "\n"


def _encode(value: Any, newline: str) -> str:
    inner = newline + "  "
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(key)}: {_encode(value[key], inner)}" for key in sorted(value))
        return "{" + inner + f",{inner}".join(items) + newline + "}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[" + inner + f",{inner}".join(_encode(item, inner) for item in value) + newline + "]"
    return json.dumps(value, allow_nan=False)
