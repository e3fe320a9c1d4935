"""How tables name devices, models and weight formats, and how their runs were driven: data with sources, read once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfsim.spec import catalog
from perfsim.spec.engine_version import checked
from perfsim.spec.yaml import load_yaml

if TYPE_CHECKING:
    from perfsim.spec.hardware import Accelerator
    from perfsim.spec.model import ModelArch

FACTS = Path(__file__).with_name("facts.yaml")
_FLOAT = re.compile(r"fp[48](?!\d)")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class InexpressibleError(Exception):
    """A run that cannot be expressed; the text is the reason that is counted."""


@cache
def facts(section: str) -> dict[str, Any]:
    """A section of facts.yaml."""
    return dict(load_yaml(FACTS)[section])


@cache
def device(name: str | None) -> str:
    """The accelerator that a table calls `name`; InexpressibleError when perfsim knows none of this name."""
    if not name:
        raise InexpressibleError("no device stated")
    from validation.compare.names import device_named

    accelerators = set(catalog.list_accelerators())
    aliases = {alias: target for alias, target in catalog.aliases("hardware").items() if target in accelerators}
    known = {entry: entry for entry in accelerators} | aliases | facts("devices")
    exact = {alias.lower(): target for alias, target in known.items()}
    found = exact.get(name.lower()) or device_named(name, known)
    if found is None:
        raise InexpressibleError(f"no descriptor of device '{name}'")
    return str(found)


@cache
def model(name: str | None) -> str:
    """The catalogue's name of the model that a table calls `name`; InexpressibleError when there is no descriptor."""
    from perfsim.errors import InputError

    if not name:
        raise InexpressibleError("no model stated")
    from validation.compare.names import model_named

    aliases = {alias.lower(): target for alias, target in facts("models").items()}
    for candidate in (aliases.get(name.lower()), name, model_named(name, catalog.list_models())):
        if candidate is None:
            continue
        try:
            arch(candidate)
        except InputError:
            continue
        return str(candidate)
    raise InexpressibleError(f"no descriptor of model '{name}'")


def has_experts(model: str) -> bool:
    """Whether the model is a mixture of experts."""
    return any(group.mlp is not None and group.mlp.kind == "moe" for group in arch(model).layers)


@cache
def arch(model: str) -> ModelArch:
    """The descriptor of a model of the catalogue."""
    return catalog.model(model)


@cache
def accelerator(name: str) -> Accelerator:
    """The descriptor of an accelerator of the catalogue."""
    return catalog.accelerator(name)


@cache
def node_of(accelerator: str) -> tuple[str, int]:
    """(name, GPUs) of the usual node of an accelerator."""
    node = catalog.node(accelerator)
    return node.name, node.accelerator_count


def version_of(engine: str, version: str | None, *, date: str | None = None) -> dict[str, Any]:
    """What `engine` chose by default in `version`; InexpressibleError when the version, or what it chose, is not known.

    facts.yaml lists (first version, defaults) in order; the last one that is not newer holds. Without a version, those
    that were out by `date` (of the run, 2026-01-31) may have run: what they all chose holds.
    """
    entries = facts("engines").get(engine, ())
    out = [entry for entry in entries if version or not date or str(entry.get("released", "")) <= date]
    choices = [_choices(entry) for entry in out]
    if choices and all(choice == choices[0] for choice in choices):
        return choices[0]  # the version does not matter
    if not version:
        raise InexpressibleError("engine version not published")
    found: dict[str, Any] | None = None
    for entry in entries:
        # A nightly build is newer than the releases that are listed here: all runs with one are of 2026.
        if version.startswith("nightly") or _number(str(entry["since"])) <= _number(version):
            found = entry
    if found is None:
        raise InexpressibleError(f"defaults of {engine} {version} not known")
    return _choices(found)


def release_of(version: Any) -> str | None:
    """The version of a table as scenarios take it; None, the newest, where none is stated or a nightly build is."""
    try:
        return None if version is None else str(checked(version))
    except ValueError:
        return None


def check_plan(row: Mapping[str, Any], *, engine: str) -> None:
    """InexpressibleError where the plans of the sweep that a row is from were not recorded, whatever is stated.

    Also where it may be from such a sweep, because the day or another fact of the run was not published.
    """
    for sweep in facts("unrecorded_plans")["sweeps"]:
        missing = _missing_of_sweep(row, sweep, engine=engine)
        if missing == "":
            raise InexpressibleError("plan not published: the sizes of this sweep are placeholders")
        if missing:
            raise InexpressibleError(f"plan not published: the sizes are placeholders in some sweeps, no {missing}")


def check_drafts(row: Mapping[str, Any], *, engine: str) -> None:
    """InexpressibleError where runs of the sweep that a row is from drafted tokens, or may have.

    A row without a date or a precision may be from each sweep that it fits otherwise.
    """
    known = facts("drafted_sweeps")
    shapes = {arch(model(name)).name for name in known["models"]}
    if row.get("origin") not in known["origins"] or arch(model(row["model_path"])).name not in shapes:
        return
    for sweep in known["sweeps"]:
        missing = _missing_of_sweep(row, sweep, engine=engine)
        if missing is None:
            continue
        if missing:
            raise InexpressibleError(f"whether tokens were drafted not published: some sweeps did, no {missing}")
        if sweep["drafted"] == "all":
            raise InexpressibleError("acceptance of drafts not published")
        raise InexpressibleError("whether tokens were drafted not published: some runs of the sweep did")


def _missing_of_sweep(row: Mapping[str, Any], sweep: Mapping[str, Any], *, engine: str) -> str | None:
    """The fact without which a row may or may not be of a sweep; "" where it is, None where it is not."""
    day = str(row.get("measured") or "")[:10]
    label = str(row.get("precision") or "").lower()
    bits = _FLOAT.search(label)  # as the sweeps have it: NVFP4 is fp4
    own = {"engine": engine, "mode": row["mode"], "system": device(row["system"]).partition("-")[0],
           "precision": bits[0] if bits else label, "date": day if _DAY.fullmatch(day) else ""}  # fmt: skip
    stated = {key: str(value) for key, value in sweep.items() if key != "drafted"}
    if any(own[key] and own[key] != value for key, value in stated.items()):
        return None
    return next((key for key in stated if not own[key]), "")


def _choices(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in ("since", "released", "source", "verified")}


def _number(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.lstrip("v").split(".")[:3]:
        digits = ""
        for letter in part:
            if not letter.isdigit():
                break
            digits += letter
        parts.append(int(digits or 0))
    return tuple(parts)
