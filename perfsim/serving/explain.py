"""Where the time and the energy of a run went: segments priced again by the explaining form of the cost model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.cost.alike import Alike
from perfsim.cost.estimate import Estimate
from perfsim.cost.launches import host_terms, launch_seconds
from perfsim.cost.step import gpu_parts, host_parts
from perfsim.ops.step import StepShape
from perfsim.serving.recorder import Columns
from perfsim.spec.scenario import Scenario


class Explanation:
    """A sink that adds up seconds per component and per limiting resource, and dynamic energy per GPU.

    Within a segment the step time is affine in the step index, so its middle step stands for all of them exactly.
    With pipeline stages it is the mean stage, with data-parallel ranks the mean rank.
    `mismatch` is the largest relative difference seen between a segment's length and the sum of its parts.
    """

    def __init__(self, scenario: Scenario, *, windows: int) -> None:
        self._scenario = scenario
        engine, parallel = scenario.calibration.engine, scenario.parallel
        launch = launch_seconds(scenario.model, engine, tp=parallel.tp, dp=parallel.dp, ep=parallel.ep, pp=parallel.pp,
                                policy=scenario.policy) / parallel.pp  # fmt: skip
        self._host = host_terms(engine, launch=launch, asynchronous=scenario.asynchronous)
        self._suffixes = [f"_{index}" if index else "" for index in range(windows)]
        self.seconds: dict[str, float] = {}
        self.bound: dict[str, float] = {}
        self.joules = 0.0
        self.busy = 0.0
        self.mismatch = 0.0

    def add_requests(self, columns: Columns) -> None:
        """Requests do not matter here."""

    def add_gaps(self, seconds: Any, weights: Any) -> None:
        """Token gaps do not matter here."""

    def add_segments(self, columns: Columns) -> None:
        """Price the middle step of every segment and count it `steps` times."""
        scenario, steps = self._scenario, columns["steps"]
        parallel = scenario.parallel
        shape = self._middle(columns)
        actual = columns["first_s"] + columns["slope_s"] * ((steps - 1) / 2)
        weight = steps / parallel.dp
        gpu = np.zeros_like(steps)
        joules = np.zeros_like(steps)
        for part in gpu_parts(
            shape,
            model=scenario.model,
            node=scenario.hardware,
            tp=parallel.tp,
            dp=parallel.dp,
            ep=parallel.ep,
            pp=parallel.pp,
            calibration=scenario.calibration,
            cluster=scenario.cluster,
            policy=scenario.policy,
            alike=Alike.by_tokens(columns["tokens"]),
        ):
            gpu = gpu + part.seconds / parallel.pp
            joules = joules + part.joules / parallel.pp
            self._count(part, weight / parallel.pp)
        schedule, exposed = host_parts(shape, scenario.calibration, self._host)
        waited = np.maximum(schedule.seconds - gpu, 0.0) if self._host.hides else schedule.seconds
        who = "launches" if scenario.policy.enforce_eager else "scheduler"
        self._count(Estimate(waited, bound_s={"host": waited}, d_seconds={who: waited}), weight)
        self._count(exposed, weight)
        load = columns["load_s"]
        if scenario.policy.lora is not None or load.any():
            name = "adapter_loading" if scenario.policy.lora is not None else "compiling"
            self._count(Estimate(load, bound_s={"host": load}, d_seconds={name: load}), steps)
        total = gpu + waited + exposed.seconds + load
        missing = actual - total
        if parallel.dp > 1:  # all ranks wait for the slowest one
            idle = np.maximum(missing, 0.0)
            self._count(Estimate(idle, bound_s={"ranks": idle}, d_seconds={"slowest rank": idle}), weight)
            missing = missing - idle
        self.mismatch = max(self.mismatch, float((np.abs(missing) / actual).max()))
        accelerator = scenario.hardware.accelerator
        headroom = accelerator.dynamic_power or 0.0
        self.joules += float((weight * np.minimum(joules, headroom * actual)).sum())
        self.busy += float((weight * actual).sum())

    def _middle(self, columns: Columns) -> StepShape:
        middle = (columns["steps"] - 1) / 2
        return StepShape(
            tokens=columns["tokens"],
            logits=columns["logits"],
            decode_sequences=columns["decode_sequences"],
            decode_context=tuple(
                columns[f"decode_context{suffix}"] + middle * columns[f"decode_growth{suffix}"]
                for suffix in self._suffixes
            ),
            prefill_tokens=columns["prefill_tokens"],
            prefill_pairs=tuple(columns[f"prefill_pairs{suffix}"] for suffix in self._suffixes),
            prefill_context=tuple(columns[f"prefill_context{suffix}"] for suffix in self._suffixes),
            group_tokens=columns["group_tokens"] if self._scenario.parallel.dp > 1 else None,
            queries=self._scenario.policy.queries,
            lora_tokens=columns["lora_tokens"],
            lora_adapters=columns["lora_adapters"],
            decode_longest=columns["decode_longest"] + middle,
            prefill_longest=columns["prefill_longest"],
        )

    def _count(self, part: Estimate, steps: NDArray[np.float64]) -> None:
        for name, seconds in part.d_seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + float((steps * seconds).sum())
        for name, seconds in part.bound_s.items():
            self.bound[name] = self.bound.get(name, 0.0) + float((steps * seconds).sum())
