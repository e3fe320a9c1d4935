"""Shapes of the curves of collectives over measured columns: the formulas of `perfsim.cost.inside`, per family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np

from perfsim.calibrate.bounds import COLLECTIVE, SLOW_START, Bounds
from perfsim.calibrate.rows import Array, Rows
from perfsim.cost.collective import FAMILIES
from perfsim.cost.inside import FITTED
from perfsim.cost.topology import Level, fabric
from perfsim.ops.op import Collective, CollectiveKind
from perfsim.spec.catalog import node
from perfsim.spec.curves import LinkCurve
from perfsim.spec.hardware import Accelerator

# Coefficients that each family has; the others stay 0. In-switch reduction always takes two steps, which its launch
# holds, and one group of two tells no hop from the launch.
RING = ("launch", "hop", "bandwidth", "own", "line", "line_bytes", "handshake", "handshake_bytes")
FREE: dict[str, tuple[str, ...]] = {
    "custom_all_reduce": ("launch", "hop", "bandwidth", "own", "peer", "line", "line_bytes"),
    "nvls_all_reduce": ("launch", "bandwidth"),
    "ring_all_reduce": RING, "all_gather": RING, "reduce_scatter": RING, "all_to_all": RING,
}  # fmt: skip
ACROSS = ("hop", "crossing")  # what takes groups of several sizes to tell
PAIR_ONLY = ("hop", "peer")  # of the engines' own kernels on a host's PCIe, which only pairs use


def families_of(rows: Rows) -> list[str]:
    """The families of algorithms that can run a group of collectives."""
    if rows.format != "all_reduce":
        return [rows.format]
    level = _level(rows.device, int(rows.columns["gpus"].min()))
    own = ["custom_all_reduce"] if (level.direct or level.size == 2) and rows.backend != "nccl" else []
    return [*own, "ring_all_reduce", *(["nvls_all_reduce"] if level.in_switch else [])]


def bounds_of(groups: Iterable[Rows]) -> tuple[Bounds, dict[str, float]]:
    """(bounds of what is free, values of what is not) for one curve per family over rows of one or several devices."""
    bounds: Bounds = {}
    fixed: dict[str, float] = {}
    groups = list(groups)
    for family in dict.fromkeys(family for rows in groups for family in families_of(rows)):
        users = [rows for rows in groups if family in families_of(rows)]
        host = [rows for rows in users if not _switched(rows.device)]
        free = list(FREE[family])
        if host and family != "custom_all_reduce":
            free.append("crossing")
        if family == "custom_all_reduce" and len(host) == len(users):
            free = [name for name in free if name not in PAIR_ONLY]
        for name in free:
            bounds[f"{family}.{name}"] = _bounds(family, name)
        fixed |= {f"{family}.{name}": 0.0 for name in COLLECTIVE if name not in free and not name.endswith("_bytes")}
    return bounds, fixed


def _bounds(family: str, name: str) -> tuple[float, float, float]:
    start, low, high = COLLECTIVE[name]
    if name == "launch" and family in SLOW_START:
        start = SLOW_START[family]
    if name == "own" and family == "ring_all_reduce":  # two passes
        high *= 2
    return start, low, high


def alone(rows: Rows) -> bool:
    """Whether rows are of one size of group on a host's PCIe, so that `ACROSS` has to come from another device."""
    return len(np.unique(rows.columns["gpus"])) == 1 and not _switched(rows.device)


def taken_over(rows: Rows, others: Iterable[tuple[Rows, Mapping[str, float]]]) -> dict[str, float]:
    """Coefficients that rows of collectives take from earlier fits.

    Engines run NCCL's kernels beside their own: those are as NCCL's own benchmark has them on the device. Rows that
    are `alone` take `ACROSS` from the same kernels on another card on PCIe, if any.
    """
    if rows.kind != "collective":
        return {}
    families = families_of(rows)
    nccl = rows.format == "all_reduce" and rows.backend != "nccl"
    known: dict[str, float] = {}
    for other, values in others:
        if other.kind != rows.kind or other.format != rows.format:
            continue
        if nccl and other.device == rows.device and other.backend == "nccl":
            known |= {name: value for name, value in values.items() if name.partition(".")[0] in families}
        if not nccl and alone(rows) and other.backend == rows.backend and not (_switched(other.device) or alone(other)):
            wanted = [f"{family}.{name}" for family in families for name in ACROSS]
            known = {name: values[name] for name in wanted if name in values} | known
    return known


def written(values: Mapping[str, float], rows: Rows, free: Iterable[str]) -> list[str]:
    """Families with a curve of their own: some coefficient is free, in-switch reduction is ever the fastest."""
    families = [family for family in families_of(rows) if any(name.startswith(f"{family}.") for name in free)]
    switch = "nvls_all_reduce"
    if switch in families:
        without = {name: value for name, value in values.items() if not name.startswith(f"{switch}.")}
        if np.array_equal(seconds(values, rows), seconds(without, rows)):
            families.remove(switch)
    return families


def link_kind(device: str) -> str:
    """Switched links, or the host's PCIe: what a device that was left out borrows from."""
    return "switched" if _switched(device) else "host"


def seconds(values: Mapping[str, float], rows: Rows, chip: Accelerator | None = None) -> Array:
    """The fastest algorithm, as `perfsim.cost.collective` chooses it, over the families that have a curve.

    Rows name their device, so that `chip` says nothing new.
    """
    kind = _kind(rows.format)
    curves = {family: LinkCurve.model_construct(None, **own)
              for family, own in _by_family(values).items() if "launch" in own}  # fmt: skip
    result: Array = np.empty(len(rows))
    for gpus in np.unique(rows.columns["gpus"]):
        at = rows.columns["gpus"] == gpus
        work = Collective(kind, rows.format, 1, rows.columns["bytes"][at], int(gpus))
        level = _level(rows.device, int(gpus))
        found = [FITTED[kind][name](work, level, curves[family])
                 for name, family in FAMILIES[kind].items() if family in curves and name in FITTED[kind]]  # fmt: skip
        result[at] = np.min([np.asarray(each) for each in found if each is not None], axis=0)
    return result


def _by_family(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Coefficients by family, with the defaults of `LinkCurve`, which are not set by a curve that is not validated."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        family, _, coefficient = name.partition(".")
        found.setdefault(family, dict(DEFAULTS))[coefficient] = value
    return found


DEFAULTS = {name: field.default for name, field in LinkCurve.model_fields.items() if not field.is_required()}


@cache
def _level(device: str, gpus: int) -> Level:
    return fabric(node(device)).path(gpus)[0]


def _switched(device: str) -> bool:
    return _level(device, 4).direct


def _kind(name: str) -> CollectiveKind:
    kinds: dict[str, CollectiveKind] = {kind: kind for kind in FAMILIES}
    return kinds[name]
