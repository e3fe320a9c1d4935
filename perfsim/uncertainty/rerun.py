"""What bands are computed on: the run again, or its beginning where all of it would take too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from perfsim.spec.workload import AgentsWorkload, SessionsWorkload
from perfsim.uncertainty.factors import Reach

if TYPE_CHECKING:
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario

    Rerun = Callable[[Scenario], Result]

MOST_REQUESTS = 20_000  # of a rerun
MOST_SEGMENTS = 60_000  # of a rerun: what its time follows, a second or two
SKIPPED_ABOVE = 100_000  # requests of a run, whose beginning says little about the rest, unless bands are asked for


def shortened(scenario: Scenario, result: Result) -> Scenario:
    """The scenario with as many of its first requests as reruns can afford; itself when that is all of them."""
    requests, segments = result.simulation["requests"], result.simulation["segments"]
    keep = min(MOST_REQUESTS, requests * MOST_SEGMENTS // max(1, segments))
    if keep >= requests:
        return scenario
    workload = scenario.workload
    change: dict[str, Any]
    if isinstance(workload, SessionsWorkload | AgentsWorkload):
        change = {"num_sessions": max(1, workload.num_sessions * keep // requests)}
    else:
        change = {"num_requests": max(1, keep)}
    return scenario.model_copy(update={"workload": workload.model_copy(update=change)})


def reach_of(scenario: Scenario, result: Result) -> Reach:
    """The largest work of the run; of a closed form, which has means only, the mean context."""
    policies = [scenario.policy, *(group.policy for group in scenario.deployment.groups if group.policy is not None)]
    step = max(policy.max_num_batched_tokens or 0 for policy in policies)
    counts = result.metrics["counts"]
    mean = (counts["prompt_tokens"] + counts["output_tokens"]) / max(1, counts["completed"])
    return Reach(float(step), float(counts.get("longest_context", mean)))
