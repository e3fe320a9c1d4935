"""One definition per number people see: tables, plots, tooltips and JSON all take name, unit and direction from here.

A key is the path of the value in `result.json`, `metrics.` left out: `ttft` (then a statistic), `throughput.
requests_per_s`, `cost.usd_per_hour`. A key without a definition still prints, under a label made from its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True, slots=True)
class MetricDef:
    """What one number is called, measured in, and which way is good; `formula` says how it is computed."""

    key: str
    label: str
    unit: str
    better: Better
    formula: str


LATENCIES = ("ttft", "engine_ttft", "tpot", "itl", "e2e", "queue_time")
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
# The latencies that belong to one request, so that a request can keep or break a promise about them; ITL belongs to
# a token.
PER_REQUEST = ("ttft", "tpot", "e2e")
# What gets an uncertainty band: everything that depends on how long work takes.
HEADLINE = (
    *(f"{name}.{stat}" for name in LATENCIES for stat in STATISTICS), "makespan_s", "throughput.requests_per_s",
    "throughput.output_tokens_per_s", "throughput.prompt_tokens_per_s", "throughput.total_tokens_per_s",
    "throughput.max_requests_per_s", "load", "goodput.fraction", "goodput.requests_per_s", "prefix_cache.hit_rate",
    "kv_cache.occupancy_mean", "kv_cache.occupancy_peak", "batch.mean_sequences", "queue.mean_waiting", "cost.usd",
    "cost.usd_per_request", "cost.usd_per_million_output_tokens", "cost.usd_per_million_tokens", "energy.joules",
    "energy.joules_per_output_token", "energy.mean_power_w",
)  # fmt: skip

_TABLE: tuple[MetricDef, ...] = (
    MetricDef("ttft", "TTFT", "s", "lower", "time to first token at the client: first token received - request sent"),
    MetricDef("engine_ttft", "Engine TTFT", "s", "lower", "first token produced - request queued in the engine"),
    MetricDef("tpot", "TPOT", "s", "lower", "(E2E - TTFT) / (output tokens - 1), per request; none for one token"),
    MetricDef("itl", "ITL", "s", "lower",
              "inter-token latency: gap between two tokens of one request, over all gaps; tokens of one step arrive"
              " together and make one gap, as in vLLM's benchmark"),
    MetricDef("e2e", "E2E", "s", "lower", "end to end at the client: last token received - request sent"),
    MetricDef("queue_time", "Queue time", "s", "lower", "first scheduled - queued in the engine"),
    MetricDef("makespan_s", "Makespan", "s", "lower", "first request sent to last token received"),
    MetricDef("throughput.requests_per_s", "Throughput", "requests/s", "higher", "completed requests / makespan"),
    MetricDef("throughput.output_tokens_per_s", "Output tokens", "tokens/s", "higher", "output tokens / makespan"),
    MetricDef("throughput.prompt_tokens_per_s", "Prompt tokens", "tokens/s", "higher",
              "prompt tokens, cached ones included, / makespan"),
    MetricDef("throughput.total_tokens_per_s", "Total tokens", "tokens/s", "higher", "(prompt + output) / makespan"),
    MetricDef("throughput.max_requests_per_s", "Saturation", "requests/s", "higher",
              "requests per second that the replica can serve at most, in closed form"),
    MetricDef("load", "Load", "fraction", "neither", "arrival rate / saturation rate"),
    MetricDef("goodput.fraction", "Goodput", "fraction", "higher",
              "requests within the tightest TTFT, TPOT and E2E bounds of the SLO / all, rejected and failed included"),
    MetricDef("goodput.requests_per_s", "Good requests", "requests/s", "higher", "good requests / makespan"),
    MetricDef("goodput.requests", "Good requests", "requests", "higher", "requests within every per-request bound"),
    MetricDef("counts.requests", "Requests", "requests", "neither", "completed + rejected + failed"),
    MetricDef("counts.completed", "Completed", "requests", "higher", "requests that received all their tokens"),
    MetricDef("counts.rejected", "Rejected", "requests", "lower",
              "longer than max_model_len or than the KV cache, or given up by the client"),
    MetricDef("counts.failed", "Failed", "requests", "lower", "given up after failures of replicas"),
    MetricDef("counts.prompt_tokens", "Prompt tokens", "tokens", "neither", "of completed requests, cached or not"),
    MetricDef("counts.output_tokens", "Output tokens", "tokens", "neither", "of completed requests"),
    MetricDef("counts.longest_context", "Longest context", "tokens", "neither", "prompt + output of one request"),
    MetricDef("counts.cached_tokens", "Cached prompt tokens", "tokens", "higher", "found in the prefix cache"),
    MetricDef("counts.preemptions", "Preemptions", "", "lower", "times a running request lost its KV blocks"),
    MetricDef("prefix_cache.hit_rate", "Prefix-cache hits", "fraction", "higher", "cached / all prompt tokens"),
    MetricDef("kv_cache.occupancy_mean", "KV occupancy, mean", "fraction", "neither",
              "blocks held by requests / blocks in the pool, averaged over time, idle time included"),
    MetricDef("kv_cache.occupancy_peak", "KV occupancy, peak", "fraction", "neither", "largest share of blocks in use"),
    MetricDef("kv_cache.blocks", "KV blocks", "blocks", "neither", "size of the pool"),
    MetricDef("batch.mean_sequences", "Batch size, mean", "sequences", "neither", "running sequences per engine step"),
    MetricDef("batch.max_sequences", "Batch size, peak", "sequences", "neither", "most sequences running at once"),
    MetricDef("batch.mean_tokens", "Tokens per step", "tokens", "neither", "new tokens per engine step"),
    MetricDef("queue.mean_waiting", "Waiting, mean", "requests", "lower", "waiting requests, averaged over time"),
    MetricDef("queue.max_waiting", "Waiting, peak", "requests", "lower", "most requests waiting at once"),
    MetricDef("cost.usd", "Cost of the run", "USD", "lower", "price per hour x makespan"),
    MetricDef("cost.usd_per_hour", "Price per hour", "USD", "lower", "price of all GPUs of the replica"),
    MetricDef("cost.usd_per_request", "Cost per request", "USD", "lower", "cost / completed requests"),
    MetricDef("cost.usd_per_million_output_tokens", "Cost per 1M output tokens", "USD", "lower",
              "cost / output tokens x 1e6"),
    MetricDef("cost.usd_per_million_tokens", "Cost per 1M tokens", "USD", "lower",
              "cost / (prompt + output tokens) x 1e6"),
    MetricDef("energy.joules", "Energy of the run", "J", "lower", "GPU idle + GPU dynamic + host power over makespan"),
    MetricDef("energy.joules_per_output_token", "Energy per output token", "J", "lower", "energy / output tokens"),
    MetricDef("energy.mean_power_w", "Mean power", "W", "lower", "energy / makespan"),
    MetricDef("energy.gpu_idle_joules", "GPUs, idle draw", "J", "lower", "idle power x GPUs x makespan"),
    MetricDef("energy.gpu_dynamic_joules", "GPUs, above idle", "J", "lower", "what the work itself draws"),
    MetricDef("energy.host_joules", "Host", "J", "lower", "the replica's share of the node's host power x makespan"),
    MetricDef("bound.compute", "Compute", "fraction", "neither", "share of busy time limited by FLOP/s"),
    MetricDef("bound.memory", "Memory bandwidth", "fraction", "neither", "share of busy time limited by HBM bandwidth"),
    MetricDef("bound.link", "GPU links", "fraction", "neither", "share of busy time limited by links between GPUs"),
    MetricDef("bound.network", "Network", "fraction", "neither", "share of busy time limited by links between nodes"),
    MetricDef("bound.host", "Host", "fraction", "neither", "share of busy time in which the GPU waits for the host"),
    MetricDef("replicas.requests", "Requests", "requests", "neither", "requests that the replica served"),
    MetricDef("replicas.output_tokens", "Output tokens", "tokens", "neither", "tokens that the replica put out"),
    MetricDef("replicas.busy_fraction", "Busy", "fraction", "neither", "time in engine steps / time of the run"),
    MetricDef("replicas.mean_batch", "Batch, mean", "sequences", "neither", "running sequences per engine step"),
    MetricDef("replicas.kv_peak_fraction", "KV peak", "fraction", "neither", "largest share of its KV blocks in use"),
    MetricDef("replicas.prefix_hit_rate", "Prefix hits", "fraction", "higher", "cached / all prompt tokens it saw"),
    MetricDef("replicas.preemptions", "Preemptions", "", "lower", "times a running request lost its KV blocks"),
    MetricDef("replicas.powered_s", "Powered", "s", "neither", "time on, starting, draining and repairs included"),
    MetricDef("replicas.failures", "Failures", "", "lower", "times the replica failed"),
    MetricDef("service.retries", "Retries", "requests", "lower", "requests sent again after a replica failed"),
    MetricDef("service.events", "SimPy events", "events", "neither", "events that the simulation of the cluster took"),
    MetricDef("service.replicas_started", "Replicas started", "replicas", "neither", "by the autoscaler"),
    MetricDef("service.replicas_drained", "Replicas drained", "replicas", "neither", "by the autoscaler"),
    MetricDef("kv_transfer.transfers", "K/V transfers", "", "neither", "prompts whose K/V moved to a decode replica"),
    MetricDef("kv_transfer.bytes", "K/V moved", "bytes", "neither", "of those prompts, hidden by their prefill or not"),
    MetricDef("kv_transfer.mean_s", "K/V transfer", "s", "lower", "from blocks there to K/V there, mean"),
    MetricDef("kv_transfer.mean_wait_s", "Wait for decode blocks", "s", "lower", "first token to blocks there, mean"),
    MetricDef("kv_transfer.bytes_per_s", "K/V transfer rate", "bytes/s", "higher",
              "bytes that no prefill hid / times of all transfers, summed"),
    MetricDef("speculation.mean_acceptance_length", "Tokens per verification", "tokens", "higher",
              "1 + accepted drafts / decode steps of all sequences"),
    MetricDef("speculation.accepted_fraction", "Drafts accepted", "fraction", "higher", "accepted / verified drafts"),
    MetricDef("speculation.draft_tokens", "Drafts verified", "tokens", "neither", "draft tokens over all steps"),
    MetricDef("kv_offload.hit_tokens", "Tokens loaded from host", "tokens", "higher",
              "prompt tokens whose K/V came from host memory instead of being computed"),
    MetricDef("kv_offload.hit_rate", "Host-tier hits", "fraction", "higher",
              "tokens loaded from host memory / prompt tokens of completed requests; those found on the device apart"),
    MetricDef("kv_offload.loads", "Loads", "", "neither", "transfers from host memory, one per prompt that hits"),
    MetricDef("kv_offload.loaded_bytes", "Loaded", "bytes", "neither", "over the host links of all GPUs"),
    MetricDef("kv_offload.mean_load_s", "Load", "s", "lower", "from blocks set aside to K/V there, waiting included"),
    MetricDef("kv_offload.load_busy_s", "Loading", "s", "neither", "time in which a scheduler's links load, summed"),
    MetricDef("kv_offload.stores", "Stores", "", "neither", "transfers to host memory, one per prompt and step"),
    MetricDef("kv_offload.stored_bytes", "Stored", "bytes", "neither", "over the host links of all GPUs"),
    MetricDef("kv_offload.mean_store_s", "Store", "s", "lower", "from the end of the step to K/V there, mean"),
    MetricDef("kv_offload.store_busy_s", "Storing", "s", "neither", "time in which a scheduler's links store, summed"),
    MetricDef("kv_offload.crowded_out", "Stores without room", "", "lower",
              "stores that found too few chunks to evict, for a while at least"),
    MetricDef("kv_offload.evicted_fraction", "Evicted", "fraction", "neither", "chunks evicted / chunks stored"),
    MetricDef("kv_offload.occupancy", "Tier occupancy", "fraction", "neither",
              "chunks in use at the end of the run / all; it never falls"),
    MetricDef("kv_offload.capacity_tokens", "Tier size", "tokens", "neither", "tokens whose K/V all tiers can hold"),
    MetricDef("timeline.kv_occupancy", "KV occupancy", "fraction", "neither", "share of KV blocks held by requests"),
    MetricDef("timeline.running", "Batch", "sequences", "neither", "running sequences"),
    MetricDef("timeline.waiting", "Queue", "requests", "lower", "waiting requests"),
    MetricDef("timeline.prefill_tokens_per_s", "Prefill", "tokens/s", "higher", "prompt tokens computed per second"),
    MetricDef("timeline.output_tokens_per_s", "Output", "tokens/s", "higher", "tokens emitted per second"),
)  # fmt: skip
METRICS: dict[str, MetricDef] = {definition.key: definition for definition in _TABLE}

_UNIT_WORDS = (("usd", "USD"), ("joules", "J"), ("_per_s", "1/s"), ("bytes", "bytes"))
_UNIT_ENDINGS = (("_s", "s"), ("_w", "W"), ("fraction", "fraction"), ("share", "fraction"), ("hit_rate", "fraction"))


def metric(key: str) -> MetricDef:
    """The definition of `key`; an unlisted key gets a label and a unit read off its name, and no direction."""
    known = METRICS.get(key)
    if known is not None:
        return known
    group, _, name = key.rpartition(".")
    if group == "rejected_for":
        return MetricDef(key, f"Rejected: {name}", "requests", "lower", "requests that the engine refused for this")
    unit = next((unit for word, unit in _UNIT_WORDS if word in name), "")
    unit = unit or next((unit for ending, unit in _UNIT_ENDINGS if name.endswith(ending)), "")
    label = name.removesuffix("_s" if unit == "s" else "_w" if unit == "W" else "").replace("_", " ")
    return MetricDef(key, label[:1].upper() + label[1:], unit, "neither", "")
