"""Queues with known answers: the engine is configured until nothing but the textbook is left."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import perfsim
from perfsim.cost.step_model import PlainRun
from perfsim.serving.check import BookkeepingError, Ledger, check_conservation
from perfsim.serving.engine import Engine, EngineConfig
from perfsim.serving.kv_cache import Run
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request

Floats = NDArray[np.float64]
TICK = 2.0**-10  # seconds; sums of it are exact, so that equal times compare equal


@dataclass
class FlatSteps:
    """Step times that do not depend on the batch, except by `per_token` seconds for each new token."""

    fixed: float = 0.0
    per_token: float = 0.0

    def step_seconds(self, tokens: int, *rest: Any) -> float:
        return self.fixed + self.per_token * tokens

    def plain_run(
        self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int, *rest: Any
    ) -> PlainRun:
        return limit, self.fixed + self.per_token * decodes, 0.0


@dataclass
class Rows:
    """A sink that keeps the requests."""

    kept: list[dict[str, Floats]] = field(default_factory=list)

    def add_requests(self, columns: Any) -> None:
        self.kept.append(dict(columns))

    def add_segments(self, columns: Any) -> None: ...

    def add_gaps(self, seconds: Any, weights: Any) -> None: ...

    def column(self, name: str) -> Floats:
        """One column in order of submission."""
        values = np.concatenate([columns[name] for columns in self.kept])
        return values[np.argsort(np.concatenate([columns["request_index"] for columns in self.kept]))]


@dataclass
class Served:
    """A finished run and what it left behind."""

    rows: Rows
    engine: Engine
    ledger: Ledger
    sent: int

    @property
    def waits(self) -> Floats:
        return self.rows.column("scheduled_s") - self.rows.column("queued_s")

    def check(self) -> None:
        check_conservation(self.engine, self.ledger, sent=self.sent)


def serve(
    arrivals: Floats, steps: FlatSteps, *, prompts: Any = 1, outputs: Any = 1, slots: int = 1, lag: bool = False,
    priorities: Any = None, blocks: int = 1 << 40,
) -> Served:  # fmt: skip
    """All requests through one engine with `slots` places, blocks and budget in abundance."""
    config = EngineConfig(
        max_num_batched_tokens=1 << 50, max_num_seqs=slots, max_model_len=1 << 50, block_size=16, total_blocks=blocks,
        async_scheduling=lag, prefix_caching=False, priority=priorities is not None,
    )  # fmt: skip
    rows, ledger = Rows(), Ledger()
    recorder = Recorder((rows, ledger), windows=1)
    engine = Engine(config=config, steps=steps, recorder=recorder)
    count = len(arrivals)
    columns = (prompts, outputs, 0 if priorities is None else priorities)
    lengths = [np.broadcast_to(values, count).tolist() for values in columns]
    for index, (at, prompt, output, priority) in enumerate(zip(arrivals.tolist(), *lengths, strict=True)):
        engine.advance(at)
        engine.submit(Request(index, at, at, prompt, output, priority))
    engine.drain()
    recorder.flush()
    served = Served(rows, engine, ledger, count)
    served.check()
    return served


def exponential(rng: np.random.Generator, count: int) -> Floats:
    """Unit exponentials in random order whose empirical distribution is the exact one: less noise in every mean."""
    return rng.permutation(-np.log1p(-(np.arange(count) + 0.5) / count))


def lindley(arrivals: Floats, service: Floats) -> list[float]:
    """Waits in a single-server queue, W' = max(0, W + S - A), kept as times of departure so that rounding is equal."""
    waits, free = [], -math.inf
    for arrival, seconds in zip(arrivals.tolist(), service.tolist(), strict=True):
        start = max(arrival, free)
        waits.append(start - arrival)
        free = start + seconds
    return waits


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_constant_service_is_m_d_1(load: float) -> None:
    count = 200_000
    arrivals = np.cumsum(exponential(np.random.default_rng(1), count) / load)
    served = serve(arrivals, FlatSteps(fixed=1.0))
    np.testing.assert_allclose(served.waits, lindley(arrivals, np.ones(count)), rtol=0, atol=1e-9)
    assert served.waits.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.01)  # Pollaczek-Khinchine


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_exponential_service_is_m_m_1(load: float) -> None:
    count, rng = 300_000, np.random.default_rng(1)
    arrivals = np.cumsum(exponential(rng, count) / load)
    prompts = np.maximum(1, np.rint(exponential(rng, count) * 1e6)).astype(np.int64)
    served = serve(arrivals, FlatSteps(per_token=1e-6), prompts=prompts)
    np.testing.assert_allclose(served.waits, lindley(arrivals, 1e-6 * prompts), rtol=0, atol=1e-9)
    assert served.waits.mean() == pytest.approx(load / (1 - load), rel=0.01)
    # One minus the load is the chance of finding the engine idle.
    assert np.mean(served.waits == 0.0) == pytest.approx(1 - load, rel=0.01)


