"""Reads `hardware/calibration/engines/<engine>.yaml`: overheads of one engine that were fitted to measured runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.calibration import EngineProfile
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

ENGINES_FOLDER = "engines"


class FittedOverhead(Spec):
    """A field of `EngineProfile` in its SI unit, with its standard error."""

    value: float = Field(ge=0)
    stderr: float = Field(ge=0)


class EngineFile(Spec):
    """Overheads that replace those of a profile, how they were fitted, and what they miss.

    `covariance` is that of the coefficients in their order, as a lower triangle. `sha256` is that of the fitted rows,
    `range` what they span. `median` and `mean` are absolute relative errors of the time per token, of runs that were
    fitted and (`left_out_*`) of those of a model on a device that was left out of the fit.
    """

    engine: str
    versions: str
    source: str
    coefficients: dict[str, FittedOverhead]
    covariance: tuple[tuple[float, ...], ...]
    rows: int = Field(gt=0)
    sha256: str
    range: dict[str, tuple[float, float]]
    median: float
    mean: float
    left_out_median: float
    left_out_mean: float


def fitted_overheads(folder: Path, profile: EngineProfile, *, engine: str) -> EngineProfile | None:
    """The profile of `engine`: `profile` with what was fitted in its place; None where nothing was.

    Raises InputError for a malformed file and for a coefficient that a profile has not.
    """
    path = folder / ENGINES_FOLDER / f"{engine}.yaml"
    if not path.is_file():
        return None
    content = validated(EngineFile, load_yaml(path), where=str(path))
    values = {name: fitted.value for name, fitted in content.coefficients.items()}
    return validated(EngineProfile, {**profile.model_dump(), **values, "name": engine}, where=str(path))
