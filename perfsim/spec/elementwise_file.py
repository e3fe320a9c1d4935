"""Reads `hardware/calibration/elementwise.yaml`: norms, activations and samplers of layers as they were timed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.operators_file import FittedStream
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

FILE = "elementwise.yaml"  # in the folder of the coefficients


class LeftOut(Spec):
    """Absolute relative errors on rows that a fit to others predicts."""

    rows: int = Field(gt=0)
    median: float
    p90: float


class DeviceLeftOut(LeftOut):
    """Errors on all rows of a device that coefficients of other devices predict."""

    fitted_on: tuple[str, ...]


class FittedKernel(FittedStream):
    """One family of kernels on one device; `conditions` are how the L2 cache served it.

    `width_left_out` has every width (bytes per token) predicted by a fit to the others, `left_out` the device.
    """

    width_left_out: LeftOut | None = None
    left_out: DeviceLeftOut | None = None


class ElementwiseFile(Spec):
    """Fits by software, device and family."""

    source: str
    backends: dict[str, dict[str, dict[str, FittedKernel]]]


@cache
def load_elementwise(folder: Path) -> ElementwiseFile:
    """The file in this folder of coefficients; InputError where it is malformed."""
    path = folder / FILE
    return validated(ElementwiseFile, load_yaml(path), where=str(path))
