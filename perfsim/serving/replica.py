"""From a scenario to an engine: limits, memory and compiled costs of one replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from perfsim.cost.adapters import adapter_load_seconds
from perfsim.cost.host_tier import tier_plan
from perfsim.cost.memory import MemoryPlan, memory_plan
from perfsim.cost.step_model import CompiledSteps, compile_steps
from perfsim.cost.warm_up import expert_kernels
from perfsim.errors import InputError
from perfsim.ops.step import Span, attention_spans
from perfsim.serving.config import EngineConfig
from perfsim.serving.engine import Engine
from perfsim.serving.front import EngineFront
from perfsim.serving.lockstep import LockstepGroup
from perfsim.serving.pipeline import PipelineEngine
from perfsim.serving.recorder import Recorder, Sink
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec.deployment import ReplicaGroup
from perfsim.spec.policy import ParallelPlan
from perfsim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True)
class ReplicaPlan:
    """Everything an engine, or a lock-step group of `parallel.dp` engines, needs that does not change while it runs."""

    config: EngineConfig
    memory: MemoryPlan
    steps: CompiledSteps
    windows: tuple[Span, ...]
    parallel: ParallelPlan


def plan_replica(scenario: Scenario) -> ReplicaPlan:
    """Size the KV cache and compile the step costs of `scenario`.

    The policy's None fields must have been filled in by the loader. Raises InfeasibleError when the model does not fit.
    """
    policy, parallel = scenario.policy, scenario.parallel
    tokens, seqs, length = policy.max_num_batched_tokens, policy.max_num_seqs, policy.max_model_len
    if tokens is None or seqs is None or length is None:
        raise ValueError("the scenario is not resolved: load it, or fill in its policy")
    _check_speculation(scenario)
    _check_lora(scenario)
    _check_separate_steps(scenario)
    _check_timeout(scenario)
    memory = memory_plan(
        model=scenario.model, accelerator=scenario.hardware.accelerator, parallel=parallel,
        engine=scenario.calibration.engine, policy=policy,
    )  # fmt: skip
    steps = compile_steps(
        model=scenario.model, node=scenario.hardware, tp=parallel.tp, dp=parallel.dp, ep=parallel.ep, pp=parallel.pp,
        calibration=scenario.calibration, max_num_batched_tokens=tokens, max_num_seqs=seqs,
        async_scheduling=scenario.asynchronous, cluster=scenario.cluster, policy=policy,
    )  # fmt: skip
    config = _engine_config(scenario, memory, tokens=tokens, seqs=seqs, length=length)
    return ReplicaPlan(config, memory, steps, attention_spans(scenario.model), parallel)


def _engine_config(scenario: Scenario, memory: MemoryPlan, *, tokens: int, seqs: int, length: int) -> EngineConfig:
    """The scheduler's limits: the policy's, and what the memory and the kernels make of it."""
    policy, parallel = scenario.policy, scenario.parallel
    speculative, lora = policy.speculative, policy.lora
    return EngineConfig(
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        max_model_len=length,
        block_size=memory.block_size,
        total_blocks=memory.usable_blocks,
        window_blocks=memory.window_blocks,
        span_blocks=memory.span_blocks,
        priority=policy.scheduling_policy == "priority",
        chunked_prefill=policy.enable_chunked_prefill,
        mixed_steps=policy.mixed_steps,
        prefix_caching=policy.enable_prefix_caching,
        long_prefill_token_threshold=policy.long_prefill_token_threshold,
        async_scheduling=scenario.asynchronous,
        reserve_full_isl=policy.scheduler_reserve_full_isl,
        watermark_blocks=int(policy.watermark * memory.kv_blocks),
        tier=tier_plan(scenario, block_size=memory.block_size),
        max_loras=0 if lora is None else lora.max_loras,
        adapter_load=adapter_load_seconds(scenario.model, lora, scenario.hardware, tp=parallel.tp),
        acceptance=() if speculative is None else speculative.chances(),
        lookahead=0 if speculative is None else speculative.lookahead,
        seed=scenario.seed,
        timeout=_timeout(scenario),
        expert_kernels=expert_kernels(
            scenario.model,
            scenario.calibration.engine,
            parallel,
            accelerator=scenario.hardware.accelerator.name,
            max_tokens=tokens,
            max_seqs=seqs,
            eager=policy.enforce_eager,
        ),
    )


def _timeout(scenario: Scenario) -> float:
    timeout = getattr(scenario.workload, "timeout", None)  # conversations have none
    return float("inf") if timeout is None else float(timeout)


def _check_timeout(scenario: Scenario) -> None:
    """Raises InputError for what is not modelled together with clients that give up."""
    if _timeout(scenario) == float("inf"):
        return
    policy, parallel = scenario.policy, scenario.parallel
    beside = {
        "pipeline stages (pp)": parallel.pp > 1, "data-parallel ranks (dp)": parallel.dp > 1,
        "policy.speculative": policy.speculative is not None, "policy.lora": policy.lora is not None,
        "prefill and decode replicas": scenario.deployment.disaggregated,
    }  # fmt: skip
    for name, used in beside.items():
        if used:
            raise InputError(f"workload.timeout: not modelled together with {name}; leave one of them out")


def _check_separate_steps(scenario: Scenario) -> None:
    """Raises InputError for what is not modelled together with steps of prompts alone."""
    policy = scenario.policy
    beside = {
        "pipeline stages (pp)": scenario.parallel.pp > 1, "policy.lora": policy.lora is not None,
        "policy.kv_offload": policy.kv_offload is not None,
        "policy.long_prefill_token_threshold": policy.long_prefill_token_threshold > 0,
    }  # fmt: skip
    for name, used in beside.items():
        if used and not policy.mixed_steps:
            raise InputError(f"policy.mixed_steps: false is not modelled together with {name}; leave one of them out")


def _check_lora(scenario: Scenario) -> None:
    """Raises InputError for what is not modelled together with adapters."""
    parallel, lora = scenario.parallel, scenario.policy.lora
    if lora is None:
        return
    if parallel.pp > 1 or parallel.dp > 1:
        raise InputError("policy.lora: not modelled with pipeline stages or data-parallel ranks; set pp and dp to 1")
    if scenario.policy.kv_offload is not None:
        raise InputError("policy.lora: not modelled together with policy.kv_offload; leave one of them out")
    if lora.max_cpu_loras is not None and lora.max_cpu_loras < lora.num_adapters:
        raise InputError(
            f"policy.lora.max_cpu_loras: adapters read from storage are not modelled, expected at least num_adapters"
            f" ({lora.num_adapters}), got {lora.max_cpu_loras}"
        )


def _check_speculation(scenario: Scenario) -> None:
    """Raises InputError for what is not modelled together with drafts."""
    policy = scenario.policy
    if policy.speculative is None:
        return
    if scenario.parallel.pp > 1:
        raise InputError(f"policy.speculative: not modelled with pipeline stages, got pp = {scenario.parallel.pp}")
    if 0 < policy.long_prefill_token_threshold < policy.queries:
        raise InputError(
            f"policy.long_prefill_token_threshold: expected 0 or at least {policy.queries} (a token and its drafts),"
            f" got {policy.long_prefill_token_threshold}"
        )
    if policy.max_num_batched_tokens is not None and policy.max_num_batched_tokens < policy.queries:
        raise InputError(
            f"policy.max_num_batched_tokens: expected at least {policy.queries} (a token and its drafts), got"
            f" {policy.max_num_batched_tokens}"
        )


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group of equal replicas: its description, the scenario of one of them alone, and its plan."""

    group: ReplicaGroup
    scenario: Scenario
    plan: ReplicaPlan


