"""From a scenario to an engine: limits, memory and compiled costs of one replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from perfsim.cost.memory import MemoryPlan, memory_plan
from perfsim.cost.step_model import StepModel, compile_steps
from perfsim.ops.step import Span, attention_spans
from perfsim.serving.engine import Engine
from perfsim.serving.front import EngineConfig
from perfsim.serving.recorder import Recorder, Sink
from perfsim.serving.request import Request
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Everything an engine needs that does not change while it runs."""

    config: EngineConfig
    memory: MemoryPlan
    steps: StepModel
    windows: tuple[Span, ...]


def plan_replica(scenario: Scenario) -> ReplicaPlan:
    """Size the KV cache and compile the step costs of `scenario`.

    The policy's None fields must have been filled in by the loader. Raises InfeasibleError when the model does not fit.
    """
    policy, tp = scenario.policy, scenario.parallel.tp
    tokens, seqs, length = policy.max_num_batched_tokens, policy.max_num_seqs, policy.max_model_len
    if tokens is None or seqs is None or length is None:
        raise ValueError("the scenario is not resolved: load it, or fill in its policy")
    memory = memory_plan(
        model=scenario.model, accelerator=scenario.hardware.accelerator, parallel=scenario.parallel,
        engine=scenario.calibration.engine, policy=policy,
    )  # fmt: skip
    steps = compile_steps(
        model=scenario.model, node=scenario.hardware, tp=tp, calibration=scenario.calibration,
        max_num_batched_tokens=tokens, max_num_seqs=seqs, async_scheduling=policy.async_scheduling,
        cluster=scenario.cluster, kv_cache_dtype=policy.kv_cache_dtype,
    )  # fmt: skip
    config = EngineConfig(
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        max_model_len=length,
        block_size=memory.block_size,
        total_blocks=memory.usable_blocks,
        window_blocks=memory.window_blocks,
        priority=policy.scheduling_policy == "priority",
        chunked_prefill=policy.enable_chunked_prefill,
        prefix_caching=policy.enable_prefix_caching,
        long_prefill_token_threshold=policy.long_prefill_token_threshold,
        async_scheduling=policy.async_scheduling,
        reserve_full_isl=policy.scheduler_reserve_full_isl,
        watermark_blocks=int(policy.watermark * memory.kv_blocks),
    )
    return ReplicaPlan(config, memory, steps, attention_spans(scenario.model))


def build_engine(
    plan: ReplicaPlan, *, sinks: tuple[Sink, ...], stepwise: bool = False,
    on_finish: Callable[[Request, float], None] | None = None,
) -> Engine | StepwiseEngine:  # fmt: skip
    """A fresh engine; `stepwise` recomputes every step from the sequences themselves."""
    recorder = Recorder(sinks, windows=len(plan.windows))
    kind = StepwiseEngine if stepwise else Engine
    return kind(config=plan.config, steps=plan.steps, recorder=recorder, windows=plan.windows, on_finish=on_finish)
