"""From a scenario to a result: `simulate` replays the traffic, `estimate` answers in closed form."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from perfsim.uncertainty.bands import ALONE, with_bands

if TYPE_CHECKING:
    from perfsim.serving.trace import Trace
    from perfsim.spec.scenario import Scenario

Progress = Callable[[int, float], None]

MIN_SAMPLES, MAX_SAMPLES = 2, 100_000


def simulate(
    scenario: Scenario, *, seed: int | None = None, progress: Progress | None = None, stepwise: bool = False,
    requests_path: Path | None = None, trace: Trace | None = None, bands: bool = False, samples: int | None = None,
) -> Result:  # fmt: skip
    """Replay the scenario's traffic on its deployment and report everything about it.

    `seed` replaces the scenario's; `stepwise` recomputes every step from its sequences (slow, for checking);
    `progress(requests sent, simulated seconds)` is called now and then; `requests_path` receives one Parquet row per
    request, `trace` the timeline (`report.trace_file` writes one for Perfetto). `bands` adds uncertainty bands, which
    takes about eight runs more; `samples` makes them from so many draws of all factors (see `quantify`). Raises
    InputError for a bad trace, InfeasibleError when the model does not fit.
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
    result = make_result(scenario, books.close(served), version=__version__)
    wanted = bands or samples is not None or scenario.samples is not None
    return quantify(result, scenario, samples=samples) if wanted else result


def quantify(result: Result, scenario: Scenario, *, samples: int | None = None, alone: int = ALONE) -> Result:
    """The result of `simulate(scenario)` with 5-95% bands of its headline metrics; all other values stay.

    First order without `samples`, from 2 (`alone` + 1) runs, else the quantiles of so many runs; see
    `perfsim.uncertainty.bands`. `samples` replaces the scenario's, and is part of the result's scenario and its hash.
    Raises InputError for fewer than two samples.
    """
    sampled = with_samples(scenario, samples)
    return with_bands(_asked(result, sampled), _plain(sampled), rerun=simulate, samples=sampled.samples, alone=alone)


def estimate(scenario: Scenario, *, bands: bool = False, samples: int | None = None) -> Result:
    """The steady state of the scenario in closed form: means instead of percentiles, milliseconds instead of a replay.

    See `perfsim.serving.closed_form` for what is neglected. Past saturation the latencies are None and a warning says
    "unstable". `bands` and `samples` as for `simulate`; a band without an upper end reaches into instability. Raises
    InputError for a deployment of more than one replica.
    """
    sampled = with_samples(scenario, samples)
    scenario = _plain(sampled)
    if not scenario.deployment.single:
        raise InputError("deployment: the closed form knows one replica and no failures; use simulate")
    plan = plan_replica(scenario)
    steady = steady_state(scenario, plan, trace_path=catalog.trace_path)
    group = GroupUse(scenario, plan.memory)
    result = make_result(scenario, steady_outcome(steady, scenario.slo, group), version=__version__)
    if not bands and sampled.samples is None:
        return result
    return with_bands(_asked(result, sampled), scenario, rerun=estimate, samples=sampled.samples)


def with_samples(scenario: Scenario, samples: int | None) -> Scenario:
    """The scenario whose bands are made of so many draws, as it is for None; InputError for too few or too many."""
    if samples is None:
        return scenario
    if not MIN_SAMPLES <= samples <= MAX_SAMPLES:
        raise InputError(f"samples: expected {MIN_SAMPLES} to {MAX_SAMPLES:,} draws, got {samples}")
    return scenario.model_copy(update={"samples": samples})


def _plain(scenario: Scenario) -> Scenario:
    """The scenario as reruns take it, which are not to have bands themselves."""
    return scenario if scenario.samples is None else scenario.model_copy(update={"samples": None})


def _asked(result: Result, scenario: Scenario) -> Result:
    """The result as that of a scenario that also says how its bands are made."""
    if scenario.samples is None:
        return result
    return replace(result, scenario=scenario.portable(), scenario_hash=scenario.hash)


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
