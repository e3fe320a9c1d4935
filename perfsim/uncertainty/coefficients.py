"""A calibration whose work takes longer or shorter by a factor per kind of operator: what one draw of the truth is.

Times are multiplied and rates divided. A rate stops at the datasheet's, so a draw may be slow without limit but never
faster than the speed of light: kernels that are good already have little to gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from perfsim.spec.base import Spec
from perfsim.spec.calibration import Calibration, DeviceEfficiency
from perfsim.spec.curves import NETWORK
from perfsim.spec.uncertainty import KINDS, OperatorKind

# What a coefficient is, by the name of its field without the kind of operator; all others are shapes and stay.
TIMES = frozenset(("launch", "hop", "ramp", "tile", "row_seconds", "wide", "kv_tile", "column", "empty", "peer",
                   "line", "handshake"))  # fmt: skip
RATES = frozenset(("bandwidth", "compute", "quantise_bandwidth", "link_bandwidth", "network_bandwidth"))
SPEEDS = frozenset(("sm_bandwidth",))  # which no datasheet limits
KIND_OF_CURVES: dict[str, OperatorKind] = {
    "gemm": "gemm", "moe": "moe", "prefill": "prefill_attention", "decode": "decode_attention",
    "mixed": "decode_attention",  # whose tiles take the time of prefill attention, so that both factors reach them
    "collective": "collective", "exchange": "collective", "stream": "elementwise",
}  # fmt: skip
HOST_TIMES = ("step_host", "schedule_host", "sequence_host", "token_host", "ingress", "egress")

SomeSpec = TypeVar("SomeSpec", bound=Spec)


def slower(
    calibration: Calibration, *, kinds: Mapping[OperatorKind, float], host: float = 1.0, launch: float = 1.0,
    power: float = 1.0,
) -> Calibration:  # fmt: skip
    """The calibration with every time of a kind multiplied by its factor, rates capped at those of the datasheet.

    `host` multiplies host terms and client latency, `launch` the time to launch a kernel, `power` the energy above
    idle, up to the power limit.
    """
    engine, model = calibration.engine, calibration.power
    hosts = {name: getattr(engine, name) * host for name in HOST_TIMES}
    return calibration.model_copy(
        update={
            "device": slower_device(calibration.device, kinds),
            "engine": _updated(engine, {**hosts, "launch_host": engine.launch_host * launch}),
            "power": _updated(
                model, {name: min(1.0, getattr(model, name) * power) for name in type(model).model_fields}
            ),
        }
    )


def slower_device(device: DeviceEfficiency, kinds: Mapping[OperatorKind, float]) -> DeviceEfficiency:
    """The efficiencies with a factor on the time of each kind in `kinds`; others stay as they are."""
    changes: dict[str, Any] = {}
    for name in type(device).model_fields:
        kind = kind_of(name)
        if kind is not None and kind in kinds:
            changes[name] = _coefficient(name, getattr(device, name), kinds[kind])
    changes["curves"] = _updated(
        device.curves,
        {
            name: {
                key: _curve(curve, kinds.get("network" if key == NETWORK else kind, 1.0))
                for key, curve in getattr(device.curves, name).items()
            }
            for name, kind in KIND_OF_CURVES.items()
            if name in type(device.curves).model_fields
        },
    )
    return _updated(device, changes)


def kind_of(field: str) -> OperatorKind | None:
    """The kind of operator whose time a field of `DeviceEfficiency` sets; None for one that is not a coefficient."""
    if field.startswith("in_switch_"):
        return "collective"
    return next((kind for kind in KINDS if field.startswith(kind)), None)


def _coefficient(name: str, value: Any, factor: float) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):  # knots (work, fraction)
        return tuple((at, min(1.0, fraction / factor)) for at, fraction in value)
    if name.rpartition("_")[2] in TIMES:
        return value * factor
    return min(1.0, value / factor)


def _curve(curve: SomeSpec, factor: float) -> SomeSpec:
    names = [name for name in type(curve).model_fields if getattr(curve, name) is not None]
    times = {name: getattr(curve, name) * factor for name in names if name in TIMES}
    speeds = {name: getattr(curve, name) / factor for name in names if name in SPEEDS}
    rates = {name: min(1.0, getattr(curve, name) / factor) for name in names if name in RATES}
    return _updated(curve, times | speeds | rates)


def _updated(spec: SomeSpec, changes: dict[str, Any]) -> SomeSpec:
    return spec.model_copy(update=changes)
