"""Attention of one layer shape, projections included, on one of `tp` GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perfsim.ops.gemm import gemm
from perfsim.ops.op import Op
from perfsim.ops.step import StepShape
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    GroupedQueryAttention,
    LayerGroup,
    ModelArch,
    MultiHeadLatentAttention,
)


def attention_ops(model: ModelArch, group: LayerGroup, step: StepShape, index: int, tp: int) -> Iterator[Op]:
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
