"""From a table's words for a parallel plan and an engine to the keys of a scenario; unknown ones are reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from perfsim.spec import sglang_defaults, trtllm_defaults
from validation.compare import facts
from validation.compare.facts import InexpressibleError

Plan = dict[str, int]
# Closed loops: prefills of this many tokens, so many of them and so few requests per client are simulated.
PREFILL, MOST_PREFILLS, FEWEST = 8192, 10_000, 3
MOST = 1 << 53  # of whatever is counted: beyond it a float is no exact count
# What tables call an engine, `-` for spaces and `_`. Dynamo and MoRI carry requests and K/V between workers of the
# engine that they are named with.
ENGINES = {
    "vllm": "vllm", "sglang": "sglang", "trtllm": "trtllm", "trt": "trtllm", "tensorrt-llm": "trtllm",
    "trt-llm": "trtllm",
    "dynamo-sglang": "sglang", "dynamo-trt": "trtllm", "dynamo-trtllm": "trtllm", "dynamo-vllm": "vllm",
    "mori-sglang": "sglang",
}  # fmt: skip


def engine(name: str | None) -> str:
    """The engine profile for what a table calls its framework."""
    if name is None:
        raise InexpressibleError("no engine stated")
    found = ENGINES.get(name.strip().lower().replace("_", "-").replace(" ", "-"))
    if found is None:
        raise InexpressibleError(f"no profile of engine '{name}'")
    return found


def count(row: Mapping[str, Any], column: str, *, reason: str | None = None, least: int = 1) -> int:
    """The whole number in a column; InexpressibleError (`reason`) where there is none of at least `least`."""
    value = row.get(column)
    try:
        number = None if value is None else int(value)
    except (ValueError, OverflowError):
        number = None
    if number is None or number != value or not least <= number < MOST:
        raise InexpressibleError(reason or f"no value of {column} published")
    return number


def parallel_plan(
    *, model: str, tp: int, attention_dp: int, moe_tp: int, moe_ep: int, inflated: bool, pp: int = 1
) -> Plan:  # fmt: skip
    """The plan that these sizes describe, {"tp", "dp", "ep", "pp", "gpus"}.

    `inflated`: InferenceX's exports multiply GPU counts by the expert parallelism when there is one, so that 8 GPUs
    with ep 8 appear as 64, and fill whichever of `tp` and `attention_dp` is in use. Raises InexpressibleError where no
    plan fits the numbers.
    """
    ranks = max(1, attention_dp)
    if not facts.has_experts(model):
        return {"tp": tp, "dp": ranks, "ep": 1, "pp": pp, "gpus": tp * ranks * pp}
    if pp > 1 and ranks > 1:
        raise InexpressibleError("pipeline stages with data-parallel ranks are not modelled")
    stated = tp * ranks
    gpus = moe_tp * moe_ep
    if inflated and moe_ep > 1:
        if moe_tp == moe_ep and stated == gpus:
            gpus = moe_ep
            tp, ranks = (gpus, 1) if ranks == 1 else (1, gpus)
        elif moe_tp == 1 and ranks == tp > 1 and moe_ep == stated:
            gpus = tp
            tp, ranks = 1, gpus
        moe_tp, moe_ep = (1, gpus) if gpus != moe_tp * moe_ep else (moe_tp, moe_ep)
        stated = tp * ranks
    if stated != gpus:
        raise InexpressibleError("plan not published: attention and experts are on different numbers of GPUs")
    if moe_tp > 1 and moe_ep > 1:
        raise InexpressibleError("experts sharded and spread at once are not modelled")
    return {"tp": tp, "dp": ranks, "ep": moe_ep if moe_ep > 1 else 1, "pp": pp, "gpus": gpus * pp}


def check_size(plan: Plan, *, accelerator: str, model: str) -> None:
    """InexpressibleError where the stated TP cannot be one, as it is the number of all GPUs of the service.

    Also where the plan needs more than one node: no table says what connects them.
    """
    _, count = facts.node_of(accelerator)
    heads = {getattr(group.attention, "num_attention_heads", None) for group in facts.arch(model).layers}
    # Recurrent mixers have no heads that say how far they are sharded.
    if any(count % plan["tp"] for count in heads if count) or (plan["tp"] > 8 and plan["ep"] == 1):
        raise InexpressibleError("plan not published: tp counts all GPUs of the service")
    if plan["gpus"] > count:
        raise InexpressibleError(f"network between nodes not published: more than {count} GPUs of {accelerator}")


def keys_of(plan: Plan, model: str) -> dict[str, Any]:
    """`parallel`, and `deployment` for the ranks of a dense model, which share nothing."""
    if facts.has_experts(model) or plan["dp"] == 1:
        return {"parallel": {name: plan[name] for name in ("tp", "dp", "ep", "pp")}}
    ranks = {"groups": [{"name": "rank", "count": plan["dp"]}], "router": {"kind": "least_loaded"}}
    return {"parallel": {"tp": plan["tp"], "pp": plan["pp"]}, "deployment": ranks}


def engine_policy(
    name: str, *, version: str | None, accelerator: str, model: str, plan: Plan, date: Any = None
) -> dict[str, Any]:
    """What the engine chooses by itself, as a scenario's `policy`; vLLM's own choices are the loader's.

    `date` is that of the run, for rows without a version.
    """
    day = None if date is None else str(date)[:10]
    policy: dict[str, Any] = {"async_scheduling": facts.version_of(name, version, date=day)["async_scheduling"]}
    if plan["dp"] > 1 and plan["ep"] > 1:
        policy["all2all_backend"] = facts.facts("exchanges")["unpublished"]
    device = facts.accelerator(accelerator)
    if name == "sglang":
        chunk = sglang_defaults.chunked_prefill_size(device)
        ranks = plan["dp"] if facts.has_experts(model) else 1
        mla = any(getattr(group.attention, "kind", "") == "mla" for group in facts.arch(model).layers)
        share = sglang_defaults.mem_fraction_static(
            device, gpus=plan["gpus"], tp=plan["tp"] * ranks, attention_ranks=ranks, chunk=chunk, mla=mla
        )
        tokens = max(1, chunk // ranks)
        policy |= {"memory_rule": "sglang", "mixed_steps": False, "gpu_memory_utilization": share,
                   "block_size": sglang_defaults.PAGE_SIZE,
                   "max_num_batched_tokens": tokens,
                   "max_num_seqs": min(sglang_defaults.MAX_RUNNING_REQUESTS, tokens)}  # fmt: skip
    elif name == "trtllm":
        policy |= {"memory_rule": "trtllm", "gpu_memory_utilization": trtllm_defaults.FREE_MEMORY_FRACTION,
                   "block_size": trtllm_defaults.TOKENS_PER_BLOCK,
                   "max_num_batched_tokens": trtllm_defaults.MAX_NUM_TOKENS,
                   "max_num_seqs": trtllm_defaults.MAX_BATCH_SIZE}  # fmt: skip
    return policy


def closed_loop(*, isl: int, osl: int, clients: int, spread: bool) -> tuple[dict[str, Any], int]:
    """(workload, requests per client) of a closed loop; `spread`: InferenceX's lengths, uniform in 0.8-1.0 of nominal.

    A long loop has fewer requests per client, three at least (see `loops`), so that a whole table takes minutes.
    """
    client = facts.facts("clients")["inferencex"]
    shortest = client["shortest"] if spread else 1.0
    if min(isl, osl, clients) < 1:
        raise InexpressibleError("load not published: lengths and clients are at least one")

    def length(tokens: int) -> dict[str, Any]:
        low = math.ceil(shortest * tokens)
        return {"kind": "fixed", "tokens": tokens} if low == tokens else {"kind": "uniform", "low": low, "high": tokens}

    sent = int(client["prompts_per_client"])
    prefills = clients * (1 + isl // PREFILL)  # of every client's first prompt, in steps of some thousand tokens
    simulated = min(sent, max(FEWEST, MOST_PREFILLS // prefills))
    return {"kind": "synthetic", "num_requests": simulated * clients,
            "arrivals": {"kind": "closed", "concurrency": clients}, "prompt": length(isl),
            "output": length(osl)}, sent  # fmt: skip
