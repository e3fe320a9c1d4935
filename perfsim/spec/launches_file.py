"""Reads `hardware/calibration/launches.yaml`: seconds in which the host of a device launches one kernel."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.engines_file import FittedOverhead
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

LAUNCHES = "launches.yaml"  # in the folder of the coefficients


class LaunchesFile(Spec):
    """Seconds per launch, how they were fitted, and what they miss.

    `ratio` is that of a launch in a decode step to the measured eager launch of the same device, `of_that_engine` the
    host time beside launches of the engine that was profiled. `mean` holds for a device that is not among `devices`,
    `spread` is the standard deviation of the logarithm over these. `median` and `left_out_median` are absolute relative
    errors of decode steps, fitted and of devices left out.
    """

    source: str
    ratio: FittedOverhead
    of_that_engine: dict[str, FittedOverhead]
    mean: FittedOverhead
    devices: dict[str, FittedOverhead]
    spread: float = Field(ge=0)
    rows: int = Field(gt=0)
    sha256: str
    range: dict[str, tuple[float, float]]
    median: float
    left_out_median: float


def launch_host(folder: Path, *, accelerator: str) -> float | None:
    """Seconds per launch of the host of `accelerator`; None where no such file lies in `folder`.

    Raises InputError for a malformed file.
    """
    path = folder / LAUNCHES
    if not path.is_file():
        return None
    content = validated(LaunchesFile, load_yaml(path), where=str(path))
    return content.devices.get(accelerator, content.mean).value
