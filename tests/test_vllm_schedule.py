"""The schedule of perfsim's engines against logs of the real vLLM V1 scheduler: the same batch in 99% of steps or more.

The logs are in validation/scheduler/cases; how they were recorded is said in validation/scheduler/record.py.
"""

from __future__ import annotations

import pytest

from validation.scheduler import compare, replay

# Case -> (steps that differ, why). Everything else must be equal in every step.
EXPLAINED = {
    "async-preemption-of-finishing": (
        15,
        "Under async scheduling vLLM preempts even a request whose last token is in flight, which frees its blocks at "
        "once; the engine preempts the next one instead, as its docstring says under what is neglected.",
    ),
    "async-resume-at-block-edge": (
        1,
        "Under async scheduling the block that the token in flight fills is not hashed yet when its request is "
        "preempted, so vLLM finds one block less at the resumption. The engine counts that block as cached.",
    ),
    "twin-copy-evicted": (
        2,
        "Two requests have computed the same block. vLLM hashes both copies; here the second is private: it goes back "
        "to the free queue ahead of the request's shared blocks instead of in its place, so another block is evicted.",
    ),
}
LOGS = list(compare.logs())


def test_enough_is_recorded():
    """At least 20 cases, and every mechanism at work in them: hits, preemptions, full pools, priorities, limits."""
    decisions = [item for log in LOGS for item in replay.recorded(log)]
    assert len(LOGS) >= 20
    assert len(decisions) > 3000
    assert sum(len(item.preempted) for item in decisions) > 50
    assert sum(hits > 0 for item in decisions for hits in item.admitted.values()) > 50
    assert sum(item.free == 0 for item in decisions) > 50
    assert {log["vllm"].split("+")[0] for log in LOGS} == {"0.32.0"}


@pytest.mark.parametrize("engine", ["stepwise", "fast"])
@pytest.mark.parametrize("log", LOGS, ids=[log["case"] for log in LOGS])
def test_decides_as_vllm(log, engine):
    result = compare.compare(log, engine=engine)
    differing, _ = EXPLAINED.get(log["case"], (0, ""))
    assert result.steps - result.equal == differing, result.first
    if not differing:
        assert result.equal_blocks == result.steps


@pytest.mark.parametrize("engine", ["stepwise", "fast"])
def test_at_least_99_percent_of_steps(engine):
    results = [compare.compare(log, engine=engine) for log in LOGS]
    assert sum(item.equal for item in results) >= 0.99 * sum(item.steps for item in results)


def test_a_changed_limit_is_noticed():
    """The comparison can fail: a smaller budget than the recorded one gives other batches."""
    log = next(log for log in LOGS if log["case"] == "mix-roomy")
    other = log | {"config": log["config"] | {"max_num_batched_tokens": 100}}
    result = compare.compare(other, engine="fast")
    assert result.equal < 0.9 * result.steps
