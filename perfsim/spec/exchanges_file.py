"""Reads `hardware/calibration/exchanges.yaml`: fitted curves of expert exchanges, with their provenance."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.curves import ExchangeCurve
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

EXCHANGES = "exchanges.yaml"  # in the folder of the coefficients


class ExchangeMiss(Spec):
    """Absolute relative errors of some rows."""

    rows: int = Field(gt=0)
    median: float
    p90: float


class FittedExchange(Spec):
    """A curve, how it was fitted and how far it misses.

    `stderr` is of each coefficient, clustered by system and shape; 0 where it lies at a bound. `covariance` is that of
    the logarithms of the coefficients in the order of `stderr`, as a lower triangle. `range` holds what was measured,
    `sha256` is that of the fitted rows, `median` and `p90` are absolute relative errors on them, also `by_nodes`;
    `left_out` has those of a system that a fit to the others predicts.
    """

    curve: ExchangeCurve
    rows: int = Field(gt=0)
    sha256: str
    median: float
    p90: float
    by_nodes: dict[int, ExchangeMiss]
    left_out: dict[str, ExchangeMiss]
    range: dict[str, tuple[float, float]]
    stderr: dict[str, float]
    covariance: tuple[tuple[float, ...], ...]


class ExchangesFile(Spec):
    """Curves by kernels and direction, pooled over all systems that were measured."""

    source: str
    versions: str
    exchanges: dict[str, FittedExchange]


def load_exchanges(folder: Path) -> dict[str, ExchangeCurve]:
    """The curves of a folder of coefficients; none where it has no such file. InputError when that is malformed."""
    path = folder / EXCHANGES
    if not path.is_file():
        return {}
    content = validated(ExchangesFile, load_yaml(path), where=str(path))
    return {name: fitted.curve for name, fitted in content.exchanges.items()}
