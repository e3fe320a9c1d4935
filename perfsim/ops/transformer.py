"""Lowering: one engine step of a decoder-only transformer under tensor parallelism, as operators of one GPU.

Sharding is Megatron's (Shoeybi et al., arXiv:1909.08053): QKV and up projections by columns, output and down
projections by rows, one all-reduce after each block, vocabulary-parallel embedding and head. K/V heads are replicated
when there are fewer than GPUs. Neglected: the embedding lookup, position encodings' tables and sampling of more than
one token. Each term is what the algorithm must do; kernels that do more are the business of `perfsim.cost`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from perfsim.ops.op import Collective, Driver, Num, Op
from perfsim.ops.step import StepShape, attention_windows
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    WEIGHT_BYTES,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    MixtureOfExperts,
    ModelArch,
    MultiHeadLatentAttention,
)

LOGIT_BYTES = 4  # vLLM samples from fp32 logits


def lower(
    model: ModelArch, step: StepShape, *, tp: int, expert_popularity: float = 0.0, sampling_passes: float = 1.0
) -> list[Op | Collective]:
    """All work of one step on one of `tp` GPUs, in execution order; kernels of equal layers share one entry.

    `expert_popularity` is the Zipf exponent of expert choice, `sampling_passes` how often the engine's sampler streams
    the logits. Quantities of the result have the type of `step`'s.
    """
    windows = attention_windows(model)
    work: list[Op | Collective] = []
    for group in model.layers:
        index = windows.index(group.attention.window)
        work += _attention(model, group, step, index, tp)
        work += _mlp(model, group, step, tp, expert_popularity)
        work.append(_elementwise(model, group, step, tp))
        if tp > 1:
            payload = step.tokens * (model.hidden_size * ACTIVATION_BYTES[model.dtype])
            work.append(Collective("all_reduce", "all_reduce", 2 * group.count, payload, tp))
    work += _head(model, step, tp, sampling_passes)
    return work


def compute_dtype(model: ModelArch, weight_dtype: str) -> str:
    """The arithmetic a weight format runs in: natively where activations are quantised too, else `model.dtype`.

    Weight-only formats are expanded on the fly. So are MXFP4 weights, whose checkpoints declare no activation format,
    and INT4 ones, for which no served format quantises activations.
    """
    if model.weight_only:
        return model.dtype
    return {"fp8": "fp8", "fp8_block": "fp8", "int8": "int8", "nvfp4": "fp4"}.get(weight_dtype, model.dtype)


def gemm(
    model: ModelArch, name: str, count: int, m: Num, n: float, k: float, *, weight_dtype: str, driver: Driver = "tokens"
) -> Op:
    """y[m, n] = x[m, k] @ W[k, n]: 2mnk FLOPs; W, x and y cross HBM once."""
    act = ACTIVATION_BYTES[model.dtype]
    weights = n * k * WEIGHT_BYTES[weight_dtype]
    dtype = compute_dtype(model, weight_dtype)
    return Op("gemm", name, count, m * (2.0 * n * k), weights + m * (k * act), m * (n * act), dtype, driver)


def distinct_experts(tokens: Num, num_experts: int, per_token: int, popularity: float) -> Num:
    """Expected number of experts that `tokens` tokens touch when each picks `per_token` of `num_experts`.

    E = sum_i 1 - (1 - q_i)^tokens, with q_i the chance that a token picks expert i: proportional to 1/rank^popularity,
    at most one, summing to `per_token` (0: uniform, then q = per_token / num_experts). Neglected: the dependence among
    one token's picks, correlation between tokens and between layers.
    """
    chance = _pick_chances(num_experts, per_token, popularity)
    stay_away = np.log1p(-np.minimum(chance, 1.0 - 1e-12))
    count, place = np.unique(np.asarray(tokens, dtype=np.float64), return_inverse=True)
    distinct = np.empty(count.shape)
    for start in range(0, count.size, 4096):  # bounds the (tokens x experts) table to a few MB
        part = slice(start, start + 4096)
        distinct[part] = -np.expm1(np.outer(count[part], stay_away)).sum(axis=1)
    return float(distinct[0]) if np.ndim(tokens) == 0 else distinct[place]


def _pick_chances(num_experts: int, per_token: int, popularity: float) -> NDArray[np.float64]:
    """Chances proportional to 1/rank^popularity, capped at one, with sum `per_token`; the first ones reach the cap."""
    shares = np.arange(1, num_experts + 1, dtype=np.float64) ** -popularity
    certain = 0
    while certain < min(per_token, num_experts):
        scale = (per_token - certain) / shares[certain:].sum()
        if scale * shares[certain] <= 1.0:
            return np.concatenate([np.ones(certain), scale * shares[certain:]])
        certain += 1
    return np.concatenate([np.ones(certain), np.zeros(num_experts - certain)])


def _attention(model: ModelArch, group: LayerGroup, step: StepShape, index: int, tp: int) -> Iterator[Op]:
    attention = group.attention
    if isinstance(attention, GroupedQueryAttention):
        yield from _gqa(model, group.count, attention, step, index, tp)
    else:
        yield from _mla(model, group.count, attention, step, index, tp)


def _gqa(
    model: ModelArch, count: int, attn: GroupedQueryAttention, step: StepShape, index: int, tp: int
) -> Iterator[Op]:
    heads, kv_heads, dim = attn.num_attention_heads / tp, max(1.0, attn.num_key_value_heads / tp), attn.head_dim
    linear = model.linear_dtype
    yield gemm(
        model, "qkv_proj", count, step.tokens, (heads + 2 * kv_heads) * dim, model.hidden_size, weight_dtype=linear
    )
    act = ACTIVATION_BYTES[model.dtype]
    kv_entry = 2 * kv_heads * dim * act
    yield from _attention_core(
        model, count, step, index, pair_flops=4 * heads * dim, decode_flops=4 * heads * dim, kv_entry=kv_entry,
        query_bytes=heads * dim * act, output_bytes=heads * dim * act,
    )  # fmt: skip
    yield gemm(model, "o_proj", count, step.tokens, model.hidden_size, heads * dim, weight_dtype=linear)


def _mla(
    model: ModelArch, count: int, attn: MultiHeadLatentAttention, step: StepShape, index: int, tp: int
) -> Iterator[Op]:
    """MLA as served (DeepSeek-V2, arXiv:2405.04434, 2.1): prefill expanded, decode with absorbed projections."""
    heads, latent, rope = attn.num_attention_heads / tp, attn.kv_lora_rank, attn.qk_rope_head_dim
    nope, value, linear = attn.qk_nope_head_dim, attn.v_head_dim, model.linear_dtype
    act, hidden, query = ACTIVATION_BYTES[model.dtype], model.hidden_size, nope + rope
    if attn.q_lora_rank is None:
        yield gemm(model, "q_proj", count, step.tokens, heads * query, hidden, weight_dtype=linear)
        yield gemm(model, "kv_a_proj", count, step.tokens, latent + rope, hidden, weight_dtype=linear)
    else:
        down = attn.q_lora_rank + latent + rope
        yield gemm(model, "qkv_a_proj", count, step.tokens, down, hidden, weight_dtype=linear)
        yield gemm(model, "q_b_proj", count, step.tokens, heads * query, attn.q_lora_rank, weight_dtype=linear)
    # Prefill expands K and V of all attended tokens from the latent; decode folds the same weights into q and output.
    expanded = step.prefill_context[index] + step.decode_sequences
    yield gemm(
        model, "kv_b_proj", count, expanded, heads * (nope + value), latent, weight_dtype=linear, driver="expansion"
    )
    yield from _attention_core(
        model, count, step, index, pair_flops=2 * heads * (query + value), decode_flops=2 * heads * (2 * latent + rope),
        kv_entry=(latent + rope) * act, query_bytes=heads * query * act, output_bytes=heads * value * act,
    )  # fmt: skip
    yield gemm(model, "o_proj", count, step.tokens, hidden, heads * value, weight_dtype=linear)


def _attention_core(
    model: ModelArch, count: int, step: StepShape, index: int, *,
    pair_flops: float, decode_flops: float, kv_entry: float, query_bytes: float, output_bytes: float,
) -> Iterator[Op]:  # fmt: skip
    decodes, attended = step.decode_sequences, step.decode_context[index]
    yield Op(
        "decode_attention", "decode_attention", count, attended * decode_flops,
        attended * kv_entry + decodes * query_bytes, decodes * output_bytes, model.dtype,
        driver="attention", active=np.minimum(decodes, 1.0), sequences=decodes,
        context=attended / np.maximum(decodes, 1.0),
        sequence_read_bytes=query_bytes, sequence_write_bytes=output_bytes,
        entry_bytes=kv_entry, entry_flops=decode_flops,
    )  # fmt: skip
    new = step.prefill_tokens
    yield Op(
        "prefill_attention", "prefill_attention", count, step.prefill_pairs[index] * pair_flops,
        step.prefill_context[index] * kv_entry + new * query_bytes, new * output_bytes, model.dtype,
        driver="attention", active=np.minimum(new, 1.0),
    )  # fmt: skip


def _mlp(model: ModelArch, group: LayerGroup, step: StepShape, tp: int, popularity: float) -> Iterator[Op]:
    mlp = group.mlp
    if isinstance(mlp, DenseMLP):
        yield from _dense(model, group.count, step.tokens, mlp.intermediate_size / tp, gated=mlp.gated)
        return
    yield gemm(model, "router", group.count, step.tokens, mlp.num_experts, model.hidden_size, weight_dtype=model.dtype)
    yield _experts(model, group.count, mlp, step.tokens, tp, popularity)
    if mlp.shared_intermediate_size:
        yield from _dense(model, group.count, step.tokens, mlp.shared_intermediate_size / tp, gated=mlp.gated)


def _dense(model: ModelArch, count: int, tokens: Num, width: float, *, gated: bool) -> Iterator[Op]:
    linear, up = model.linear_dtype, 2 if gated else 1
    yield gemm(model, "up_proj", count, tokens, up * width, model.hidden_size, weight_dtype=linear)
    yield gemm(model, "down_proj", count, tokens, model.hidden_size, width, weight_dtype=linear)


def _experts(model: ModelArch, count: int, moe: MixtureOfExperts, tokens: Num, tp: int, popularity: float) -> Op:
    """The fused expert kernel: only experts that some token picked are read; every picked expert does its FLOPs."""
    matrices = 3 if moe.gated else 2
    width, act = moe.moe_intermediate_size / tp, ACTIVATION_BYTES[model.dtype]
    per_expert = matrices * model.hidden_size * width
    touched = distinct_experts(tokens, moe.num_experts, moe.num_experts_per_tok, popularity)
    routed = tokens * moe.num_experts_per_tok
    read = touched * (per_expert * WEIGHT_BYTES[model.expert_dtype]) + routed * ((model.hidden_size + width) * act)
    write = routed * ((matrices - 1) * width * act) + tokens * (model.hidden_size * act)
    dtype = compute_dtype(model, model.expert_dtype)
    return Op("moe", "experts", count, routed * (2.0 * per_expert), read, write, dtype)


def _elementwise(model: ModelArch, group: LayerGroup, step: StepShape, tp: int) -> Op:
    """Norms with residual, rotary embedding and K/V write, activation: four fused kernels per layer.

    Bytes are of the mean kernel: each norm reads and writes the hidden state and the residual, the rotary kernel moves
    q and k, the activation reads gate and up and writes their product.
    """
    act, attn, mlp = ACTIVATION_BYTES[model.dtype], group.attention, group.mlp
    if isinstance(attn, GroupedQueryAttention):
        rotated = (attn.num_attention_heads / tp + 2 * max(1.0, attn.num_key_value_heads / tp)) * attn.head_dim
    else:
        rotated = (attn.num_attention_heads / tp + 1) * attn.qk_rope_head_dim + attn.kv_lora_rank
    # The activation of routed experts is inside their fused kernel.
    width = (mlp.intermediate_size if isinstance(mlp, DenseMLP) else mlp.shared_intermediate_size) / tp
    read = (2 * 2 * model.hidden_size + rotated + 2 * width) * act / 4
    write = (2 * 2 * model.hidden_size + rotated + width) * act / 4
    flops = 10.0 * (model.hidden_size + width)  # a dozen operations per element: never what bounds it
    return Op(
        "elementwise",
        "elementwise",
        4 * group.count,
        step.tokens * flops,
        step.tokens * read,
        step.tokens * write,
        "fp32",
    )


def _head(model: ModelArch, step: StepShape, tp: int, sampling_passes: float) -> Iterator[Op | Collective]:
    head = gemm(model, "lm_head", 1, step.logits, model.vocab_size / tp, model.hidden_size, weight_dtype=model.dtype)
    yield replace(head, kind="lm_head", driver="logits")
    if tp > 1:
        payload = step.logits * (model.vocab_size / tp * ACTIVATION_BYTES[model.dtype])
        yield Collective("all_gather", "gather_logits", 1, payload, tp, "logits")
    # The fp32 logits of every sampled sequence, on every GPU: sampling is not sharded.
    logits = step.logits * (model.vocab_size * LOGIT_BYTES * sampling_passes)
    yield Op("sampling", "sampling", 1, step.logits * float(model.vocab_size), logits, 0.0 * logits, "fp32", "logits")
