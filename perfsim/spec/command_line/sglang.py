"""What the flags of `sglang serve` mean that are not simply the value of one scenario key.

Sources, all of SGLang 0.5.23: sglang/srt/arg_groups/{parallel,memory,moe,serving,speculative}_hook.py and overrides.py.
"""

from __future__ import annotations

from perfsim.spec import sglang_defaults as defaults
from perfsim.spec.command_line.plan import Plan
from perfsim.spec.command_line.rules import adapters, all2all, kv_dtype, replicas, store_weights, whole
from perfsim.units import GB

_ALGORITHMS = {"EAGLE": "eagle", "EAGLE3": "eagle", "NEXTN": "mtp", "STANDALONE": "draft_model", "NGRAM": "ngram"}
_DEEPEP = {"auto": "deepep_auto", "normal": "deepep_high_throughput", "low_latency": "deepep_low_latency"}
_ROUTERS = {"total_requests": "least_loaded", "total_tokens": "least_loaded"}


def translate(plan: Plan) -> None:
    """Fill `plan` from its flags."""
    attention_ranks = _parallel(plan)
    plan.set("policy.block_size", plan.setting("policy.block_size", defaults.PAGE_SIZE))
    _batch(plan, attention_ranks)
    _memory(plan, attention_ranks)
    _switches(plan)
    kv_dtype(plan, "kv-cache-dtype")
    store_weights(plan)
    _speculative(plan)
    adapters(
        plan, enable="enable-lora", modules="lora-paths", at_once="max-loras-per-batch", rank="max-lora-rank",
        in_memory="max-loaded-loras", default_at_once=defaults.MAX_LORAS_PER_BATCH, memory_default=False,
    )  # fmt: skip
    _host_cache(plan)
    if plan.get("disaggregation-mode", "null") != "null":
        plan.warn("disaggregation-mode", "one command line is one side of a disaggregated deployment: simulated as one "
                  "engine that does both; describe both sides with --set deployment.groups")  # fmt: skip


