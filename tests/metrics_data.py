"""Records of a toy serving engine, and a Result made of them: consistent data whose totals are known independently."""

from __future__ import annotations

from typing import Any

import numpy as np

from perfsim.metrics.aggregate import Aggregate
from perfsim.metrics.result import Result
from perfsim.spec.policy import SLO

INGRESS_S, EGRESS_S = 0.004, 0.003
BLOCK_SIZE, KV_BLOCKS = 16, 25_600
_REQUEST = (
    "request_index", "arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s", "prompt_tokens",
    "output_tokens", "cached_tokens", "preemptions", "session_id", "adapter",
)  # fmt: skip
_SEGMENT = (
    "start_s", "steps", "first_s", "slope_s", "tokens", "logits", "decode_sequences", "gap_sequences", "emitted",
    "prefill_tokens", "running", "waiting", "kv_blocks",
)  # fmt: skip
Columns = dict[str, Any]


def toy_run(count: int, *, rate: float, seed: int = 0, slots: int = 64) -> tuple[Columns, Columns]:
    """Request and segment columns of a FCFS engine: whole prompts join a step, decode runs until something changes."""
    rng = np.random.default_rng(seed)
    burst = np.where(np.sin(np.arange(count) / count * 9.0) > 0, 1.0, 0.45)
    arrival = np.cumsum(rng.exponential(burst / rate))
    prompt = np.clip(rng.lognormal(7.2, 1.1, count), 8, 30_000).astype(int).tolist()
    output = np.clip(rng.lognormal(4.8, 0.9, count), 1, 2_000).astype(int).tolist()
    queued, now, head = (arrival + INGRESS_S).tolist(), 0.0, 0
    scheduled, first, finish = [0.0] * count, [0.0] * count, [0.0] * count
    left: dict[int, int] = {}
    rows: list[tuple[float, ...]] = []
    while head < count or left:
        if not left:
            now = max(now, queued[head])
        joins = []
        while head < count and queued[head] <= now and len(left) + len(joins) < slots and len(joins) < 4:
            joins.append(head)
            head += 1
        prefill = sum(prompt[index] - prompt[index] // 3 for index in joins)
        base = 0.012 + 6e-5 * len(left) + 4.5e-5 * prefill
        slope = 4e-7 * len(left)
        steps = 1
        if not joins:
            steps = min(left.values())
            until = queued[head] if head < count and len(left) < slots else np.inf
            while steps > 1 and now + (steps - 1) * base > until:
                steps = max(1, steps // 2)
        lasting = steps * base + slope * steps * (steps - 1) / 2
        running, decode = len(left) + len(joins), len(left)
        waiting = int(np.searchsorted(queued, now, side="right")) - head
        blocks = sum((prompt[index] + output[index] - rest) // BLOCK_SIZE + 1 for index, rest in left.items())
        blocks += sum(prompt[index] // BLOCK_SIZE + 1 for index in joins)
        rows.append((now, steps, base, slope if steps > 1 else 0.0, decode + prefill, running, decode, decode, running,
                     prefill, running, waiting, min(blocks, KV_BLOCKS)))  # fmt: skip
        for index in joins:
            scheduled[index] = now
        now += lasting
        for index in list(left):
            left[index] -= steps
            if left[index] == 0:
                finish[index] = now
                del left[index]
        for index in joins:
            first[index] = now
            if output[index] == 1:
                finish[index] = now
            else:
                left[index] = output[index] - 1
    order = np.argsort(finish, kind="stable")
    cached = [tokens // 3 for tokens in prompt]
    session, none = np.arange(count) % 7, np.full(count, -1)
    columns = (np.arange(count), arrival, queued, scheduled, first, finish, prompt, output, cached, none + 1, session,
               none)  # fmt: skip
    requests = {name: np.asarray(column)[order] for name, column in zip(_REQUEST, columns, strict=True)}
    return requests, dict(zip(_SEGMENT, np.array(rows).T, strict=True))


def chunked(columns: Columns, size: int) -> list[Columns]:
    """`columns` cut into chunks of `size` rows."""
    total = len(next(iter(columns.values())))
    return [{name: column[at : at + size] for name, column in columns.items()} for at in range(0, total, size)]


def aggregate(requests: Columns, segments: Columns, *, chunk: int = 1 << 16, **options: Any) -> Aggregate:
    """An Aggregate filled with both tables, `chunk` rows at a time."""
    slo = options.pop(
        "slo", SLO(ttft={"p95": 2.0, "p99": 6.0}, tpot={"p95": 0.05}, e2e={"p99": 40.0}, itl={"p99": 0.1})
    )
    total = Aggregate(slo=slo, egress=EGRESS_S, kv_blocks=KV_BLOCKS, block_size=BLOCK_SIZE, **options)
    for part in chunked(requests, chunk):
        total.add_requests(part)
    for part in chunked(segments, chunk):
        total.add_segments(part)
    return total


def synthetic_result(total: Aggregate, **changes: Any) -> Result:
    """A complete Result around an aggregate, with plausible figures for what the simulator would add."""
    found = total.finish()
    span = found.makespan_s or 0.0
    shares = {"linear": 0.46, "attention_decode": 0.12, "attention_prefill": 0.07, "communication": 0.09,
              "lm_head": 0.02, "host": 0.05, "idle": 0.19}  # fmt: skip
    tokens = found.metrics["counts"]["output_tokens"]
    gpu = {"label": "NVIDIA H100 SXM", "peak_flops": {"bf16": 989.4e12, "fp8": 1978.9e12}, "tdp": 700.0,
           "memory": {"kind": "hbm", "capacity": 80e9, "read_bandwidth": 3.35e12}, "price_per_hour": 2.99}  # fmt: skip
    layer = {
        "count": 80,
        "attention": {"kind": "gqa", "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
        "mlp": {"kind": "dense", "intermediate_size": 28672},
    }
    model = {"name": "llama-3.1-70b", "hf_id": "meta-llama/Llama-3.1-70B-Instruct", "architecture": "LlamaForCausalLM",
             "layers": [layer], "hidden_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
             "dtype": "bf16", "linear_dtype": "bf16"}  # fmt: skip
    fields: dict[str, Any] = {
        "perfsim_version": "0.1.0",
        "scenario_hash": "5f" * 32,
        "seed": 0,
        "scenario": {
            "name": "demo",
            "model": model,
            "hardware": {"label": "DGX H100", "accelerator_count": 8, "accelerator": gpu, "host_power": 1800.0,
                         "scale_up": {"kind": "nvlink", "bandwidth": 450e9}},
            "parallel": {"tp": 8},
            "policy": {"max_num_batched_tokens": 8192, "max_num_seqs": 64, "gpu_memory_utilization": 0.9,
                       "block_size": 16, "enable_prefix_caching": True, "kv_cache_blocks": None},
            "workload": {"kind": "trace", "trace": "mooncake-conversation", "time_scale": 1.0},
            "calibration": {"status": "first-guess"},
        },
        "metrics": found.metrics,
        "curves": found.curves,
        "timeline": found.timeline,
        "simulation": found.simulation,
        "breakdown": {name: share * span for name, share in shares.items()},
        "bound": {"memory": 0.58, "compute": 0.24, "link": 0.11, "host": 0.07} if span else {},
        "memory": {"weights": 17.6e9, "activations": 2.1e9, "runtime": 1.9e9, "kv_cache": 50.4e9, "unused": 8.0e9},
        "cost": {"usd_per_hour": 23.92, "usd": 23.92 * span / 3600,
                 "usd_per_million_output_tokens": 23.92 * span / 3600 / tokens * 1e6 if tokens else None},
        "energy": {"joules": 4600.0 * span, "mean_power_w": 4600.0,
                   "joules_per_output_token": 4600.0 * span / tokens if tokens else None},
        "provenance": {
            "calibration": {"status": "first-guess", "source": "efficiencies guessed from published kernel results",
                            "engine": "vllm 0.11"},
            "unverified": ["hardware.accelerator.price_per_hour", "calibration.engine.step_host"],
        },
        "warnings": ["No calibration for h100-80gb-sxm: every efficiency is a first guess."],
    }  # fmt: skip
    return Result(**{**fields, **changes})
