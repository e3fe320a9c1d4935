"""What the options of `trtllm-serve` and the keys of its options file mean. Recalled, not read: verified: false."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perfsim.spec import trtllm_defaults as defaults
from perfsim.spec.command_line.plan import Plan
from perfsim.spec.command_line.rules import kv_dtype, whole


def translate(plan: Plan) -> None:
    """Fill `plan` from its flags and from the options file."""
    options = dict(_flat(plan.options))
    _parallel(plan)
    _batch(plan)
    _memory(plan, options)
    kv_dtype(plan, "kv_cache_dtype")
    if options.get("disable_overlap_scheduler") is True:
        plan.set("policy.async_scheduling", False)
    if options.get("cuda_graph_config", {}) is None:  # null; without the key LlmArgs has graphs
        plan.set("policy.enforce_eager", True)
    _speculative(plan, options)
    if plan.get("server_role") is not None:
        plan.warn("server_role", "one command line is one side of a disaggregated deployment: simulated as one engine "
                  "that does both; describe both sides with --set deployment.groups")  # fmt: skip


def _parallel(plan: Plan) -> None:
    """`tp_size` counts all GPUs of a stage; with attention data parallelism each of them is a rank of its own."""
    tp, spread = whole(plan, "tp_size", plan.get("tp_size", 1)), plan.get("ep_size")
    ranks = tp if plan.get("enable_attention_dp", False) else 1
    flag = "tp_size" if "tp_size" in plan.values else None
    plan.set("parallel.tp", tp // ranks, flag)
    plan.set("parallel.dp", ranks, "enable_attention_dp" if ranks > 1 else None)
    if spread is not None and spread > 1 and plan.is_mixture:
        if spread != tp:
            plan.warn("ep_size", f"not modelled: {spread} of {tp} GPUs; simulated with experts spread over all of them")
        plan.set("parallel.ep", tp, "ep_size")


def _batch(plan: Plan) -> None:
    seqs = plan.setting("policy.max_num_seqs", defaults.MAX_BATCH_SIZE)
    tokens = plan.setting("policy.max_num_batched_tokens", defaults.MAX_NUM_TOKENS)
    if isinstance(seqs, int) and isinstance(tokens, int) and seqs > tokens:
        plan.warn("max_batch_size", f"simulated as {tokens}, the tokens of a step")
        seqs = tokens
    plan.set("policy.max_num_seqs", seqs, "max_batch_size" if "max_batch_size" in plan.values else None)
    plan.set("policy.max_num_batched_tokens", tokens, "max_num_tokens" if "max_num_tokens" in plan.values else None)
    if not plan.get("enable_chunked_prefill", False):
        length = plan.setting("policy.max_model_len", plan.model.max_position_embeddings)
        if length <= tokens:
            plan.set("policy.enable_chunked_prefill", False)
        else:
            plan.warnings.append(f"without enable_chunked_prefill, prompts above max_num_tokens ({tokens}) would be "
                                 "refused; here they are cut into chunks")  # fmt: skip


def _memory(plan: Plan, options: Mapping[str, Any]) -> None:
    """The cache gets a share of the memory that weights and activations leave: `memory_rule` trtllm."""
    share = plan.get("kv_cache_free_gpu_memory_fraction", defaults.FREE_MEMORY_FRACTION)
    flag = "kv_cache_free_gpu_memory_fraction"
    plan.set("policy.memory_rule", "trtllm")
    plan.set("policy.gpu_memory_utilization", share, flag if flag in plan.values else None)
    block = options.get("kv_cache_config.tokens_per_block", defaults.TOKENS_PER_BLOCK)
    plan.set("policy.block_size", block)
    if options.get("kv_cache_config.enable_block_reuse") is False:
        plan.set("policy.enable_prefix_caching", False)
    tokens = options.get("kv_cache_config.max_tokens")
    if isinstance(tokens, int) and isinstance(block, int) and block > 0:
        plan.set("policy.kv_cache_blocks", tokens // block + 1)  # and vLLM's null block
    host = options.get("kv_cache_config.host_cache_size")
    if host:
        gpus = plan.setting("parallel.tp", 1) * plan.setting("parallel.dp", 1) * plan.setting("parallel.pp", 1)
        plan.set("policy.kv_offload.capacity", host * gpus if isinstance(host, (int, float)) else host)


def _speculative(plan: Plan, options: Mapping[str, Any]) -> None:
    kind = options.get("speculative_config.decoding_type")
    if kind is None:
        return
    method = {"MTP": "mtp", "Eagle": "eagle", "Eagle3": "eagle", "NGram": "ngram"}.get(str(kind))
    if method is None:
        plan.warnings.append(f"speculative_config: '{kind}' not modelled; simulated without speculative decoding")
        return
    key = "num_nextn_predict_layers" if method == "mtp" else "max_draft_len"
    plan.set("policy.speculative.method", method)
    if (count := options.get(f"speculative_config.{key}")) is None:
        raise plan.refuse("extra_llm_api_options", f"speculative_config.{key} is missing")
    plan.set("policy.speculative.num_speculative_tokens", count)
    plan.require("policy.speculative.acceptance", "how many draft tokens are accepted is not in a command line")


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
