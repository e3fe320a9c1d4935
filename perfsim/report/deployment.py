"""The replicas of a resolved scenario in words: how many of which GPUs, in which groups, behind which router."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from perfsim.report.format import human, words

if TYPE_CHECKING:
    Rows = list[tuple[str, str]]
    Json = dict[str, Any]

_AXES = ("tp", "pp", "dp")
_SECONDS = frozenset(("mtbf", "repair", "interval", "startup_delay", "scale_down_delay"))


def groups(scenario: Json) -> list[Json]:
    """Groups of replicas, what they leave to the scenario filled in."""
    given = (scenario.get("deployment") or {}).get("groups") or [{"name": "replica", "count": 1, "role": "both"}]
    return [
        {**group, "hardware": group.get("hardware") or scenario["hardware"],
         "parallel": group.get("parallel") or scenario["parallel"]}
        for group in given
    ]  # fmt: skip


def gpus(parallel: Json) -> int:
    """GPUs of one replica."""
    return prod(parallel.get(axis, 1) for axis in _AXES)


def hardware(scenario: Json) -> str:
    """All GPUs by kind, such as `16 × NVIDIA H100 SXM + 8 × NVIDIA L40S`, and into how many replicas they are cut."""
    found: dict[str, int] = {}
    for group in groups(scenario):
        label = group["hardware"]["accelerator"]["label"]
        found[label] = found.get(label, 0) + group["count"] * gpus(group["parallel"])
    text = " + ".join(f"{count:,} × {label}" for label, count in found.items())
    replicas = sum(group["count"] for group in groups(scenario))
    return text if replicas == 1 else f"{text} in {replicas:,} replicas"


def ranks(parallel: Json) -> str:
    """The plan of one replica, such as `TP 8, PP 2`; axes of size one are left out."""
    shown = [f"{axis.upper()} {parallel[axis]}" for axis in (*_AXES, "ep") if parallel.get(axis, 1) > 1]
    return ", ".join(shown) or "1 GPU"


def rows(scenario: Json) -> Rows:
    """Facts about the service; empty for a single replica."""
    service = scenario.get("deployment") or {}
    members = groups(scenario)
    alone = len(members) == 1 and members[0]["count"] == 1
    extras = [key for key in ("autoscaling", "failures") if service.get(key)]
    if alone and not extras:
        return []
    found = [(f"Group {group['name']}", _group(group)) for group in members]
    found.append(("Router", _settings({**service["router"], "kind": words(service["router"]["kind"])})))
    if any(group["role"] == "prefill" for group in members):
        found.append(("KV transfer", _transfer(service["transfer"])))
    found.extend((words(key), _settings(service[key])) for key in extras)
    return found


def _group(group: Json) -> str:
    role = "" if group["role"] == "both" else f" {group['role']}"
    count = f"{group['count']:,}{role} replica{'s' if group['count'] > 1 else ''}"
    label = group["hardware"]["accelerator"]["label"]
    return f"{count} of {gpus(group['parallel'])} × {label} ({ranks(group['parallel'])})"


def _transfer(transfer: Json) -> str:
    speed = transfer.get("bandwidth")
    text = "over the machine's own links" if speed is None else f"{human(speed, 'bytes')}/s per GPU"
    if transfer.get("latency") is not None:
        text += f", {human(transfer['latency'], 's')} each"
    return text + (", layer by layer" if transfer.get("layerwise") else "")


def _settings(settings: Json) -> str:
    kind = settings.get("kind")
    rest = [f"{words(key).lower()} {_value(key, value)}" for key, value in settings.items()
            if key != "kind" and value is not None]  # fmt: skip
    return ", ".join([str(kind), *rest] if kind else rest)


def _value(key: str, value: Any) -> str:
    if key in _SECONDS:
        return human(value, "s")
    return f"{value:g}" if isinstance(value, float) else str(value)
