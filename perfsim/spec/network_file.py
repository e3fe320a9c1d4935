"""Reads `hardware/calibration/network.yaml`: what NCCL achieves over the network cards between nodes."""

from __future__ import annotations

from pathlib import Path

from perfsim.spec.base import Spec
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import NETWORK
from perfsim.spec.operators_file import FittedLink
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

FILE = "network.yaml"  # in the folder of the coefficients


class SourceErrors(Spec):
    """Rows of one source and what the curve misses on them; `left_out`, what one fitted to the others misses.

    `guess` are the errors without a curve. Medians of absolute relative errors.
    """

    rows: int
    median: float
    left_out: float
    guess: float


class NetworkFile(FittedLink):
    """The curve of the network; `median` and `p90` are errors on sources that were left out."""

    source: str
    sources: dict[str, SourceErrors]


def with_network(device: DeviceEfficiency, folder: Path) -> DeviceEfficiency:
    """The efficiencies with the curve of the network in this folder of coefficients, if it has one.

    Network cards and the software that drives them do not belong to the GPU, so that every device has it.
    """
    path = folder / FILE
    if not path.is_file():
        return device
    content = validated(NetworkFile, load_yaml(path), where=str(path))
    curves = {
        "collective": {**device.curves.collective, NETWORK: content.curve},
        "discrepancy": {**device.curves.discrepancy, NETWORK: content.discrepancy},
    }
    return device.model_copy(update={"curves": device.curves.model_copy(update=curves)})
