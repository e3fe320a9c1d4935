"""Deployments in scenario files: groups take what they do not say from the scenario, and are saved that way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from perfsim.errors import InfeasibleError, InputError
from perfsim.spec.deployment import Deployment
from perfsim.spec.load import load_scenario
from perfsim.spec.save import scenario_yaml
from perfsim.spec.scenario import Scenario


def load(tmp_path: Path, deployment: Any, **changes: Any) -> Scenario:
    content: dict[str, Any] = {
        "model": "llama-3.1-8b-instruct",
        "hardware": "h100-80gb-sxm",
        "policy": {"max_model_len": 4096},
        "deployment": deployment,
        "workload": {
            "kind": "synthetic",
            "num_requests": 10,
            "arrivals": {"kind": "poisson", "rate": 1},
            "prompt": {"kind": "fixed", "tokens": 100},
            "output": {"kind": "fixed", "tokens": 10},
        },
    }
    file = tmp_path / "scenario.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return load_scenario(file)


MIXED = {
    "router": {"kind": "prefix_aware"},
    "groups": [
        {"name": "big", "count": 2},
        {"name": "small", "count": 3, "hardware": "a100-80gb-sxm", "parallel": {"tp": 2}, "policy": {"block_size": 32}},
    ],
}


def test_what_a_group_does_not_say_is_the_scenarios(tmp_path: Path) -> None:
    scenario = load(tmp_path, MIXED)
    big, small = (scenario.of_group(group) for group in scenario.deployment.groups)
    assert big == scenario.model_copy(update={"deployment": Deployment()})
    assert (small.hardware.accelerator.name, small.parallel.tp) == ("a100-80gb-sxm", 2)
    assert (small.policy.block_size, small.policy.max_model_len) == (32, 4096)
    # What nobody chose is what the engine would choose on that device.
    assert (big.policy.max_num_batched_tokens, small.policy.max_num_batched_tokens) == (8192, 2048)
    assert small.calibration.device != big.calibration.device


def test_nothing_but_defaults_means_the_scenario_itself(tmp_path: Path) -> None:
    assert load(tmp_path, {}).deployment == Deployment()
    assert load(tmp_path, {}).hash == load(tmp_path, {"router": {"kind": "round_robin"}}).hash
    assert load(tmp_path, {}).hash != load(tmp_path, MIXED).hash


def test_a_saved_deployment_loads_as_itself_and_follows_changes(tmp_path: Path) -> None:
    scenario = load(tmp_path, MIXED)
    saved = tmp_path / "saved.yaml"
    saved.write_text(scenario_yaml(scenario, directory=tmp_path))
    assert load_scenario(saved) == scenario
    other = scenario.replace(hardware="b200-180gb-sxm", **{"policy.max_model_len": 2048})
    big, small = other.deployment.groups
    assert big.hardware == other.hardware
    assert small.hardware == scenario.deployment.groups[1].hardware
    assert [group.policy and group.policy.max_model_len for group in (big, small)] == [2048, 2048]
    assert [group.policy and group.policy.max_num_batched_tokens for group in (big, small)] == [16384, 2048]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([{"name": "a", "count": 0}], InputError, "deployment.groups.0.count: expected a number greater than 0, got 0"),
        ([{"name": "a", "counts": 1}], InputError, "deployment.groups.0.counts: unknown key 'counts'"),
        ([{"name": "a", "count": 1}, {"name": "a", "count": 1}], InputError, "deployment: groups need distinct names"),
        ([{"name": "a", "count": 1, "role": "prefill"}], InputError, "deployment: roles must be all 'both', or"),
        ([{"name": "a", "count": 1, "hardware": "h100-80gb-sxn"}], InputError, "did you mean 'h100-80gb-sxm'?"),
        ([{"name": "a", "count": 1, "parallel": {"tp": 64}}], InfeasibleError, "deployment.groups.0: parallel"),
        ([{"name": "a", "count": 1, "policy": {"max_model_len": 10**9}}], InputError, "groups.0: policy.max_model_len"),
    ],
)
def test_a_bad_group_is_named(tmp_path: Path, groups: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        load(tmp_path, {"groups": groups})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
