"""How a replica is run: parallelism, the engine's scheduler settings, and the promises made to clients."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Bytes, Seconds, Spec

MAX_BATCHED_TOKENS = 1 << 20


class ParallelPlan(Spec):
    """How one replica is spread over GPUs: `tp` shards every layer over that many GPUs of one node."""

    tp: int = Field(default=1, gt=0, le=1024)


class ServingPolicy(Spec):
    """vLLM V1's scheduler and cache settings, under vLLM's names.

    None means the engine's own default for this device and model; the loader fills it in. `async_scheduling` forms a
    step's batch while the step before it still runs. `scheduler_reserve_full_isl` admits a request only when its whole
    prompt fits the free KV blocks. `kv_cache_blocks` overrides the computed KV pool (vLLM's num_gpu_blocks_override).
    """

    max_num_batched_tokens: int | None = Field(default=None, gt=0, le=MAX_BATCHED_TOKENS)
    max_num_seqs: int | None = Field(default=None, gt=0, le=65536)
    max_model_len: int | None = Field(default=None, gt=0)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    block_size: int = Field(default=16, gt=0, le=1024)
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    async_scheduling: bool = True
    scheduler_reserve_full_isl: bool = True
    watermark: float = Field(default=0.0, ge=0, lt=1)
    kv_cache_blocks: int | None = Field(default=None, gt=1)
    kv_cache_memory: Bytes | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        tokens, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if tokens is not None and seqs is not None and tokens < seqs:
            raise ValueError(f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({seqs})")
        return self


Percentile = Literal["mean", "p50", "p90", "p95", "p99"]
LatencyBounds = dict[Percentile, Seconds]


class SLO(Spec):
    """Upper bounds on client latencies in seconds: `ttft: {p95: 500ms}`; `e2e` and `tpot` likewise.

    A request is good when it meets the tightest bound given for each of TTFT, TPOT and E2E; goodput counts good
    requests. A bound on a percentile or a mean is met when that statistic is; ITL, which belongs to tokens and not to
    requests, is judged this way only.
    """

    ttft: LatencyBounds = Field(default_factory=dict)
    tpot: LatencyBounds = Field(default_factory=dict)
    itl: LatencyBounds = Field(default_factory=dict)
    e2e: LatencyBounds = Field(default_factory=dict)
