"""Reads `hardware/calibration/*.yaml`: coefficients of every device and engine, of which a scenario takes one each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from perfsim.errors import InputError, nearest
from perfsim.spec.base import Spec
from perfsim.spec.calibration import Calibration, DeviceEfficiency, EngineProfile, PowerModel
from perfsim.spec.engines_file import fitted_overheads
from perfsim.spec.exchanges_file import load_exchanges
from perfsim.spec.foreign_file import load_foreign
from perfsim.spec.launches_file import launch_host
from perfsim.spec.network_file import with_network
from perfsim.spec.operators_file import FOLDER, load_operators
from perfsim.spec.problems import validated
from perfsim.spec.uncertainty import Spread, Uncertainty, UncertaintyFile
from perfsim.spec.yaml import load_yaml

UNCERTAINTY = "uncertainty.yaml"  # in the folder of the coefficients


class EngineAlias(Spec):
    """An engine that uses the profile of another but for `values`; `note` says what is known about the difference."""

    profile: str
    note: str
    values: dict[str, float | str] = Field(default_factory=dict)


class CalibrationFile(Spec):
    """All coefficients of one source.

    `engine_aliases` names, for an engine without a profile of its own, the one it uses and what that leaves out.
    `borrow` names, for a device without coefficients of its own, the one whose curves it uses; a device that is in
    neither uses those of `default`.
    """

    status: Literal["first-guess", "fitted"]
    source: str
    power: PowerModel
    engines: dict[str, EngineProfile] = Field(min_length=1)
    engine_aliases: dict[str, EngineAlias] = Field(default_factory=dict)
    devices: dict[str, DeviceEfficiency] = Field(min_length=1)
    borrow: dict[str, str] = Field(default_factory=dict)
    default: str


def load_calibration(
    path: Path, *, accelerator: str, engine: str, version: str | None = None, foreign: bool = True
) -> Calibration:
    """The coefficients for one accelerator and one engine profile; not `foreign`: borrowed ones as the lender has them.

    Kernels are those of the engine's `version`, None: the newest. Raises InputError when the file is malformed, borrows
    from an unknown device, or has no such engine profile.
    """
    content = validated(CalibrationFile, load_yaml(path), where=str(path))
    alias = None if engine in content.engines else content.engine_aliases.get(engine)
    name = engine if alias is None else alias.profile
    if name not in content.engines:
        names = sorted({*content.engines, *content.engine_aliases})
        raise InputError(
            f"engine: unknown profile '{engine}'; expected one of {', '.join(names)}{nearest(engine, names)}"
        )
    owner = accelerator if accelerator in content.devices else content.borrow.get(accelerator, content.default)
    if owner not in content.devices:
        raise InputError(f"{path}: '{accelerator}' borrows from '{owner}', which has no coefficients")
    measured = (path.parent / FOLDER / f"{accelerator}.yaml").is_file()
    source = accelerator if measured else owner
    # The engine's own name, so that a saved scenario asks for it again.
    values = {**content.engines[name].model_dump(), **(alias.values if alias else {}), "name": engine}
    if (launch := launch_host(path.parent, accelerator=accelerator)) is not None:
        values["launch_host"] = launch
    profile = validated(EngineProfile, values, where=str(path))
    fitted = fitted_overheads(path.parent, profile, engine=engine)
    curves = load_operators(
        path.parent, device=source, engine=engine, borrowed=source != accelerator, version=version
    )  # fmt: skip
    curves = curves.model_copy(update={"exchange": load_exchanges(path.parent)})
    efficiency = content.devices[owner].model_copy(update={"curves": curves})
    law = load_foreign(path.parent).law(accelerator, lender=owner) if foreign and source != accelerator else None
    if law is not None:
        efficiency = law.carried(efficiency, accelerator=accelerator, engine=engine, version=version)
    return Calibration(
        status=content.status,
        source=content.source,
        device=with_network(efficiency, path.parent),
        borrowed_from=None if owner == accelerator else owner,
        engine=fitted or profile,
        engine_version=version,
        engine_borrowed=None if alias is None else f"starts from the profile of {name}: {alias.note}",
        power=content.power,
        uncertainty=_uncertainty(
            path.parent / UNCERTAINTY, accelerator=accelerator, device=owner, engine=name if fitted is None else engine,
            borrowed=owner != accelerator, engine_borrowed=alias is not None and fitted is None,
            law=None if law is None else law.spread(accelerator=accelerator, engine=engine, version=version),
        ),
    )  # fmt: skip


def _uncertainty(
    path: Path, *, accelerator: str, device: str, engine: str, borrowed: bool, engine_borrowed: bool,
    law: tuple[Spread, bool] | None,
) -> Uncertainty | None:  # fmt: skip
    """How far off the coefficients may be; None where no such file lies beside them."""
    if not path.is_file():
        return None
    content = validated(UncertaintyFile, load_yaml(path), where=str(path))
    return content.resolved(
        accelerator=accelerator, device=device, engine=engine, borrowed=borrowed, engine_borrowed=engine_borrowed,
        law=law,
    )  # fmt: skip
