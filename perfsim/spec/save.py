"""From a resolved Scenario back to a scenario file that reproduces it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration
from perfsim.spec.deployment import Deployment, ReplicaGroup
from perfsim.spec.engine_defaults import resolve_policy
from perfsim.spec.hardware import Node
from perfsim.spec.load import Draft, automatic_name, find_calibration
from perfsim.spec.policy import ServingPolicy
from perfsim.spec.scenario import Scenario
from perfsim.spec.workload import TraceWorkload


def scenario_yaml(scenario: Scenario, *, directory: Path) -> str:
    """The text of a scenario file in `directory` that loads as `scenario`, with every default written out.

    Models and hardware stay names where the catalogue has the very same descriptor, and are written in full where it
    does not. A relative trace path is rewritten to be relative to `directory`; an absolute one stays.
    """
    import yaml

    content = scenario_content(scenario)
    workload = scenario.workload
    if isinstance(workload, TraceWorkload) and _is_relative_file(workload.trace):
        content["workload"]["trace"] = Path(os.path.relpath(workload.trace, directory)).as_posix()
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def replaced(scenario: Scenario, changes: Mapping[str, Any]) -> Scenario:
    """The scenario with other values at some dotted keys; engine defaults are chosen again for what changed."""
    content = scenario_content(scenario)
    content["policy"] = _chosen_policy(scenario)
    if scenario.deployment != Deployment():
        content["deployment"] = deployment_content(scenario, policy=ServingPolicy.model_validate(content["policy"]))
    if scenario.name == automatic_name(scenario.model, parallel=scenario.parallel, node=scenario.hardware):
        content.pop("name")
    draft = Draft(content, source="scenario")
    for key, value in changes.items():
        if key == "workload.trace":
            draft.set_trace(str(value), flag=f"replace({key})")
        else:
            draft.set(key, value, flag=f"replace({key})")
    return draft.resolve()


def scenario_content(scenario: Scenario) -> dict[str, Any]:
    """The content of a scenario file: names where the catalogue knows them, every other value written out."""
    whole = scenario.model_dump(mode="json", exclude_none=True)
    engine = scenario.calibration.engine.name
    content: dict[str, Any] = {"name": scenario.name}
    content["model"] = scenario.model.name if _is_packaged_model(scenario) else whole["model"]
    content["hardware"] = _hardware(scenario, whole)
    for key in ("parallel", "policy", "workload", "slo"):
        content[key] = whole[key]
    if scenario.deployment != Deployment():
        content["deployment"] = deployment_content(scenario, policy=scenario.policy)
    content["slo"] = {metric: bounds for metric, bounds in whole["slo"].items() if bounds}
    content["engine"] = engine
    if scenario.calibration.engine_version is not None:
        content["engine_version"] = scenario.calibration.engine_version
    if _found_calibration(scenario.hardware, engine, scenario.calibration.engine_version) != scenario.calibration:
        content["calibration"] = whole["calibration"]
    content["seed"] = scenario.seed
    if scenario.samples is not None:
        content["samples"] = scenario.samples
    return content


def deployment_content(scenario: Scenario, *, policy: ServingPolicy) -> dict[str, Any]:
    """The deployment as written in a file whose own policy is `policy`: of each group, what the scenario does not say.

    Whatever a group shares with the scenario is left out, so that it follows when the scenario is changed.
    """
    content = scenario.deployment.model_dump(mode="json", exclude_none=True, exclude={"groups"})
    content["groups"] = [_group_content(scenario, group, policy) for group in scenario.deployment.groups]
    return content


def _group_content(scenario: Scenario, group: ReplicaGroup, policy: ServingPolicy) -> dict[str, Any]:
    whole = group.model_dump(mode="json", exclude_none=True)
    content = {key: whole[key] for key in ("name", "count", "role")}
    node, engine = group.hardware or scenario.hardware, scenario.calibration.engine.name
    if node != scenario.hardware:
        content["hardware"] = node.name if _is_packaged(node) else whole["hardware"]
    if group.parallel not in (None, scenario.parallel):
        content["parallel"] = whole["parallel"]
    if group.policy is not None:
        followed = resolve_policy(policy, model=scenario.model, accelerator=node.accelerator)
        own = group.policy.model_dump(mode="json")
        differing = {key: own[key] for key in own if getattr(group.policy, key) != getattr(followed, key)}
        if differing:
            content["policy"] = differing
    calibration = group.calibration or scenario.calibration
    if calibration.engine.name != engine:
        content["engine"] = calibration.engine.name
    followed_version = None if "engine" in content else scenario.calibration.engine_version
    if calibration.engine_version not in (None, followed_version):
        content["engine_version"] = calibration.engine_version
    expected: Calibration | None = scenario.calibration
    if {"hardware", "engine", "engine_version"} & set(content):
        version = content.get("engine_version", followed_version)
        expected = _found_calibration(node, calibration.engine.name, version)
    if calibration != expected:
        content["calibration"] = whole["calibration"]
    return content


def _found_calibration(node: Node, engine: str, version: str | None) -> Calibration | None:
    try:
        return find_calibration(accelerator=node.accelerator.name, engine=engine, version=version)
    except InputError:
        return None


def _chosen_policy(scenario: Scenario) -> dict[str, Any]:
    """The policy without the values that the engine's defaults give anyway."""
    default = resolve_policy(ServingPolicy(), model=scenario.model, accelerator=scenario.hardware.accelerator)
    chosen = scenario.policy.model_dump(exclude_none=True)
    return {key: value for key, value in chosen.items() if value != getattr(default, key)}


def _is_packaged_model(scenario: Scenario) -> bool:
    try:
        return catalog.model(scenario.model.name) == scenario.model
    except InputError:
        return False


def _hardware(scenario: Scenario, whole: Mapping[str, Any]) -> Any:
    """The name of the cluster or node where the catalogue has it, else all of it."""
    machine = scenario.hardware if scenario.cluster is None else scenario.cluster
    try:
        packaged = catalog.machine(machine.name) == machine
    except InputError:
        packaged = False
    return machine.name if packaged else whole["hardware" if scenario.cluster is None else "cluster"]


def _is_packaged(node: Node) -> bool:
    try:
        return catalog.node(node.name) == node
    except InputError:
        return False


def _is_relative_file(trace: str) -> bool:
    path = Path(trace)
    return not path.is_absolute() and catalog.trace_path(trace) == path
