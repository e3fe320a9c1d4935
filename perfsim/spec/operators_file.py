"""Reads `hardware/calibration/operators/<device>.yaml`: fitted curves of one device, with their provenance."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Spec
from perfsim.spec.curves import (
    DecodeCurve,
    ExpertCurve,
    GemmCurve,
    LinkCurve,
    MixedCurve,
    OperatorCurves,
    PrefillCurve,
    StreamCurve,
)
from perfsim.spec.engine_version import EngineVersion, standing_for
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

FOLDER = "operators"


class Prior(Spec):
    """The curve that another one was moved from, because its own rows are of few shapes.

    `sha256` is that of the rows of that curve, `median` and `p90` its errors on the rows of the other version, and
    `moved_median` what the moved curve misses on shapes of the prior's version that were not fitted.
    """

    version: str
    sha256: str
    between_versions: float = Field(gt=0, description="standard deviation of ln(coefficient) between versions")
    median: float
    p90: float
    moved_median: float


class CurveFit(Spec):
    """How a curve was fitted and how far it misses; relative errors are absolute values on shapes held out.

    `covariance` is that of the logarithms of the coefficients in the order of `stderr`, as a lower triangle.
    `discrepancy` is the relative standard error of one prediction. `range` holds what was measured, `sha256` is that
    of the fitted rows. `conditions` are coefficients of the benchmark, not of the kernel: how much faster data in the
    L2 cache are, how skewed its routing was.
    """

    version: str
    table: str
    rows: int = Field(gt=0)
    sha256: str
    median: float
    p90: float
    held_out_rows: int
    discrepancy: float
    stderr: dict[str, float]
    range: dict[str, tuple[float, float]]
    covariance: tuple[tuple[float, ...], ...]
    conditions: dict[str, float] = Field(default_factory=dict)
    prior: Prior | None = None


class FittedGemm(CurveFit):
    """A curve of matrix products."""

    curve: GemmCurve


class FittedDecode(CurveFit):
    """A curve of decode attention."""

    curve: DecodeCurve


class FittedPrefill(CurveFit):
    """A curve of prefill attention."""

    curve: PrefillCurve


class FittedMixed(CurveFit):
    """A curve of attention in steps with prompt chunks."""

    curve: MixedCurve


class FittedExperts(CurveFit):
    """A curve of fused experts."""

    curve: ExpertCurve


class FittedLink(CurveFit):
    """A curve of a family of collective algorithms."""

    curve: LinkCurve


class FittedStream(CurveFit):
    """A curve of an elementwise kernel."""

    curve: StreamCurve


class BackendCurves(Spec):
    """Curves of one engine's kernels, by kind of operator and number format."""

    gemm: dict[str, FittedGemm] = Field(default_factory=dict)
    decode: dict[str, FittedDecode] = Field(default_factory=dict)
    prefill: dict[str, FittedPrefill] = Field(default_factory=dict)
    mixed: dict[str, FittedMixed] = Field(default_factory=dict)
    moe: dict[str, FittedExperts] = Field(default_factory=dict)
    collective: dict[str, FittedLink] = Field(default_factory=dict)
    stream: dict[str, FittedStream] = Field(default_factory=dict)


class LeftOut(Spec):
    """Relative errors of one kind when curves of the other devices predict this one."""

    rows: int
    median: float
    p90: float
    discrepancy: float


class OperatorsFile(Spec):
    """All fitted curves of one device; an engine whose kernels were not timed uses those of `default_backend`.

    `versions` holds curves of further versions of a backend's kernels, of some kinds and formats.
    """

    device: str
    source: str
    default_backend: str
    backends: dict[str, BackendCurves]
    left_out: dict[str, LeftOut] = Field(default_factory=dict)
    versions: dict[str, dict[EngineVersion, BackendCurves]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _versions_are_those_of_their_curves(self) -> Self:
        for backend, versions in self.versions.items():
            if backend not in self.backends:
                raise ValueError(f"versions of '{backend}', which is no backend of this file")
            for version, curves in versions.items():
                fits = [fit for kind in BackendCurves.model_fields for fit in getattr(curves, kind).values()]
                if any(fit.version != version for fit in fits):
                    raise ValueError(f"versions.{backend}.{version} holds a curve of another version")
        return self

    def fits(self, backend: str, kind: str, version: str | None) -> dict[str, Any]:
        """Fits of one kind of a backend's kernels by format, each of the version that stands for `version`."""
        found = dict(getattr(self.backends[backend], kind))
        others = [getattr(curves, kind) for curves in self.versions.get(backend, {}).values()]
        for name in sorted({name for formats in others for name in formats}):
            timed = {each[name].version: each[name] for each in (found, *others) if name in each}
            found[name] = timed[standing_for(version, timed)]
        return found


def load_operators(
    folder: Path, *, device: str, engine: str, borrowed: bool, version: str | None = None
) -> OperatorCurves:
    """The curves of a device for a version of an engine; empty when nothing was fitted to the device.

    Of kernels that were timed in several versions of the engine, `perfsim.spec.engine_version.standing_for` says which
    count; None are the newest.

    Where another device borrows them, their discrepancy is that of predicting a device that was left out, and
    collectives are not among them.
    """
    path = folder / FOLDER / f"{device}.yaml"
    if not path.is_file():
        return OperatorCurves()
    content = validated(OperatorsFile, load_yaml(path), where=str(path))
    backend = engine if engine in content.backends else content.default_backend
    # What was not timed of this engine's kernels is taken from the default's, then from any other's.
    order = [name for name in sorted(content.backends) if name not in (backend, content.default_backend)]
    order += [content.default_backend, backend]
    fits = {
        kind: {
            name: fit
            for each in order
            for name, fit in content.fits(each, kind, version if each == engine else None).items()
        }
        for kind in BackendCurves.model_fields
    }
    curves: dict[str, Any] = {
        kind: {name: fitted.curve for name, fitted in formats.items()} for kind, formats in fits.items()
    }
    versions = sorted({fitted.version for formats in fits.values() for fitted in formats.values()})
    discrepancy = {kind: median(fit.discrepancy for fit in same.values()) for kind, same in fits.items() if same}
    if borrowed:
        curves["collective"] = {}  # they belong to the links of the node, not to the GPU
        discrepancy.pop("collective", None)
        # Never surer than on the device itself, whose formats may be harder than those that could be left out.
        for kind, left in content.left_out.items():
            discrepancy[kind] = max(left.discrepancy, discrepancy.get(kind, 0.0))
    source = f"{backend} {', '.join(versions)} kernels on {device}"
    return OperatorCurves(source=source, discrepancy=discrepancy, **curves)
