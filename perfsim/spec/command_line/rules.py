"""Rules that engines share: how weights and KV are stored, adapters, independent replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perfsim.spec.command_line.plan import Plan

UNQUANTIZED = ("fp32", "bf16", "fp16")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}

# How each method stores weights when the checkpoint that perfsim knows is not quantized; those that name no width
# are left alone with a warning. fp8 and bitsandbytes quantize at load time, the others want a quantized checkpoint.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "fp8": {"linear_dtype": "fp8", "expert_dtype": "fp8", "weight_only": False},
    "modelopt": {"linear_dtype": "fp8", "expert_dtype": "fp8", "weight_only": False},
    "modelopt_fp8": {"linear_dtype": "fp8", "expert_dtype": "fp8", "weight_only": False},
    "modelopt_fp4": {"linear_dtype": "nvfp4", "expert_dtype": "nvfp4", "weight_only": False},
    "w8a8_int8": {"linear_dtype": "int8", "expert_dtype": "int8", "weight_only": False},
    "w8a8_fp8": {"linear_dtype": "fp8", "expert_dtype": "fp8", "weight_only": False},
    **{name: {"linear_dtype": "int4", "expert_dtype": "int4", "weight_only": True}
       for name in ("awq", "awq_marlin", "gptq", "gptq_marlin", "bitsandbytes")},
}  # fmt: skip


def store_weights(plan: Plan, *, quantization: str = "quantization", dtype: str = "dtype") -> None:
    """`--quantization` and `--dtype`: the model with its weights stored otherwise, where the descriptor can say so."""
    changes: dict[str, Any] = {}
    used = None
    wanted = DTYPES.get(str(plan.get(dtype, "auto")).lower())
    if wanted is not None and wanted != plan.model.dtype:
        changes["dtype"], used = wanted, dtype
        for name in ("linear_dtype", "expert_dtype"):
            if getattr(plan.model, name) in UNQUANTIZED:
                changes[name] = wanted
    method = plan.get(quantization)
    if method is not None and plan.model.linear_dtype in UNQUANTIZED and plan.model.expert_dtype in UNQUANTIZED:
        stored = QUANTIZATIONS.get(str(method).lower())
        if stored is None:
            plan.warn(quantization, f"not modelled: how '{method}' stores weights is in the checkpoint; simulated as "
                                    f"{plan.model.linear_dtype}")  # fmt: skip
        else:
            changes.update(stored)
            used = quantization
            if stored["linear_dtype"] == "int4":
                plan.warn(quantization, "taken as 4-bit weights in groups of 128")
    if changes:
        plan.set("model", plan.model.model_copy(update=changes), used)


def kv_dtype(plan: Plan, flag: str) -> None:
    """The KV cache's type: any fp8 is fp8; the model's own type is `auto`; others are not modelled."""
    name = str(plan.get(flag, "auto")).lower()
    if name in ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"):
        plan.set("policy.kv_cache_dtype", "fp8", flag)
    elif name != "auto" and DTYPES.get({"bf16": "bfloat16"}.get(name, name)) != plan.model.dtype:
        plan.warn(flag, f"not modelled: '{name}'; simulated in the model's {plan.model.dtype}")


def adapters(plan: Plan, *, enable: str, modules: str, at_once: str, rank: str, in_memory: str,
             default_at_once: int, memory_default: bool) -> None:  # fmt: skip
    """LoRA serving; how many adapters exist is known from the modules named on the command line, else not at all."""
    listed, limit, cached = plan.get(modules), plan.get(at_once, default_at_once), plan.get(in_memory)
    width = plan.get(rank)
    if not plan.get(enable, listed is not None):
        for flag in (modules, at_once, rank, in_memory):
            if flag in plan.values:
                plan.warn(flag, f"without effect, because {plan.spelled(enable)} is not given")
        return
    plan.set("policy.lora.max_loras", limit, at_once if at_once in plan.values else enable)
    if width is not None:
        plan.set("policy.lora.max_lora_rank", width, rank)
    if cached is None and memory_default:
        cached = limit
    if cached is not None:
        plan.set("policy.lora.max_cpu_loras", cached, in_memory if in_memory in plan.values else None)
    if listed:
        plan.set("policy.lora.num_adapters", 1 if isinstance(listed, str) else len(listed), modules)
    else:
        plan.require("policy.lora.num_adapters", f"{plan.spelled(enable)} does not say how many adapters there are")


def replicas(plan: Plan, count: int, flag: str, *, router: str) -> None:
    """Data parallelism without a common step: `count` replicas behind a router."""
    if count <= 1:
        return
    if plan.chosen("deployment.groups") is not None:
        plan.warn(flag, "without effect, because the scenario has its own deployment.groups")
        return
    plan.set("deployment.groups", [{"name": "replica", "count": count}], flag)
    plan.set("deployment.router", {"kind": router}, flag)


def all2all(plan: Plan, flag: str, known: Mapping[str, str | None]) -> None:
    """What carries tokens to whole experts, by the engine's name for it; None in `known` is the engine's default."""
    name = plan.get(flag)
    if name is None or (str(name) in known and known[str(name)] is None):
        return
    if plan.setting("parallel.dp", 1) == 1:
        plan.warn(flag, "without effect: all GPUs of one rank have the same tokens here, and sum the experts' results")
        return
    if str(name) not in known:
        plan.warn(flag, f"not modelled: '{name}'; simulated as a plain all-to-all of one copy per picked expert")
    plan.set("policy.all2all_backend", known.get(str(name), "all_to_all"), flag)


def whole(plan: Plan, flag: str, value: Any, *, least: int = 1) -> int:
    """A count that a rule computes with; InputError below `least`."""
    if not isinstance(value, int) or value < least:
        raise plan.refuse(flag, f"expected an integer of at least {least}, got {value}")
    return value
