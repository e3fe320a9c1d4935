"""Steps that no CUDA graph covers: the host launches every kernel, ahead of the GPU, and the slower of the two counts.

A launch is a kernel or collective of the lowered step; what a host needs for one is measured
(`hardware/calibration/launches.yaml`). Each GPU has a process that launches for it, so tensor parallelism shortens
nothing and adds collectives; a pipeline stage launches its own layers only. Neglected: that a step of prompts alone or
of both kinds launches another number of attention kernels than one of decodes, the kernels of adapters, and what an
engine fuses less without compilation.
"""

from __future__ import annotations

from typing import NamedTuple

from perfsim.ops.speculation import lower_with_drafts
from perfsim.ops.step import StepShape, attention_spans
from perfsim.spec.calibration import EngineProfile
from perfsim.spec.model import ModelArch
from perfsim.spec.policy import ServingPolicy


class HostTerms(NamedTuple):
    """Seconds of the host in a step: what the GPU waits for, and what hides behind it where `hides`, else comes first.

    Beside them are the times per sequence, which the GPU waits for, and per token, which belong to `scheduler`.
    """

    exposed: float
    scheduler: float
    hides: bool


def host_terms(engine: EngineProfile, *, launch: float, asynchronous: bool) -> HostTerms:
    """The terms of a step whose launches take `launch` seconds; 0 under CUDA graphs.

    One thread schedules and then launches. With async scheduling it does both for the next step while the GPU works:
    exposed + max(kernels, scheduler + launches). Without it the GPU waits for the scheduler, and launches run ahead of
    the kernels of their own step: exposed + scheduler + max(kernels, launches), with the time per token in launches.
    """
    if launch and not asynchronous:
        return HostTerms(engine.step_host + engine.schedule_host, launch, True)
    return HostTerms(engine.step_host, engine.schedule_host + launch, asynchronous)


def launch_seconds(
    model: ModelArch, engine: EngineProfile, *, tp: int, dp: int = 1, ep: int = 1, pp: int = 1, policy: ServingPolicy
) -> float:
    """Seconds in which the host launches one step, of all pipeline stages together; 0 where CUDA graphs are used."""
    if not policy.enforce_eager:
        return 0.0
    return kernels_launched(model, engine, tp=tp, dp=dp, ep=ep, pp=pp, policy=policy) * engine.launch_host


def kernels_launched(
    model: ModelArch, engine: EngineProfile, *, tp: int, dp: int = 1, ep: int = 1, pp: int = 1, policy: ServingPolicy
) -> int:
    """Kernels and collectives of one decode step on one GPU of every stage together."""
    passes, kernels = engine.sampler(policy.sampling)
    queries = float(policy.queries)
    ones = (1.0,) * len(attention_spans(model))
    step = StepShape(queries, 1.0, 1.0, ones, 0.0, (0.0,) * len(ones), (0.0,) * len(ones), None, policy.queries)
    work = lower_with_drafts(
        model, step, speculative=policy.speculative, tp=tp, dp=dp, ep=ep, pp=pp,
        expert_popularity=engine.expert_popularity, sampling_passes=passes, sampling_kernels=kernels,
        kv_cache_dtype=policy.kv_cache_dtype, all2all_backend=policy.all2all_backend or engine.all2all_backend,
    )  # fmt: skip
    return sum(item.count for item in work if item.active)