def plan_groups(scenario: Scenario) -> tuple[GroupPlan, ...]:
    """Plan every group of the deployment.

    Raises InputError when prompts would have to be cut into blocks of two sizes, and when K/V would have to be
    converted on their way from prefill to decode replicas, which no connector does.
    """
    plans = []
    for group in scenario.deployment.groups:
        own = scenario.of_group(group)
        plan = plan_replica(own)
        if group.role != "both" and own.policy.lora is not None:
            raise InputError(f"policy.lora: not modelled with prefill and decode replicas, got group '{group.name}'")
        if group.role != "both" and own.policy.kv_offload is not None:
            raise InputError(
                f"policy.kv_offload: not modelled with prefill and decode replicas, got group '{group.name}'"
            )
        if group.role == "prefill":
            plan = replace(plan, config=replace(plan.config, prefill_only=True))
        plans.append(GroupPlan(group, own, plan))
    sizes = sorted({plan.plan.config.block_size for plan in plans})
    if len(sizes) > 1:
        raise InputError(f"deployment.groups: expected one policy.block_size in all groups, got {sizes}")
    dtypes = sorted({plan.scenario.policy.kv_cache_dtype for plan in plans})
    if len(dtypes) > 1 and scenario.deployment.disaggregated:
        raise InputError(f"deployment.groups: expected one policy.kv_cache_dtype in all groups, got {dtypes}")
    return tuple(plans)


def build_engine(
    plan: ReplicaPlan, *, sinks: Callable[[int | None], tuple[Sink, ...]], stepwise: bool = False, chunk: int = 1 << 16
) -> EngineFront | LockstepGroup:
    """A fresh engine, or a lock-step group of them; `stepwise` recomputes every step from the sequences themselves.

    `sinks(rank)` receive what a data-parallel rank records, in pieces of `chunk` rows; the rank of a single engine is
    None.
    """

    def engine(rank: int | None) -> EngineFront:
        recorder = Recorder(sinks(rank), windows=len(plan.windows), chunk=chunk)
        config, steps, windows = plan.config, plan.steps, plan.windows
        if plan.parallel.pp > 1:
            return PipelineEngine(
                config=config, steps=steps, recorder=recorder, windows=windows, depth=plan.parallel.pp
            )  # fmt: skip
        kind = StepwiseEngine if stepwise else Engine
        return kind(config=config, steps=steps, recorder=recorder, windows=windows)

    if plan.parallel.dp == 1:
        return engine(None)
    if plan.parallel.pp > 1:
        raise InputError("parallel: data-parallel ranks with pipeline stages are not modelled; set dp or pp to 1")
    return LockstepGroup([engine(rank) for rank in range(plan.parallel.dp)], steps=plan.steps, jumps=not stepwise)
