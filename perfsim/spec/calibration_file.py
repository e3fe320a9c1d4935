"""Reads `hardware/calibration/*.yaml`: coefficients of every device and engine, of which a scenario takes one each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from perfsim.errors import InputError, nearest
from perfsim.spec.base import Spec
from perfsim.spec.calibration import Calibration, DeviceEfficiency, EngineProfile, PowerModel
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml


class CalibrationFile(Spec):
    """All coefficients of one source.

    `borrow` names, for a device without coefficients of its own, the one whose curves it uses; a device that is in
    neither uses those of `default`.
    """

    status: Literal["first-guess", "fitted"]
    source: str
    power: PowerModel
    engines: dict[str, EngineProfile] = Field(min_length=1)
    devices: dict[str, DeviceEfficiency] = Field(min_length=1)
    borrow: dict[str, str] = Field(default_factory=dict)
    default: str


def load_calibration(path: Path, *, accelerator: str, engine: str) -> Calibration:
    """The coefficients for one accelerator and one engine profile.

    Raises InputError when the file is malformed, borrows from an unknown device, or has no such engine profile.
    """
    content = validated(CalibrationFile, load_yaml(path), where=str(path))
    if engine not in content.engines:
        valid = ", ".join(sorted(content.engines))
        raise InputError(
            f"engine: unknown profile '{engine}'; expected one of {valid}{nearest(engine, content.engines)}"
        )
    owner = accelerator if accelerator in content.devices else content.borrow.get(accelerator, content.default)
    if owner not in content.devices:
        raise InputError(f"{path}: '{accelerator}' borrows from '{owner}', which has no coefficients")
    return Calibration(
        status=content.status,
        source=content.source,
        device=content.devices[owner],
        borrowed_from=None if owner == accelerator else owner,
        engine=content.engines[engine],
        power=content.power,
    )
