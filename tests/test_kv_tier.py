"""The KV tier against vLLM as recorded: each chunk of its offloading manager, each batch of its scheduler with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfsim.cost.host_tier import TierPlan
from perfsim.serving.kv_tier import KvTier
from perfsim.serving.request import Request
from validation.scheduler import compare, replay

FOLDER = Path(__file__).parents[1] / "validation/kv_offload"
CASES = [json.loads(line) for line in (FOLDER / "cases.jsonl").read_text("utf-8").splitlines()]
SCHEDULES = [json.loads(path.read_text("utf-8")) for path in sorted((FOLDER / "schedules").glob("*.json"))]


def runs_of(prompts: list[list[int]]) -> dict[int, int]:
    """Per chunk the one that names its run: chunks with the same prompts behind them move together."""
    behind: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        for chunk in prompt:
            behind.setdefault(chunk, []).append(number)
    name: dict[int, int] = {}
    for prompt in prompts:
        for before, chunk in zip([None, *prompt], prompt, strict=False):
            same = before is not None and behind[before] == behind[chunk]
            name.setdefault(chunk, name[before] if same else chunk)
    return name


class Replay:
    """A tier under the operations of one case; transfers end when the case says so."""

    def __init__(self, case: dict, *, in_runs: bool) -> None:
        plan = TierPlan(case["chunks"], 1, load_s=0.0, store_s=0.0, load_bytes=1.0, store_bytes=1.0, setup=float("inf"))
        self.tier = KvTier(plan, block_size=1, exclusive=False)
        prompts = [operation[2] for operation in case["operations"] if operation[0] == "new"]
        self.name = runs_of(prompts) if in_runs else {chunk: chunk for prompt in prompts for chunk in prompt}
        self.chunk = {(self.name[c], place): c for prompt in prompts for place, c in enumerate(prompt)}
        self.requests = [self.request(number, prompt) for number, prompt in enumerate(prompts)]
        self.held: set[int] = set()

    def request(self, number: int, prompt: list[int]) -> Request:
        names = [self.name[chunk] for chunk in prompt]
        last = {name: place + 1 for place, name in enumerate(names)}
        return Request(number, 0.0, 0.0, len(prompt), 1, keys=list(last), ends=list(last.values()))

    def holds(self) -> set[int]:
        segments = [segment for held in self.tier.segments.values() for segment in held]
        return {self.chunk[s.key, place] for s in segments for place in range(s.first, s.stop)}

    def end(self, line, request: Request) -> None:
        assert line.under_way[0].request is request
        line.under_way[0].end = 0.0
        self.tier.see(0.0)

    def step(self, what: str, number: int, *rest) -> None:
        tier, request = self.tier, self.requests[number]
        if what == "look":
            start, found = rest
            assert tier.lookup(request, start) == found
        elif what == "load":
            tier.load(request, rest[0], rest[1] - rest[0], 0.0)
        elif what == "offer":
            stop, stored, evicted = rest
            assert tier.offer(request, stop) == (stored is not None)
            tier.submit(0.0)
            self.held |= set(stored or ())
            self.held -= set(evicted or ())
        elif what == "stored":
            self.end(tier.stores, request)
        elif what == "loaded":
            self.end(tier.loads, request)
        elif what == "finish":
            tier.touch(request)
        assert self.holds() == self.held


@pytest.mark.parametrize("in_runs", [False, True])
def test_decides_as_vllm_does(in_runs: bool) -> None:
    evictions = refusals = hits = 0
    for case in CASES:
        replay = Replay(case, in_runs=in_runs)
        for operation in case["operations"]:
            replay.step(*operation)
            if operation[0] == "offer":
                evictions += len(operation[4] or ())
                refusals += operation[3] is None
            hits += operation[0] == "load"
    assert evictions > 500
    assert refusals > 20
    assert hits > 20


def with_tier(log: dict, chunks: int) -> dict:
    """A log with the tier it was recorded with, whose transfers take no time."""
    tier = TierPlan(chunks, 1, load_s=1e-12, store_s=1e-12, load_bytes=1.0, store_bytes=1.0, setup=0.0)
    return log | {"config": log["config"] | {"tier": tier}}


@pytest.mark.parametrize("engine", ["stepwise", "fast"])
@pytest.mark.parametrize("log", SCHEDULES, ids=[log["case"] for log in SCHEDULES])
def test_schedules_as_vllm_does(log: dict, engine: str) -> None:
    result = compare.compare(with_tier(log, log["chunks"]), engine=engine)
    assert result.equal == result.steps, result.first
    assert result.equal_blocks == result.steps


def test_schedules_depend_on_the_tier() -> None:
    """The comparison can fail, and there is much to compare: hits in both modes, and preemptions."""
    decisions = {lag: [] for lag in (False, True)}
    for log in SCHEDULES:
        decisions[log["config"]["async_scheduling"]] += replay.recorded(log)
    for found in decisions.values():
        assert len(found) > 500
        assert sum(hits > 0 for decision in found for hits in decision.admitted.values()) > 20
    assert sum(len(decision.preempted) for found in decisions.values() for decision in found) > 10
    without = [compare.compare(with_tier(log, 0), engine="fast") for log in SCHEDULES]
    assert sum(result.equal for result in without) < 0.9 * sum(result.steps for result in without)