def test_constant_gaps_and_service_are_d_d_1() -> None:
    arrivals = np.arange(1000) * (3 * TICK)
    assert not serve(arrivals, FlatSteps(fixed=2 * TICK)).waits.any()
    # Each request finds one step more of backlog than the one before it.
    np.testing.assert_array_equal(serve(arrivals, FlatSteps(fixed=4 * TICK)).waits, np.arange(1000) * TICK)


@pytest.mark.parametrize("load", [0.3, 1.0, 3.0])
def test_a_batch_without_limit_waits_for_the_running_step(load: float) -> None:
    """Everybody who waits joins the next step: a bulk queue that never saturates."""
    arrivals = np.cumsum(exponential(np.random.default_rng(2), 50_000) / load)
    served = serve(arrivals, FlatSteps(fixed=1.0), slots=1 << 30)
    np.testing.assert_allclose(served.waits, bulk_waits(arrivals, [1] * 50_000, lag=False), rtol=0, atol=1e-9)
    # Busy periods of mean e^load steps alternate with idle ones of mean 1/load; a wait is half a step when busy.
    busy = load * math.exp(load) / (load * math.exp(load) + 1)
    assert served.waits.mean() == pytest.approx(busy / 2, rel=0.01)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("load", [0.1, 0.3, 1.0])
def test_async_scheduling_sees_arrivals_one_step_late(load: float, lag: bool) -> None:
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(exponential(rng, 20_000) / load)
    outputs = rng.integers(1, 6, 20_000)
    served = serve(arrivals, FlatSteps(fixed=1.0), outputs=outputs, slots=1 << 30, lag=lag)
    np.testing.assert_allclose(served.waits, bulk_waits(arrivals, outputs.tolist(), lag=lag), rtol=0, atol=1e-9)
    # Service is one step per token in any case.
    serving = served.rows.column("finish_s") - served.rows.column("scheduled_s")
    np.testing.assert_allclose(serving, outputs, rtol=0, atol=1e-9)


def bulk_waits(arrivals: Floats, outputs: list[int], *, lag: bool) -> list[float]:
    """Step by step: a step of one second begins with those who came before the last one ended, or, with lag, began.

    With lag and nobody to go on with, the engine waits for the step to end and looks again.
    """
    waits: list[float] = []
    times, start, left = [*arrivals.tolist(), math.inf], -math.inf, 0  # `left`: steps for which somebody is decoding
    while len(waits) < len(arrivals):
        end = start + 1.0
        if not left and times[len(waits)] > end:
            end = times[len(waits)]  # idle until then
        seen = start if lag and (left or times[len(waits)] <= start) else end
        while times[len(waits)] <= seen:
            left = max(left, outputs[len(waits)])
            waits.append(end - times[len(waits)])
        start, left = end, max(0, left - 1)
    return waits


def test_slots_are_the_servers_of_a_queue() -> None:
    """Four slots, steps of fixed length: M/M/4, of which every path obeys the Kiefer-Wolfowitz recursion."""
    count, slots, mean, rng = 40_000, 4, 400, np.random.default_rng(0)
    outputs = np.maximum(1, np.rint(exponential(rng, count) * mean)).astype(np.int64)
    # On the grid of steps, as the engine admits at step boundaries only.
    arrivals = np.floor(np.cumsum(exponential(rng, count)) * mean / (0.7 * slots)) * TICK
    served = serve(arrivals, FlatSteps(fixed=TICK), outputs=outputs, slots=slots)
    free = [-math.inf] * slots
    expected = []
    for at, steps in zip(arrivals.tolist(), outputs.tolist(), strict=True):
        start = max(at, free[0])
        heapreplace(free, start + steps * TICK)
        expected.append(start - at)
    np.testing.assert_array_equal(served.waits, expected)
    assert served.engine.recorder.segments < served.engine.recorder.steps / 40  # most of the steps are jumped over
    offered = 0.7 * slots
    waiting = offered**slots / math.factorial(slots) / (1 - 0.7)
    erlang_c = waiting / (sum(offered**k / math.factorial(k) for k in range(slots)) + waiting)
    assert served.waits.mean() == pytest.approx(erlang_c * mean * TICK / (slots - offered), rel=0.05)


