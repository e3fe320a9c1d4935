"""aiconfigurator's kernel tables: products, attention, latent attention, fused experts, quantisation.

Its benchmarks repeat a kernel on the same buffers. Where a curve was fitted to a device and an engine, the prediction
is that of the curve with what the L2 cache keeps between repeats, how skewed a routing is, and the host's launches
where they were eager: the conditions that were fitted with it. All else is priced as in an engine, without them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from perfsim.calibrate.rows import FORMATS, STREAMS
from perfsim.ops.gemm import gemm
from perfsim.ops.mlp import mlp_ops
from perfsim.ops.op import Op
from perfsim.ops.step import StepShape
from perfsim.spec.model import GroupedQueryAttention, MixtureOfExperts, MultiHeadLatentAttention
from validation.compare import facts
from validation.compare.facts import InexpressibleError
from validation.compare.kernel_tables import compare_kernels
from validation.compare.lowered import (
    ARITHMETIC,
    Floats,
    Rows,
    attention_kernels,
    decodes,
    one_layer,
    prefills,
    seconds,
    weights_of,
)
from validation.compare.outcome import Outcome
from validation.compare.table import Table
from validation.ops.predict import benchmark_seconds

_WHERE = ("system", "framework")
GEMM = frozenset({*_WHERE, "version", "gemm_dtype", "m", "n", "k", "latency_us"})
ATTENTION = frozenset({*_WHERE, "version", "attn_dtype", "kv_cache_dtype", "head_dim", "window_size", "num_heads",
                       "num_key_value_heads", "isl", "batch_size", "step", "latency_us"})  # fmt: skip
LATENT = frozenset({*_WHERE, "version", "phase", "mla_dtype", "kv_cache_dtype", "num_heads", "batch_size", "isl",
                    "step", "latency_us"})  # fmt: skip
EXPERTS = frozenset({*_WHERE, "version", "moe_dtype", "kernel_source", "distribution", "hidden_size", "inter_size",
                     "topk", "num_experts", "moe_tp_size", "moe_ep_size", "num_tokens", "latency_us"})  # fmt: skip
QUANTISE = frozenset({*_WHERE, "version", "op", "quant_dtype", "m", "k", "latency_us"})
CACHES = {"bfloat16": "auto", "fp8": "fp8"}
# DeepSeek-V3's shape (arXiv:2412.19437, 4.2), which these kernels were timed for.
LATENT_MODEL = "deepseek-ai--DeepSeek-V3"
LATENT_SHAPE = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                "v_head_dim": 128}  # fmt: skip


def compare_gemm(table: Table) -> tuple[Table, Outcome]:
    """y[m, n] = x[m, k] @ W[k, n]."""
    m, n, k = (table.numbers(name) for name in "mnk")

    def predict(values: Any, rows: Rows) -> Floats:
        system, framework, dtype = values
        accelerator = facts.device(system)
        weights, only = weights_of(dtype)
        fitted = benchmark_seconds("gemm", FORMATS.get(dtype, ""), {"m": m[rows], "n": n[rows], "k": k[rows]},
                                   device=accelerator, backend=framework)  # fmt: skip
        if fitted is not None:
            return fitted
        shape: Any = m[rows], n[rows], k[rows]  # the lowering of one product holds for columns of them as well
        work = gemm(one_layer(weights=weights, weight_only=only), "gemm", 1, *shape, weight_dtype=weights)
        return np.asarray(seconds([work], accelerator=accelerator, engine=framework))

    return compare_kernels(table, (*_WHERE, "gemm_dtype"), predict)


def compare_attention(table: Table) -> tuple[Table, Outcome]:
    """Attention kernels of grouped queries: decode where one new token follows a past, else prefill."""
    sizes = tuple(table.numbers(name) for name in ("isl", "batch_size", "step"))
    decode = (sizes[0] == 1) & (sizes[2] > 0)

    def predict(values: Any, rows: Rows) -> Floats:
        found = np.full(len(rows), np.nan)
        for kind, own in (("decode", decode[rows]), ("prefill", ~decode[rows])):
            if own.any():
                found[own] = _attention_alone(values, kind == "decode", *(size[rows[own]] for size in sizes))
        return found

    keys = (*_WHERE, "attn_dtype", "kv_cache_dtype", "head_dim", "window_size", "num_heads", "num_key_value_heads")
    return compare_kernels(table, keys, predict)


def _attention_alone(values: Any, decode: bool, new: Floats, batch: Floats, past: Floats) -> Floats:
    """The kernel of rows that are all decodes, or all prefills."""
    system, framework, arithmetic, cached, dim, window, heads, kv_heads = values
    accelerator = facts.device(system)
    for size, column in ((window, "window_size"), (kv_heads, "num_key_value_heads")):
        if size is None:  # only 0 stands for something else: full attention, as many as query heads
            raise InexpressibleError(f"no value of {column} published")
    if cached not in CACHES or (arithmetic == "fp8" and cached != "fp8"):
        raise InexpressibleError(f"attention in {arithmetic} over a cache in {cached} is not modelled")
    if arithmetic == "bfloat16" or not decode:  # prefill over an 8-bit cache computes in 8 bits either way
        one, kv = np.ones(len(new)), kv_heads or heads
        columns = {
            "heads": heads * one, "tiles": kv * one, "dim": dim * one, "window": (window or 0) * one,
            "new": new, "sequences": batch, "context": new + past,
            "entry": 2 * kv * dim * one, "query": 2 * heads * dim * one, "pair": 4 * heads * dim * one,
        }  # fmt: skip
        fitted = benchmark_seconds("decode" if decode else "prefill", FORMATS[cached], columns,
                                   device=accelerator, backend=framework)  # fmt: skip
        if fitted is not None:
            return fitted
    model = one_layer(
        attention=GroupedQueryAttention(num_attention_heads=heads, num_key_value_heads=kv_heads or heads,
                                        head_dim=dim, window=window or None)
    )  # fmt: skip
    if decode:
        step = decodes(model, sequences=batch, context=new + past)
    else:
        step = prefills(model, sequences=batch, new=new, past=past)
    kind = "decode_attention" if decode else "prefill_attention"
    ops = attention_kernels(model, step, kinds=[kind], cache_dtype=CACHES[cached])
    return np.asarray(seconds(ops, accelerator=accelerator, engine=framework))


def compare_latent(table: Table) -> tuple[Table, Outcome]:
    """Latent attention: the kernel alone, or with `_module` the whole block with its projections."""
    new, batch, past = (table.numbers(name) for name in ("isl", "batch_size", "step"))

    def predict(values: Any, rows: Rows) -> Floats:
        system, framework, phase, product, cached, heads, of = values
        accelerator = facts.device(system)
        if cached not in CACHES:
            raise InexpressibleError(f"a cache in {cached} is not modelled")
        fitted = _latent_alone(phase, cached, heads, batch[rows], new[rows], past[rows], accelerator, framework)
        if fitted is not None:
            return fitted
        alone = not phase.endswith("_module")
        for fact, column in ((product, "gemm_type"), (of, "model")):
            if fact is None and not alone:  # the kernel alone has no projections
                raise InexpressibleError(f"no value of {column} published")
        weights, only = weights_of("bfloat16" if alone else product)
        hidden = facts.arch(LATENT_MODEL if alone else facts.model(of)).hidden_size
        attention = MultiHeadLatentAttention(num_attention_heads=heads, **LATENT_SHAPE)
        model = one_layer(attention=attention, hidden=hidden, weights=weights, weight_only=only)
        if phase.startswith("decode"):
            step = decodes(model, sequences=batch[rows], context=new[rows] + past[rows])
        else:
            step = prefills(model, sequences=batch[rows], new=new[rows], past=past[rows])
        kinds = [f"{phase}_attention"] if alone else []
        ops = attention_kernels(model, step, kinds=kinds, cache_dtype=CACHES[cached])
        return np.asarray(seconds(ops, accelerator=accelerator, engine=framework))

    return compare_kernels(table, (*_WHERE, "phase", "gemm_type", "kv_cache_dtype", "num_heads", "model"), predict)


def _latent_alone(
    phase: str, cached: str, heads: int, batch: Floats, new: Floats, past: Floats, device: str, backend: str
) -> Floats | None:
    """The kernel without projections on its fitted curve."""
    if phase not in ("decode", "prefill"):
        return None
    one, (query, value) = np.ones(len(batch)), (576, 512) if phase == "decode" else (192, 128)
    columns = {
        "heads": heads * one, "tiles": one, "dim": (query + value) / 2 * one, "window": 0 * one, "new": new,
        "sequences": batch, "context": new + past, "entry": 576 * one, "query": heads * (query + value) * one,
        "pair": 2 * heads * (query + value) * one,
    }  # fmt: skip
    kind: Literal["decode", "prefill"] = "decode" if phase == "decode" else "prefill"
    return benchmark_seconds(kind, f"mla-{FORMATS[cached]}", columns, device=device, backend=backend)


def compare_experts(table: Table) -> tuple[Table, Outcome]:
    """Fused experts of one rank; a power law of routing is taken as the Zipf exponent of their popularity."""
    tokens = table.numbers("num_tokens")

    def predict(values: Any, rows: Rows) -> Floats:
        system, framework, dtype, source, routing, hidden, inter, top, experts, tp, ep = values
        accelerator = facts.device(system)
        weights, only = weights_of(dtype)
        mlp = MixtureOfExperts(num_experts=experts, num_experts_per_tok=top, moe_intermediate_size=inter,
                               gated=not source.endswith("nongated"))  # fmt: skip
        model = one_layer(mlp=mlp, hidden=hidden, weights=weights, weight_only=only)
        popularity = float(routing.rpartition("_")[2]) if routing.startswith("power_law") else 0.0
        at = tokens[rows]
        step = StepShape(at, at, 0.0 * at, (0.0 * at,), 0.0 * at, (0.0 * at,), (0.0 * at,))
        if inter % tp or experts % ep:
            raise InexpressibleError("experts that do not divide among the GPUs")
        if not source.endswith("nongated"):
            one = np.ones(len(rows))
            columns = {"hidden": hidden * one, "inter": inter / tp * one, "top": top * one, "experts": experts * one,
                       "ranks": ep * one, "tokens": at, "skew": popularity * one}  # fmt: skip
            fitted = benchmark_seconds("moe", FORMATS.get(dtype, ""), columns, device=accelerator, backend=framework)
            if fitted is not None:
                return fitted
        work = [op for op in mlp_ops(model, model.layers[0], step, tp=tp * ep, ep=ep if ep > 1 else 1,
                                     popularity=popularity) if isinstance(op, Op) and op.kind == "moe"]  # fmt: skip
        if dtype in ARITHMETIC:
            work = [replace(op, dtype=ARITHMETIC[dtype]) for op in work]
        return np.asarray(seconds(work, accelerator=accelerator, engine=framework))

    keys = (*_WHERE, "moe_dtype", "kernel_source", "distribution", "hidden_size", "inter_size", "topk", "num_experts",
            "moe_tp_size", "moe_ep_size")  # fmt: skip
    return compare_kernels(table, keys, predict)


def compare_quantise(table: Table) -> tuple[Table, Outcome]:
    """Activations to 8 bits: 16-bit numbers in, 8-bit ones out; finding the scale reads them once more."""
    m, k = table.numbers("m"), table.numbers("k")

    def predict(values: Any, rows: Rows) -> Floats:
        system, framework, kind, dtype = values
        accelerator = facts.device(system)
        if dtype != "fp8" or kind not in ("computescale", "scale_matrix"):
            raise InexpressibleError(f"quantisation '{kind}' to {dtype} not modelled")
        if kind == "computescale" and framework == "vllm":
            raise InexpressibleError("a difference of two kernels, faster than HBM delivers")
        size = m[rows] * k[rows]
        kernel = STREAMS.get((kind, framework), "")
        columns = {"rows": m[rows], "width": k[rows], "bytes": size * (5.0 if kernel == "requantise" else 3.0)}
        fitted = benchmark_seconds("stream", kernel, columns, device=accelerator, backend=framework)
        if fitted is not None:
            return fitted
        read = (4.0 if kind == "computescale" else 2.0) * size
        work = Op("elementwise", kind, 1, 2.0 * size, read, size, "fp32")
        return np.asarray(seconds([work], accelerator=accelerator, engine=framework))

    return compare_kernels(table, (*_WHERE, "op", "quant_dtype"), predict)
