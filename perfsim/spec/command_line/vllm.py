"""What the flags of `vllm serve` mean that are not simply the value of one scenario key.

Sources, all of vLLM 0.32.0: vllm/engine/arg_utils.py, vllm/config/*.py, vllm/v1/engine/core.py.
"""

from __future__ import annotations

from typing import Any

from perfsim.spec.command_line.plan import Plan
from perfsim.spec.command_line.rules import adapters, all2all, kv_dtype, replicas, store_weights, whole
from perfsim.spec.engine_defaults import batch_defaults
from perfsim.units import GIB

# The first two are no longer there and mean the third (vllm/config/parallel.py).
_EXCHANGES = {
    "naive": "allgather_reducescatter", "pplx": "allgather_reducescatter",
    **{name: name for name in ("allgather_reducescatter", "deepep_high_throughput", "deepep_low_latency")},
}  # fmt: skip
_OFFLOADING = ("OffloadingConnector", "SimpleCPUOffloadConnector")
_METHODS = {
    "ngram": "ngram", "ngram_gpu": "ngram", "suffix": "ngram", "eagle": "eagle", "eagle3": "eagle", "mtp": "mtp",
    "draft_model": "draft_model",
}  # fmt: skip


def translate(plan: Plan) -> None:
    """Fill `plan` from its flags."""
    _parallel(plan)
    _lengths(plan)
    kv_dtype(plan, "kv-cache-dtype")
    store_weights(plan)
    _speculative(plan)
    adapters(plan, enable="enable-lora", modules="lora-modules", at_once="max-loras", rank="max-lora-rank",
             in_memory="max-cpu-loras", default_at_once=1, memory_default=True)  # fmt: skip
    _offload(plan)


def _parallel(plan: Plan) -> None:
    """Only mixtures run data-parallel ranks in lock step; dense ranks are engines of their own (v1/engine/core.py)."""
    ranks = whole(plan, "data-parallel-size", plan.get("data-parallel-size", 1))
    if plan.is_mixture:
        plan.set("parallel.dp", ranks, "data-parallel-size")
    else:
        replicas(plan, ranks, "data-parallel-size", router="least_loaded")
    if not plan.get("enable-expert-parallel", False):
        return
    if plan.is_mixture:
        all2all(plan, "all2all-backend", _EXCHANGES)
        shares = plan.setting("parallel.tp", 1) * plan.setting("parallel.dp", 1)
        plan.set("parallel.ep", shares, "enable-expert-parallel")
    else:
        plan.warn("enable-expert-parallel", f"without effect, because {plan.model.name} has no experts")


def _lengths(plan: Plan) -> None:
    longest = plan.get("max-model-len")
    if longest == -1:
        plan.warn("max-model-len", "auto is not modelled: simulated with the model's own maximum")
    elif longest is not None:
        plan.set("policy.max_model_len", longest, "max-model-len")
    mode = plan.get("performance-mode", "balanced")
    if mode == "throughput":  # doubles what is left open (arg_utils.py)
        tokens, seqs = batch_defaults(plan.accelerator)
        for key, value in (("policy.max_num_batched_tokens", 2 * tokens), ("policy.max_num_seqs", 2 * seqs)):
            if plan.setting(key) is None:
                plan.set(key, value, "performance-mode")
    elif mode != "balanced":
        plan.warn("performance-mode", f"not modelled: '{mode}'")


def _speculative(plan: Plan) -> None:
    """`--speculative-config` and its short forms; how many drafts are accepted is in no command line."""
    config = plan.get("speculative-config", {})
    if not isinstance(config, dict):
        raise plan.refuse("speculative-config", 'expected a JSON object such as {"method": "mtp"}')
    short = {"method": "spec-method", "model": "spec-model", "num_speculative_tokens": "spec-tokens"}
    given = {key: plan.get(flag) for key, flag in short.items()}
    config = {**config, **{key: value for key, value in given.items() if value is not None}}
    if not config:
        return
    flag = "speculative-config" if "speculative-config" in plan.values else next(
        flag for flag in short.values() if flag in plan.values)  # fmt: skip
    method = _method(config)
    if method is None:
        plan.warn(flag, f"not modelled: method '{config.get('method')}'; simulated without speculative decoding")
        return
    tokens = config.get("num_speculative_tokens")
    if tokens is None and method == "mtp":  # the checkpoint's own number of prediction layers (config/speculative.py)
        tokens = plan.model.num_nextn_predict_layers or None
    if tokens is None:
        raise plan.refuse(flag, "num_speculative_tokens is missing")
    plan.set("policy.speculative.method", method, flag)
    plan.set("policy.speculative.num_speculative_tokens", tokens, flag)
    plan.require("policy.speculative.acceptance", "how many draft tokens are accepted is not in a command line")
    if method == "draft_model":
        plan.require("policy.speculative.draft_parameters", "the size of the draft model is not in a command line")


def _method(config: dict[str, Any]) -> str | None:
    """perfsim's name of the method; vLLM takes `ngram` for no method without a model, and reads the model's name."""
    method, model = config.get("method"), str(config.get("model", ""))
    if method is None:
        method = "ngram" if model in ("", "ngram", "[ngram]") else "draft_model"
    if method in ("draft_model", "eagle") and "eagle" in model.lower():
        return "eagle"
    return "mtp" if str(method).endswith("_mtp") else _METHODS.get(str(method))


def _offload(plan: Plan) -> None:
    """A KV tier in host memory, by `--kv-offloading-size` (GiB over all ranks) or by the connector's own config."""
    size, backend = plan.get("kv-offloading-size"), plan.get("kv-offloading-backend", "native")
    config = plan.get("kv-transfer-config", {})
    if not isinstance(config, dict):
        raise plan.refuse("kv-transfer-config", 'expected a JSON object such as {"kv_connector": "NixlConnector"}')
    if size is not None and backend == "native":
        plan.set("policy.kv_offload.capacity", size * GIB, "kv-offloading-size")
    elif size is not None:
        plan.warn("kv-offloading-size", f"not modelled: backend '{backend}'")
    if not config:
        return
    connector, extra = config.get("kv_connector"), config.get("kv_connector_extra_config") or {}
    if connector in _OFFLOADING and isinstance(extra, dict):
        if size is None and extra.get("cpu_bytes_to_use") is None:
            raise plan.refuse("kv-transfer-config", f"{connector} wants kv_connector_extra_config.cpu_bytes_to_use")
        if size is None:
            plan.set("policy.kv_offload.capacity", extra["cpu_bytes_to_use"], "kv-transfer-config")
        if "block_size" in extra:
            plan.set("policy.kv_offload.block_size", extra["block_size"], "kv-transfer-config")
        return
    role = {"kv_producer": "prefill", "kv_consumer": "decode"}.get(str(config.get("kv_role")), "prefill or decode")
    plan.warn(
        "kv-transfer-config",
        f"one command line is one side of a disaggregated deployment ({connector}, {role}): simulated as one engine "
        "that does both; describe both sides with --set deployment.groups",
    )