def test_priorities_follow_cobham() -> None:
    """Two classes, no preemption: the mean residual service over (1 - load ahead)(1 - load ahead and own)."""
    count, rng = 200_000, np.random.default_rng(0)
    arrivals = np.cumsum(exponential(rng, count) / 0.7)
    priorities = rng.permutation(np.arange(count) % 2)
    served = serve(arrivals, FlatSteps(fixed=1.0), priorities=priorities)
    np.testing.assert_allclose(served.waits, priority_waits(arrivals, priorities.tolist()), rtol=0, atol=1e-9)
    residual = 0.7 / 2
    for level, ahead, own in ((0, 1.0, 0.65), (1, 0.65, 0.3)):
        mean = served.waits[priorities == level].mean()
        assert mean == pytest.approx(residual / (ahead * own), rel=0.02)


def priority_waits(arrivals: Floats, priorities: list[int]) -> list[float]:
    """A server of one second that takes the smallest (priority, arrival) whenever it is free."""
    waits, queue, times = [0.0] * len(arrivals), [], [*arrivals.tolist(), math.inf]
    now, following = -math.inf, 0
    while following < len(arrivals) or queue:
        if not queue:
            now = max(now, times[following])
        while times[following] <= now:
            heappush(queue, (priorities[following], following))
            following += 1
        _, index = heappop(queue)
        waits[index] = now - times[index]
        now += 1.0
    return waits


def busy_run() -> Served:
    """Decoding and waiting, arrivals at any time, and so few blocks that sequences are preempted."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.02, 400))
    prompts, outputs = rng.integers(1, 300, 400), rng.integers(1, 200, 400)
    steps = FlatSteps(fixed=0.01, per_token=1e-5)
    return serve(arrivals, steps, prompts=prompts, outputs=outputs, slots=32, lag=True, blocks=150)


def test_littles_law() -> None:
    served = busy_run()
    queued, finished = served.rows.column("queued_s"), served.rows.column("finish_s")
    assert served.rows.column("preemptions").sum() > 10
    # The integral of the number inside over time, from the events alone.
    times = np.concatenate([queued, finished])
    order = np.argsort(times, kind="stable")
    inside = np.cumsum(np.concatenate([np.ones(400), -np.ones(400)])[order])
    area = float((inside[:-1] * np.diff(times[order])).sum())
    assert area == pytest.approx((finished - queued).sum(), rel=1e-9)
    assert served.engine.request_seconds == pytest.approx(area, rel=1e-9)


@pytest.mark.parametrize(
    ("owner", "name", "change", "message"),
    [
        ("sent", "sent", 1, "requests sent"),
        ("engine", "submitted", -1, "requests sent"),
        ("ledger", "requests", 1, "requests sent"),
        ("ledger", "tokens", 1, "tokens computed"),
        ("ledger", "kv_tokens", -1, "tokens computed"),
        ("engine", "scheduled_tokens", 1, "tokens computed"),
        ("engine", "saved_tokens", 16, "tokens computed"),
        ("engine", "lost_tokens", -1, "tokens computed"),
        ("ledger", "token_gaps", 1, "inter-token gaps missing"),
        ("ledger", "gap_seconds", 0.1, "gaps sum to"),
        ("ledger", "decode_seconds", -0.1, "gaps sum to"),
        ("engine", "request_seconds", 0.1, "Little's law"),
        ("ledger", "engine_seconds", 0.1, "Little's law"),
        ("kv", "free", -1, "KV blocks"),
        ("kv", "blank", 1, "KV blocks"),
    ],
)
def test_a_tampered_ledger_is_noticed(owner: str, name: str, change: float, message: str) -> None:
    served = busy_run()
    served.check()
    place = {"sent": served, "engine": served.engine, "ledger": served.ledger, "kv": served.engine.kv}[owner]
    setattr(place, name, getattr(place, name) + change)
    with pytest.raises(BookkeepingError, match=message):
        served.check()


def test_a_reference_left_behind_is_noticed() -> None:
    served = busy_run()
    served.engine.kv.nodes[7] = Run(7, 0)
    served.engine.kv.nodes[7].refs = 1
    with pytest.raises(BookkeepingError, match="still referenced"):
        served.check()


@pytest.mark.parametrize("budget", [8192, 32768])
def test_a_long_prompt_takes_as_long_as_its_flops_end_to_end(budget: int) -> None:
    scenario = perfsim.Scenario.load("default").replace(
        workload={
            "kind": "synthetic", "num_requests": 1, "arrivals": {"kind": "poisson", "rate": 1},
            "prompt": {"kind": "fixed", "tokens": 32000}, "output": {"kind": "fixed", "tokens": 1},
        },
        **{"policy.max_num_batched_tokens": budget},
    )  # fmt: skip
    result = perfsim.simulate(scenario)
    # 7.15e14 FLOPs at the 989.5 TFLOP/s dense bf16 peak of one H100; counted by hand in the laws of the cost model.
    assert 0.7227 < result.metrics["engine_ttft"]["mean"] < 2 * 0.7227
