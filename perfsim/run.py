"""From a scenario to a result: `simulate` replays the traffic, `estimate` answers in closed form."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfsim import __version__
from perfsim.metrics.aggregate import Aggregate
from perfsim.metrics.result import Result
from perfsim.metrics.steady import steady_outcome
from perfsim.metrics.summary import Outcome, make_result
from perfsim.serving.check import BookkeepingError, Ledger, check_conservation
from perfsim.serving.closed_form import steady_state
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.explain import Explanation
from perfsim.serving.replica import ReplicaPlan, build_engine, plan_replica
from perfsim.serving.sessions import Sessions
from perfsim.serving.trace import Trace, lane_label
from perfsim.spec import catalog
from perfsim.traffic import closed_loop_source, is_closed_loop, is_conversation, session_source, stream

if TYPE_CHECKING:
    from perfsim.metrics.requests_table import ParquetSpool
    from perfsim.serving.recorder import Columns
    from perfsim.spec.scenario import Scenario

Progress = Callable[[int, float], None]

# The explaining form of the cost model and the compiled one are the same formulas; more than rounding is a bug.
MAX_MISMATCH = 1e-6
# A segment counts who is in the engine at its start: a request may arrive during a step, wait for the batch already
# formed, and keep its slot for one step after its end.
UNSEEN_STEPS = 3.0


class _Requests:
    """A sink that writes one row per finished request."""

    def __init__(self, spool: ParquetSpool) -> None:
        self._spool = spool

    def add_requests(self, columns: Columns) -> None:
        self._spool.add(columns)

    def add_segments(self, columns: Columns) -> None: ...

    def add_gaps(self, seconds: Any, weights: Any) -> None: ...


def simulate(
    scenario: Scenario, *, seed: int | None = None, progress: Progress | None = None, stepwise: bool = False,
    requests_path: Path | None = None, trace: Trace | None = None,
) -> Result:  # fmt: skip
    """Replay the scenario's traffic on one replica and report everything about it.

    `seed` replaces the scenario's; `stepwise` recomputes every step from its sequences (slow, for checking);
    `progress(requests sent, simulated seconds)` is called now and then; `requests_path` receives one Parquet row per
    request, `trace` the timeline (`report.trace_file` writes one for Perfetto). Raises InputError for a bad trace,
    InfeasibleError when the model does not fit.
    """
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    plan = plan_replica(scenario)
    engine_profile = scenario.calibration.engine
    aggregate = Aggregate(
        slo=scenario.slo, egress=engine_profile.egress, kv_blocks=plan.config.total_blocks,
        block_size=plan.config.block_size,
    )  # fmt: skip
    explanation, ledger = Explanation(scenario, windows=len(plan.windows)), Ledger()
    with ExitStack() as stack:
        sinks: list[Any] = [aggregate, explanation, ledger]
        if requests_path is not None:
            from perfsim.metrics.requests_table import ParquetSpool

            sinks.append(_Requests(stack.enter_context(ParquetSpool(requests_path, egress=engine_profile.egress))))
        if trace is not None:
            sinks.append(trace.replica("replica", lane=lane_label(scenario.parallel)))
        with _no_garbage_collection():
            engine, sent = _serve(scenario, plan, sinks=tuple(sinks), progress=progress, stepwise=stepwise)
    check_conservation(engine, ledger, sent=sent)
    if explanation.mismatch > MAX_MISMATCH:
        raise BookkeepingError(f"explained and simulated step times differ by {explanation.mismatch:.2e}")
    rejected = engine.recorder.rejected
    aggregate.add_rejected(rejected)
    aggregated = aggregate.finish()
    law = aggregated.littles_law
    if law is not None and not law.holds(steps=UNSEEN_STEPS):
        raise BookkeepingError(f"Little's law: {law.from_segments} by segments, {law.from_requests} by requests")
    outcome = Outcome(
        aggregated=aggregated, seconds=explanation.seconds, bound=explanation.bound,
        dynamic_joules=explanation.joules, rejected=rejected,
        backlog=_waiting_at(aggregated.timeline, ledger.last_arrival),
    )  # fmt: skip
    return make_result(scenario, plan.memory, outcome, version=__version__)


def estimate(scenario: Scenario) -> Result:
    """The steady state of the scenario in closed form: means instead of percentiles, milliseconds instead of a replay.

    See `perfsim.serving.closed_form` for what is neglected. Past saturation the latencies are None and a warning says
    "unstable".
    """
    plan = plan_replica(scenario)
    steady = steady_state(scenario, plan, trace_path=catalog.trace_path)
    return make_result(scenario, plan.memory, steady_outcome(steady, scenario.slo), version=__version__)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The simulators make no reference cycles; looking for some would cost a twentieth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _serve(
    scenario: Scenario, plan: ReplicaPlan, *, sinks: tuple[Any, ...], progress: Progress | None, stepwise: bool
) -> tuple[Any, int]:
    """Run all requests through a fresh engine; (the engine, requests sent)."""
    profile, block_size = scenario.calibration.engine, plan.config.block_size
    workload, seed, lora = scenario.workload, scenario.seed, scenario.policy.lora
    if is_conversation(workload):
        sessions = Sessions(
            session_source(workload, seed=seed, max_context=plan.config.max_model_len, lora=lora),
            ingress=profile.ingress, egress=profile.egress, block_size=block_size,
        )  # fmt: skip
        engine = build_engine(plan, sinks=sinks, stepwise=stepwise, on_finish=sessions.on_finish)
        sent = sessions.run(engine, progress=progress)
    elif is_closed_loop(workload):
        source = closed_loop_source(workload, seed=seed, trace_path=catalog.trace_path, lora=lora)
        loop = ClosedLoop(source, ingress=profile.ingress, egress=profile.egress, block_size=block_size)
        engine = build_engine(plan, sinks=sinks, stepwise=stepwise, on_finish=loop.on_finish)
        sent = loop.run(engine, progress=progress)
    else:
        chunks = stream(workload, seed=seed, trace_path=catalog.trace_path, lora=lora)
        engine = build_engine(plan, sinks=sinks, stepwise=stepwise)
        sent = run_open_loop(engine, chunks, ingress=profile.ingress, block_size=block_size, progress=progress)
    engine.recorder.flush()
    return engine, sent


def _waiting_at(timeline: dict[str, Any], at: float) -> float:
    """Requests waiting at time `at`, read off the timeline."""
    waiting = timeline["waiting"]
    if not waiting:
        return 0.0
    index = int((at - timeline["start_s"]) / timeline["bin_s"])
    return float(waiting[min(max(index, 0), len(waiting) - 1)])
