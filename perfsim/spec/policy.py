"""How a replica is run: parallelism, the engine's scheduler settings, and the promises made to clients."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from perfsim.spec.base import Bytes, Seconds, Spec

MAX_BATCHED_TOKENS = 1 << 20


class ParallelPlan(Spec):
    """How one replica is spread over `tp * pp * dp` GPUs.

    `tp` shards every layer over that many GPUs, `pp` cuts the layers into stages. `dp` data-parallel attention ranks
    run in lock step, each with its own scheduler and KV pool, and share the experts of a mixture. `ep` is over how many
    GPUs whole experts are spread: 1 (each expert is sharded over all `tp * dp` GPUs instead) or `tp * dp` (vLLM's
    --enable-expert-parallel).
    """

    tp: int = Field(default=1, gt=0, le=1024)
    pp: int = Field(default=1, gt=0, le=256)
    dp: int = Field(default=1, gt=0, le=4096)
    ep: int = Field(default=1, gt=0, le=65536)

    @model_validator(mode="after")
    def _experts_over_all(self) -> Self:
        if self.ep not in (1, self.tp * self.dp):
            raise ValueError(f"ep must be 1 or tp * dp = {self.tp * self.dp}, got {self.ep}")
        return self

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp * self.dp


def _one_or_several(value: object) -> object:
    return (value,) if isinstance(value, (int, float)) else value


Chances = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], ...],
    BeforeValidator(_one_or_several, json_schema_input_type=float | list[float]),
]


class SpeculativeDecoding(Spec):
    """Draft `num_speculative_tokens` tokens per sequence and step, verify them in the same forward pass.

    `acceptance` is the chance that draft token i is accepted given that all before it were, one per position; a single
    number holds for all positions. `method` says who drafts: `ngram` (host lookup, no GPU work), `mtp` (the model's own
    multi-token-prediction layers), `eagle` (one extra decoder layer of the target's shape) or `draft_model` (a whole
    smaller model of `draft_parameters` parameters, read once per draft token).
    """

    method: Literal["ngram", "mtp", "eagle", "draft_model"]
    num_speculative_tokens: int = Field(gt=0, le=64)
    acceptance: Chances = Field(min_length=1)
    draft_parameters: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.acceptance) not in (1, self.num_speculative_tokens):
            raise ValueError(f"acceptance needs 1 or {self.num_speculative_tokens} numbers, got {len(self.acceptance)}")
        if (self.method == "draft_model") != (self.draft_parameters is not None):
            raise ValueError("draft_parameters goes with method draft_model, and only with it")
        return self

    @property
    def lookahead(self) -> int:
        """Token positions beyond those of a step whose K/V blocks are reserved for the drafter.

        vllm/config/vllm.py, `num_lookahead_tokens`: as many as drafts, none for a lookup on the host.
        """
        return 0 if self.method == "ngram" else self.num_speculative_tokens

    def chances(self) -> tuple[float, ...]:
        """The chance of acceptance at each position."""
        return self.acceptance if len(self.acceptance) > 1 else self.acceptance * self.num_speculative_tokens


class LoraServing(Spec):
    """Adapters served beside the base model: at most `max_loras` of them in one step, each of rank `max_lora_rank`.

    `num_adapters` exist; a request names one, drawn with a Zipf law of exponent `popularity` (0: uniform) unless its
    trace says which. `max_cpu_loras` fit in host memory (None: all); others are read from storage first.
    """

    num_adapters: int = Field(gt=0, le=10**6)
    max_loras: int = Field(default=1, gt=0, le=4096)
    max_lora_rank: int = Field(default=16, gt=0, le=512)
    max_cpu_loras: int | None = Field(default=None, gt=0)
    popularity: float = Field(default=0.0, ge=0, le=5)


class KvOffload(Spec):
    """A second KV tier in the host's DRAM, as vLLM's offloading connector keeps it: `capacity` bytes per replica.

    Full blocks are written through as soon as they are computed; a prompt whose prefix is no longer in device memory
    loads it from the host instead of computing it. `block_size` tokens move together (None: the engine's block).
    """

    capacity: Bytes
    block_size: int | None = Field(default=None, gt=0, le=65536)


# vLLM's names (--all2all-backend), `deepep_auto` for SGLang's --deepep-mode auto, and `all_to_all` for a plain one.
All2AllBackend = Literal[
    "allgather_reducescatter", "all_to_all", "deepep_high_throughput", "deepep_low_latency", "deepep_auto"
]


class ServingPolicy(Spec):
    """vLLM V1's scheduler and cache settings, under vLLM's names.

    None means the engine's own default for this device and model; the loader fills it in. `async_scheduling` forms a
    step's batch while the step before it still runs. `scheduler_reserve_full_isl` admits a request only when its whole
    prompt fits the free KV blocks. `kv_cache_blocks` overrides the computed KV pool (vLLM's num_gpu_blocks_override).
    Without `mixed_steps` prompts that can be computed run first and in steps of their own, and decodes wait (SGLang
    without --enable-mixed-chunk). `sampling` is `sorted` where requests have a top-p, which vLLM's sampler sorts all
    logits for, else `plain`. With `enforce_eager` no step is a CUDA graph: the host launches every kernel of every step
    (vLLM's --enforce-eager, SGLang's --disable-cuda-graph, TensorRT-LLM's cuda_graph_config: null). `memory_rule` says
    what `gpu_memory_utilization` is a share of: vLLM's of the device, for everything; SGLang's of the device, for
    weights and KV cache alone; TensorRT-LLM's of what weights and activations leave, for the KV cache.
    `all2all_backend` is how tokens of data-parallel ranks reach whole experts (None: by the engine's default):
    `allgather_reducescatter` gathers all of them everywhere, `all_to_all` sends a copy per pick,
    `deepep_high_throughput` and `deepep_low_latency` are DeepEP's kernels, `deepep_auto` the latter for steps without
    prompts and the former for others.
    """

    max_num_batched_tokens: int | None = Field(default=None, gt=0, le=MAX_BATCHED_TOKENS)
    max_num_seqs: int | None = Field(default=None, gt=0, le=65536)
    max_model_len: int | None = Field(default=None, gt=0)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    memory_rule: Literal["vllm", "sglang", "trtllm"] = "vllm"
    block_size: int = Field(default=16, gt=0, le=1024)
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_chunked_prefill: bool = True
    mixed_steps: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    async_scheduling: bool = True
    enforce_eager: bool = False
    sampling: Literal["sorted", "plain"] = "sorted"
    all2all_backend: All2AllBackend | None = None
    scheduler_reserve_full_isl: bool = True
    watermark: float = Field(default=0.0, ge=0, lt=1)
    kv_cache_blocks: int | None = Field(default=None, gt=1)
    kv_cache_memory: Bytes | None = None
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    speculative: SpeculativeDecoding | None = None
    lora: LoraServing | None = None
    kv_offload: KvOffload | None = None

    @property
    def queries(self) -> int:
        """Tokens that a decoding sequence brings to a step: its last one and the drafts to verify."""
        return 1 if self.speculative is None else 1 + self.speculative.num_speculative_tokens

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
