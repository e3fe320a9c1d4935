"""Reads `hardware/calibration/foreign.yaml`: how curves carry over to another maker's devices and their software."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import OperatorCurves
from perfsim.spec.engine_version import EngineVersion, age
from perfsim.spec.problems import validated
from perfsim.spec.uncertainty import Spread
from perfsim.spec.yaml import load_yaml

FOREIGN = "foreign.yaml"  # in the folder of the coefficients
# Coefficients by the end of their name. Shapes, and what one SM does with a tile, stay.
FIXED = frozenset(("launch", "hop", "ramp", "peer", "line", "handshake"))
STREAMED = frozenset(("bandwidth", "quantise_bandwidth"))
SPEEDS = frozenset(("sm_bandwidth",))  # which no datasheet limits
LINKS = ("collective_", "network_", "in_switch_")  # their bandwidth is that of links, not of HBM

SomeSpec = TypeVar("SomeSpec", bound=Spec)


class FittedFactor(Spec):
    """A factor on what the lender's kernels do, with the standard error of its logarithm."""

    value: float = Field(gt=0, le=20)
    stderr: float = Field(ge=0)


class VersionFactor(Spec):
    """The factor on fixed times of one version of a stack's engine; `engine_version` where that was published."""

    launch: float = Field(gt=0, le=20)
    engine_version: EngineVersion | None = None


class ForeignDevice(Spec):
    """`compute` is the share of its datasheet that the device's best product reaches over that of the lender."""

    compute: float = Field(gt=0, le=4)
    source: str


class Missed(Spec):
    """Absolute relative errors of the time per token; every version and load weighs the same."""

    rows: int = Field(gt=0)
    median: float
    mean: float


class StackLaw(Spec):
    """What a software stack makes of kernels that were timed on `lender`: few factors for all of its devices.

    Fixed times of kernels (launches, steps between GPUs, filling the memory system) are `launch` times as long, shares
    of memory bandwidth are divided by `bandwidth`, shares of the arithmetic peak are multiplied by a device's
    `compute`, which is published and not fitted. `versions` are the factors of fixed times of each software version:
    `launch` is their geometric mean, `between` the standard deviation of their logarithms. `covariance` is that of the
    logarithms of `launch` and `bandwidth`, as a lower triangle. `discrepancy` is the root mean square of ln(measured /
    predicted) of versions left out, `own_discrepancy` that of lengths left out where the version is known. `measured`
    are the devices whose runs were fitted, on `engine`.
    """

    lender: str
    engine: str
    measured: tuple[str, ...]
    devices: dict[str, ForeignDevice]
    launch: FittedFactor
    bandwidth: FittedFactor
    covariance: tuple[tuple[float, ...], ...]
    versions: dict[str, VersionFactor]
    between: float
    discrepancy: float = Field(ge=0, le=2)
    own_discrepancy: float = Field(ge=0, le=2)
    source: str
    rows: int = Field(gt=0)
    sha256: str
    range: dict[str, tuple[float, float]]
    fitted: Missed
    left_out: dict[str, Missed]
    kept_out: Missed

    def known(self, engine: str, version: str | None) -> VersionFactor | None:
        """The factor of this very version; what stands between two that were seen is none of them."""
        if engine != self.engine or version is None:
            return None
        own = (each for each in self.versions.values() if each.engine_version is not None)
        return next((each for each in own if age(each.engine_version or "") == age(version)), None)

    def carried(
        self, device: DeviceEfficiency, *, accelerator: str, engine: str, version: str | None = None
    ) -> DeviceEfficiency:  # fmt: skip
        """The lender's efficiencies as this stack has them on `accelerator`: in a known version, or the mean of all."""
        known = self.known(engine, version)
        return carried(
            device, launch=self.launch.value if known is None else known.launch, bandwidth=self.bandwidth.value,
            compute=self.devices[accelerator].compute,
        )  # fmt: skip

    def spread(self, *, accelerator: str, engine: str, version: str | None = None) -> tuple[Spread, bool]:
        """What times of this stack miss, and whether runs of this device with this engine were among the fitted."""
        seen = accelerator in self.measured and engine == self.engine
        if self.known(engine, version) is None:
            return Spread(sigma=self.discrepancy, source=f"runs, versions left out: {self.source}"), seen
        return Spread(sigma=self.own_discrepancy, source=f"runs, lengths left out: {self.source}"), seen


class ForeignFile(Spec):
    """All laws by software stack."""

    stacks: dict[str, StackLaw]

    def law(self, accelerator: str, *, lender: str) -> StackLaw | None:
        """The law of the stack that runs on this device, for curves of `lender`; None where there is none."""
        laws = (law for law in self.stacks.values() if accelerator in law.devices and law.lender == lender)
        return next(laws, None)


def load_foreign(folder: Path) -> ForeignFile:
    """The laws in a folder of coefficients; none where it has no such file. InputError for a malformed one."""
    path = folder / FOREIGN
    if not path.is_file():
        return ForeignFile(stacks={})
    return validated(ForeignFile, load_yaml(path), where=str(path))


def carried(device: DeviceEfficiency, *, launch: float, bandwidth: float, compute: float) -> DeviceEfficiency:
    """Efficiencies with fixed times `launch` times as long, bandwidth over `bandwidth`, arithmetic times `compute`.

    No share exceeds that of the datasheet. Links inside a node keep their bandwidth, DeepEP's kernels all they have.
    """

    def changed(spec: SomeSpec, *, links: bool = False) -> SomeSpec:
        changes: dict[str, Any] = {}
        for name in type(spec).model_fields:
            value = getattr(spec, name)
            part = name if name in FIXED | STREAMED | SPEEDS else name.rpartition("_")[2]
            if value is None:
                continue
            if part in FIXED:
                changes[name] = value * launch
            elif name == "decode_attention":
                changes[name] = tuple((at, min(1.0, share / bandwidth)) for at, share in value)
            elif part == "compute":
                changes[name] = min(1.0, value * compute)
            elif part in SPEEDS:
                changes[name] = value / bandwidth
            elif part in STREAMED and not links and not name.startswith(LINKS):
                changes[name] = min(1.0, value / bandwidth)
        return spec.model_copy(update=changes)

    curves = {
        kind: {name: changed(curve, links=kind == "collective") for name, curve in found.items()}
        for kind in OperatorCurves.model_fields
        if kind not in ("source", "discrepancy", "exchange") and (found := getattr(device.curves, kind))
    }
    source = device.curves.source
    if source:
        source += f"; fixed times x {launch:.2f}, bandwidth / {bandwidth:.2f}, arithmetic x {compute:.2f}"
    return changed(device).model_copy(update={"curves": device.curves.model_copy(update={**curves, "source": source})})
