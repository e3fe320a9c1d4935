"""From a scenario to a result: `simulate` replays the traffic, `estimate` answers in closed form."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from perfsim import __version__
from perfsim.errors import InputError
from perfsim.metrics.books import Books
from perfsim.metrics.result import Result
from perfsim.metrics.steady import steady_outcome
from perfsim.metrics.summary import GroupUse, make_result
from perfsim.serving.closed_form import steady_state
from perfsim.serving.replica import plan_groups, plan_replica
from perfsim.serving.service import serve
from perfsim.spec import catalog

if TYPE_CHECKING:
    from perfsim.serving.trace import Trace
    from perfsim.spec.scenario import Scenario

Progress = Callable[[int, float], None]


def simulate(
    scenario: Scenario, *, seed: int | None = None, progress: Progress | None = None, stepwise: bool = False,
    requests_path: Path | None = None, trace: Trace | None = None,
) -> Result:  # fmt: skip
    """Replay the scenario's traffic on its deployment and report everything about it.

    `seed` replaces the scenario's; `stepwise` recomputes every step from its sequences (slow, for checking);
    `progress(requests sent, simulated seconds)` is called now and then; `requests_path` receives one Parquet row per
    request, `trace` the timeline (`report.trace_file` writes one for Perfetto). Raises InputError for a bad trace,
    InfeasibleError when the model does not fit.
    """
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    groups, egress = plan_groups(scenario), scenario.calibration.engine.egress
    books = Books(scenario, groups, egress=egress, trace=trace)
    with ExitStack() as stack:
        if requests_path is not None:
            from perfsim.metrics.requests_table import ParquetSpool

            books.spool = stack.enter_context(ParquetSpool(requests_path, egress=egress))
        with _no_garbage_collection():
            served = serve(scenario, groups, sinks=books.sinks, progress=progress, stepwise=stepwise, trace=trace,
                           begin=books.aggregate.begin)  # fmt: skip
    return make_result(scenario, books.close(served), version=__version__)


def estimate(scenario: Scenario) -> Result:
    """The steady state of the scenario in closed form: means instead of percentiles, milliseconds instead of a replay.

    See `perfsim.serving.closed_form` for what is neglected. Past saturation the latencies are None and a warning says
    "unstable". Raises InputError for a deployment of more than one replica.
    """
    if not scenario.deployment.single:
        raise InputError("deployment: the closed form knows one replica and no failures; use simulate")
    plan = plan_replica(scenario)
    steady = steady_state(scenario, plan, trace_path=catalog.trace_path)
    group = GroupUse(scenario, plan.memory)
    return make_result(scenario, steady_outcome(steady, scenario.slo, group), version=__version__)


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