def _parallel(plan: Plan) -> int:
    """`tp-size` counts all GPUs of a stage: attention-parallel ranks divide them, `dp-size` alone multiplies engines.

    `--dp-size N --enable-dp-attention` is the older spelling of `--attn-dp-size N` (fields/parallel.py).
    """
    tp = whole(plan, "tp-size", plan.get("tp-size", 1))
    copies = whole(plan, "dp-size", plan.get("dp-size", 1))
    ranks = whole(plan, "attn-dp-size", plan.get("attn-dp-size", 1))
    flag = "attn-dp-size"
    if plan.get("enable-dp-attention", False) and ranks == 1:
        ranks, copies, flag = copies, 1, "dp-size"
    if tp % ranks:
        raise plan.refuse(flag, f"expected a divisor of --tp-size {tp} with attention data parallelism, got {ranks}")
    if ranks > 1 and not plan.is_mixture:
        plan.warn(flag, "attention data parallelism without experts: the MLP is simulated on each rank alone")
    plan.set("parallel.tp", tp // ranks, "tp-size" if "tp-size" in plan.values else None)
    plan.set("parallel.dp", ranks, flag)
    replicas(plan, copies, "dp-size", router=_ROUTERS.get(str(plan.get("load-balance-method")), "round_robin"))
    _experts(plan, tp)
    return ranks


def _experts(plan: Plan, tp: int) -> None:
    """All-to-all backends spread whole experts over all GPUs of the stage (overrides.py, `_a2a_ep_size`)."""
    spread, backend = whole(plan, "ep-size", plan.get("ep-size", 1)), plan.get("moe-a2a-backend", "none")
    flag = "ep-size" if spread > 1 or backend == "none" else "moe-a2a-backend"
    if (spread <= 1 and backend == "none") or not plan.is_mixture:
        return
    if spread not in (1, tp):
        plan.warn("ep-size", f"not modelled: {spread} of {tp} GPUs; simulated with experts spread over all of them")
    plan.set("parallel.ep", plan.setting("parallel.tp") * plan.setting("parallel.dp"), flag)
    mode = str(plan.get("deepep-mode", "auto"))
    if mode != "auto" and backend != "deepep":
        plan.warn("deepep-mode", "without effect, because --moe-a2a-backend is not deepep")
    all2all(plan, "moe-a2a-backend", {"none": None, "deepep": _DEEPEP[mode]})


def _batch(plan: Plan, ranks: int) -> None:
    """Both limits are for all attention ranks together (parallel_hook.py, kv_cache_configurator.py)."""
    chunk = plan.get("chunked-prefill-size")
    most = plan.get("max-prefill-tokens", defaults.MAX_PREFILL_TOKENS)
    running = plan.get("max-running-requests")
    if chunk is None:
        chunk = defaults.chunked_prefill_size(plan.accelerator)
    if chunk > 0:
        if "max-prefill-tokens" in plan.values:
            plan.warn("max-prefill-tokens", "not modelled together with chunked prefill")
        plan.set("policy.max_num_batched_tokens", max(1, chunk // ranks),
                 "chunked-prefill-size" if "chunked-prefill-size" in plan.values else None)  # fmt: skip
    else:
        plan.set("policy.enable_chunked_prefill", False, "chunked-prefill-size")
        length = plan.setting("policy.max_model_len", plan.model.max_position_embeddings)
        plan.set("policy.max_num_batched_tokens", max(most, length), "chunked-prefill-size")
    tokens = plan.setting("policy.max_num_batched_tokens")
    if running is not None:
        each = max(1, whole(plan, "max-running-requests", running) // ranks)
        if isinstance(tokens, int) and each > tokens:
            plan.warn("max-running-requests", f"simulated as {tokens}, the tokens of a step: decodes share steps here")
            each = tokens
        plan.set("policy.max_num_seqs", each, "max-running-requests")
    else:
        plan.set("policy.max_num_seqs", min(defaults.MAX_RUNNING_REQUESTS, tokens))


def _memory(plan: Plan, ranks: int) -> None:
    """`mem-fraction-static` is the share of weights and KV cache, without activations: `memory_rule` sglang."""
    share, tokens = plan.get("mem-fraction-static"), plan.get("max-total-tokens")
    plan.set("policy.memory_rule", "sglang")
    if share is None:
        tp, pp = plan.setting("parallel.tp", 1) * ranks, plan.setting("parallel.pp", 1)
        chunk = plan.get("chunked-prefill-size") or defaults.chunked_prefill_size(plan.accelerator)
        share = defaults.mem_fraction_static(
            plan.accelerator, gpus=tp * pp, tp=tp, attention_ranks=ranks, mla=_is_mla(plan),
            chunk=chunk if chunk > 0 else plan.get("max-prefill-tokens", defaults.MAX_PREFILL_TOKENS),
        )  # fmt: skip
        plan.set("policy.gpu_memory_utilization", share)
    else:
        plan.set("policy.gpu_memory_utilization", share, "mem-fraction-static")
    if tokens is not None:
        blocks = whole(plan, "max-total-tokens", tokens) // plan.setting("policy.block_size")
        plan.set("policy.kv_cache_blocks", blocks + 1, "max-total-tokens")  # and vLLM's null block


def _is_mla(plan: Plan) -> bool:
    return any(getattr(group.attention, "kind", "") == "mla" for group in plan.model.layers)


def _switches(plan: Plan) -> None:
    if not plan.get("enable-mixed-chunk", False):
        beside = any(plan.get(flag) for flag in ("enable-lora", "lora-paths", "enable-hierarchical-cache"))
        if beside or plan.setting("parallel.pp", 1) > 1:
            plan.warnings.append("without --enable-mixed-chunk SGLang runs prefill and decode in steps of their own; "
                                 "with stages, adapters or a host cache simulated as mixed steps of vLLM")  # fmt: skip
        else:
            plan.set("policy.mixed_steps", False)
    if plan.get("disable-radix-cache", False):
        plan.set("policy.enable_prefix_caching", False, "disable-radix-cache")
    if plan.get("disable-overlap-schedule", False):
        plan.set("policy.async_scheduling", False, "disable-overlap-schedule")
    elif plan.setting("parallel.pp", 1) > 1:  # overrides.py, `_pipeline_parallel_overlap_disable`
        plan.set("policy.async_scheduling", False)
    if plan.get("enable-priority-scheduling", False):
        plan.set("policy.scheduling_policy", "priority", "enable-priority-scheduling")
    order = plan.get("schedule-policy", "fcfs")
    if order != "fcfs":
        plan.warn("schedule-policy", f"not modelled: '{order}'; simulated as fcfs")


def _speculative(plan: Plan) -> None:
    """A chain of `num-steps` draft tokens; trees (top-k above 1) are not modelled."""
    algorithm = plan.get("speculative-algorithm")
    steps, width = plan.get("speculative-num-steps"), plan.get("speculative-eagle-topk")
    tokens = plan.get("speculative-num-draft-tokens")
    plan.get("speculative-draft-model-path")
    if algorithm is None:
        return
    method = _ALGORITHMS.get(str(algorithm).upper())
    if method is None:
        plan.warn("speculative-algorithm", f"not modelled: '{algorithm}'; simulated without speculative decoding")
        return
    if method == "ngram":
        count = tokens
        if count is None:
            raise plan.refuse("speculative-algorithm", "say how many are drafted, with --speculative-num-draft-tokens")
    else:
        usual, wide = defaults.draft_shape(plan.model.architecture, standalone=method == "draft_model")
        count = usual if steps is None else steps
        width = wide if steps is None and width is None else width
    if width not in (None, 1):
        plan.warn("speculative-eagle-topk", f"a tree of drafts is not modelled: simulated as a chain of {count}")
    plan.set("policy.speculative.method", method, "speculative-algorithm")
    plan.set("policy.speculative.num_speculative_tokens", count, "speculative-algorithm")
    plan.require("policy.speculative.acceptance", "how many draft tokens are accepted is not in a command line")
    if method == "draft_model":
        plan.require("policy.speculative.draft_parameters", "the size of the draft model is not in a command line")


def _host_cache(plan: Plan) -> None:
    """HiCache's host tier: `hicache-size` GB per GPU; a ratio to the device's pool is no number of bytes yet."""
    on, size = plan.get("enable-hierarchical-cache", False), plan.get("hicache-size", 0)
    ratio = plan.get("hicache-ratio")
    if not on:
        for flag in ("hicache-size", "hicache-ratio"):
            if flag in plan.values:
                plan.warn(flag, "without effect, because --enable-hierarchical-cache is not given")
    elif size:
        gpus = plan.setting("parallel.tp", 1) * plan.setting("parallel.dp", 1) * plan.setting("parallel.pp", 1)
        plan.set("policy.kv_offload.capacity", size * GB * gpus, "hicache-size")
    else:
        times = "a multiple" if ratio is None else f"{ratio:g} times"
        plan.require("policy.kv_offload.capacity", f"the host cache is {times} of the device's: say it in bytes")
