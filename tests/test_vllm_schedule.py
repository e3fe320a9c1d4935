"""The schedule of perfsim's engines against logs of the real vLLM V1 scheduler: the same batch in every step.

The logs are in validation/scheduler/cases; how they were recorded is said in validation/scheduler/record.py.
"""

from __future__ import annotations

import pytest

from validation.scheduler import compare, replay

LOGS = list(compare.logs())


def test_enough_is_recorded():
    """At least 20 cases, and every mechanism at work in them: hits, preemptions, full pools, priorities, limits."""
    decisions = [item for log in LOGS for item in replay.recorded(log)]
    assert len(LOGS) > 60
    assert len(decisions) > 6000
    assert sum(len(item.preempted) for item in decisions) > 50
    assert sum(hits > 0 for item in decisions for hits in item.admitted.values()) > 50
    assert sum(item.free == 0 for item in decisions) > 50
    assert {log["vllm"].split("+")[0] for log in LOGS} == {"0.32.0"}


@pytest.mark.parametrize("engine", ["stepwise", "fast"])
@pytest.mark.parametrize("log", LOGS, ids=[log["case"] for log in LOGS])
def test_decides_as_vllm(log, engine):
    """Equal batches, hits and preemptions in every step, and as many free blocks after it."""
    result = compare.compare(log, engine=engine)
    assert result.equal == result.steps, result.first
    assert result.equal_blocks == result.steps


def test_a_changed_limit_is_noticed():
    """The comparison can fail: a smaller budget than the recorded one gives other batches."""
    log = next(log for log in LOGS if log["case"] == "mix-roomy")
    other = log | {"config": log["config"] | {"max_num_batched_tokens": 100}}
    result = compare.compare(other, engine="fast")
    assert result.equal < 0.9 * result.steps


def test_generated_blocks_are_needed():
    """The next turn of a conversation is held against hits on what the model said, not on prompts alone."""
    log = next(log for log in LOGS if log["case"] == "turns")
    requests = [[*row[:-1], row[-1][: row[1] // log["config"]["block_size"]]] for row in log["requests"]]
    assert requests != log["requests"]
    result = compare.compare(log | {"requests": requests}, engine="fast")
    assert result.equal < result.steps
