"""Softmax attention of one layer shape, projections and sparse indexers included, on one of `tp` GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from perfsim.ops.cache import CacheDType, entry_bytes, index_key_bytes, indexer_of
from perfsim.ops.gemm import gemm
from perfsim.ops.op import Beside, Op
from perfsim.ops.recurrent import recurrent_ops
from perfsim.ops.step import FULL, Span, StepShape, reaches
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    CompressedAttention,
    GroupedQueryAttention,
    LayerGroup,
    ModelArch,
    MultiHeadLatentAttention,
    Reach,
    SparseIndexer,
)

Mix = tuple[tuple[int, float], ...]


class Kernel(NamedTuple):
    """Which fitted curve prices an attention kernel, and what it needs to know (see Op)."""

    heads: float
    tiles: float
    format: str
    limit: float = 0.0


SCORE_BYTES = 4  # an indexer writes fp32 scores, which the selection reads (DeepGEMM's fp8_mqa_logits, vLLM)


def attention_ops(
    model: ModelArch, group: LayerGroup, step: StepShape, spans: tuple[Span, ...], tp: int, kv_cache_dtype: CacheDType
) -> Iterator[Op]:
    """Work of the attention blocks of `group`, in execution order; `spans` are those of the model."""
    attention = group.attention
    mix = tuple((spans.index(span), weight) for span, weight in reaches(attention))
    if isinstance(attention, GroupedQueryAttention):
        yield from _gqa(model, group.count, attention, step, mix, tp, kv_cache_dtype)
    elif isinstance(attention, MultiHeadLatentAttention):
        yield from _mla(model, group.count, attention, step, mix, tp, kv_cache_dtype)
    elif isinstance(attention, CompressedAttention):
        yield from _compressed(model, group.count, attention, step, mix, tp, kv_cache_dtype)
    elif attention is not None:
        yield from recurrent_ops(model, group, attention, step, tp)
    indexer = indexer_of(attention)
    if indexer is not None:
        ratio = attention.compress_ratio if isinstance(attention, CompressedAttention) else 1
        # Index heads are divided like the K/V heads they choose for, and copied where those are (vLLM's MiniMax-M3).
        shards = tp if isinstance(attention, GroupedQueryAttention) else 1
        yield from _indexer(model, group.count, indexer, step, ((spans.index(FULL), 1.0 / ratio),), ratio, shards)


def _gqa(
    model: ModelArch, count: int, attn: GroupedQueryAttention, step: StepShape, mix: Mix, tp: int, cached: CacheDType
) -> Iterator[Op]:
    heads, kv_heads = attn.num_attention_heads / tp, max(1.0, attn.num_key_value_heads / tp)
    dim, value, linear, act = attn.head_dim, attn.value_dim, model.attention_weights, ACTIVATION_BYTES[model.dtype]
    moved = heads * dim * act, heads * value * act
    columns = heads * dim + kv_heads * (dim + (0 if attn.shared_key_value else value))
    columns += heads * {None: 0, "head": 1, "element": value}[attn.output_gate]
    yield gemm(model, "qkv_proj", count, step.tokens, columns, model.hidden_size, weight_dtype=linear)
    flops = 2 * heads * (dim + value)
    # Kernels with an fp8 cache quantise the queries and multiply in fp8 (FlashAttention-3, FlashInfer).
    yield from _attention_core(
        "fp8" if cached == "fp8" else model.dtype, count, step, mix, pair_flops=flops, decode_flops=flops,
        kv_entry=entry_bytes(model, attn, tp=tp, kv_cache_dtype=cached), prefill_bytes=moved, decode_bytes=moved,
        kernel=Kernel(heads, kv_heads, "fp8" if cached == "fp8" else "bf16", _limit(attn.reach)),
    )  # fmt: skip
    yield gemm(model, "o_proj", count, step.tokens, model.hidden_size, heads * value, weight_dtype=linear)


def _limit(reach: Reach) -> float:
    """The most tokens that a layer attends."""
    sizes = [size for size in (reach.window, reach.chunk, reach.top_k) if size is not None]
    return float(min(sizes)) if sizes else np.inf


def _mla(
    model: ModelArch, count: int, attn: MultiHeadLatentAttention, step: StepShape, mix: Mix, tp: int, cached: CacheDType
) -> Iterator[Op]:
    """MLA as served (DeepSeek-V2, arXiv:2405.04434, 2.1): prefill expanded, decode with absorbed projections.

    With a sparse indexer both are absorbed (DeepSeek-V3.2, arXiv:2512.02556, 2.1: DSA under MQA), because every token
    attends other entries. Neglected: engines run short prompts densely there.
    """
    heads, latent, rope = attn.num_attention_heads / tp, attn.kv_lora_rank, attn.qk_rope_head_dim
    nope, value, linear = attn.qk_nope_head_dim, attn.v_head_dim, model.attention_weights
    act, hidden, query = ACTIVATION_BYTES[model.dtype], model.hidden_size, nope + rope
    if attn.q_lora_rank is None:
        yield gemm(model, "q_proj", count, step.tokens, heads * query, hidden, weight_dtype=linear)
        yield gemm(model, "kv_a_proj", count, step.tokens, latent + rope, hidden, weight_dtype=linear)
    else:
        down = attn.q_lora_rank + latent + rope
        yield gemm(model, "qkv_a_proj", count, step.tokens, down, hidden, weight_dtype=linear)
        yield gemm(model, "q_b_proj", count, step.tokens, heads * query, attn.q_lora_rank, weight_dtype=linear)
    if attn.output_gate is not None:
        gates = heads * (value if attn.output_gate == "element" else 1)
        yield gemm(model, "gate_proj", count, step.tokens, gates, hidden, weight_dtype=linear)
    expand, dense = heads * (nope + value), Kernel(heads, 1.0, "mla-fp8" if cached == "fp8" else "mla-bf16", True)
    absorbed = 2.0 * heads * (2 * latent + rope), (heads * (latent + rope) * act, heads * latent * act)
    if attn.indexer is None:
        # Prefill expands K and V of all attended tokens; decode folds the same weights into q and the output.
        expanded = sum(weight * step.prefill_context[index] for index, weight in mix)
        expanded += step.decode_sequences * step.queries
        expansion = gemm(model, "kv_b_proj", count, expanded, expand, latent, weight_dtype=linear, driver="expansion")
        yield replace(expansion, mix=mix)
        prefill = 2 * heads * (query + value), (heads * query * act, heads * value * act)
    else:
        yield gemm(model, "kv_b_proj", count, step.tokens, expand, latent, weight_dtype=linear)
        prefill = absorbed
    yield from _attention_core(
        model.dtype, count, step, mix, pair_flops=prefill[0], decode_flops=absorbed[0],
        kv_entry=entry_bytes(model, attn, tp=tp, kv_cache_dtype=cached), prefill_bytes=prefill[1],
        decode_bytes=absorbed[1], kernel=dense if attn.indexer is None else None,
    )  # fmt: skip
    yield gemm(model, "o_proj", count, step.tokens, hidden, heads * value, weight_dtype=linear)


def _compressed(
    model: ModelArch, count: int, attn: CompressedAttention, step: StepShape, mix: Mix, tp: int, cached: CacheDType
) -> Iterator[Op]:
    """DeepSeek-V4's attention as vLLM 0.32 runs it (`vllm/models/deepseek_v4`): one kernel over window and summaries.

    The down-projections and the compressor are on every GPU; the compressor computes a value and a score per channel,
    twice where summaries overlap (with an indexer). The output goes through one small product per group of heads.
    """
    heads, dim, linear = attn.num_attention_heads / tp, attn.head_dim, model.attention_weights
    act, hidden = ACTIVATION_BYTES[model.dtype], model.hidden_size
    yield gemm(model, "qkv_a_proj", count, step.tokens, attn.q_lora_rank + dim, hidden, weight_dtype=linear)
    yield gemm(model, "q_b_proj", count, step.tokens, heads * dim, attn.q_lora_rank, weight_dtype=linear)
    if attn.compress_ratio:
        width = 2 * dim * attn.overlap
        yield gemm(model, "compressor", count, step.tokens, width, hidden, weight_dtype=model.dtype)
    moved = heads * dim * act, heads * dim * act
    yield from _attention_core(
        model.dtype, count, step, mix, pair_flops=4 * heads * dim, decode_flops=4 * heads * dim,
        kv_entry=entry_bytes(model, attn, tp=tp, kv_cache_dtype=cached), prefill_bytes=moved, decode_bytes=moved,
    )  # fmt: skip
    rank = attn.o_lora_rank * attn.o_groups / tp
    grouped = gemm(model, "o_a_proj", count, step.tokens, attn.o_lora_rank, heads * dim, weight_dtype=linear)
    yield replace(grouped, write_bytes=step.tokens * (rank * act))
    yield gemm(model, "o_b_proj", count, step.tokens, hidden, rank, weight_dtype=linear)


def _indexer(
    model: ModelArch, count: int, indexer: SparseIndexer, step: StepShape, mix: Mix, ratio: int, shards: int
) -> Iterator[Op]:
    """The lightning indexer (DeepSeek-V3.2, arXiv:2512.02556, 2.1): it scores every entry for every token.

    A score is a product per index head and their weighted sum, written as fp32 and read again by the selection (one
    per block where blocks are selected). Summaries are scored, and their keys compressed, where `ratio` > 1. Neglected:
    the selection's own arithmetic; engines skip the scan while everything would be selected.
    """
    heads, dim = max(1.0, indexer.num_heads / shards), indexer.head_dim
    hidden, act = model.hidden_size, ACTIVATION_BYTES[model.dtype]
    wide = indexer.query_rank or hidden
    yield gemm(model, "index_q_proj", count, step.tokens, heads * dim, wide, weight_dtype=model.attention_weights)
    keys = (dim if ratio == 1 else 4 * dim) + (heads if indexer.head_weights else 0)
    yield gemm(model, "index_k_proj", count, step.tokens, keys, hidden, weight_dtype=model.dtype)
    number = 1 if indexer.fp8_keys else act
    score = 2.0 * SCORE_BYTES / indexer.block_size
    moved = heads * dim * number, 4.0 * indexer.top_k / indexer.block_size / ratio
    for work in _attention_core(
        "fp8" if indexer.fp8_keys else model.dtype, count, step, mix, pair_flops=2.0 * heads * (dim + 1),
        decode_flops=2.0 * heads * (dim + 1), kv_entry=index_key_bytes(model, indexer), prefill_bytes=moved,
        decode_bytes=moved, pair_bytes=score,
    ):  # fmt: skip
        yield replace(work, name=work.name.replace("attention", "index_scan"))


def _attention_core(
    dtype: str, count: int, step: StepShape, mix: Mix, *, pair_flops: float, decode_flops: float, kv_entry: float,
    prefill_bytes: tuple[float, float], decode_bytes: tuple[float, float], pair_bytes: float = 0.0,
    kernel: Kernel | None = None,
) -> Iterator[Op]:  # fmt: skip
    """One kernel for all decodes and one for all prefill chunks; `*_bytes`: (read, written) per sequence or new token.

    `pair_bytes` are moved for every attended pair, on top of what is read once per entry. A sequence that verifies
    drafts reads its entries once for all its queries; that each query attends one entry more is neglected.
    """
    heads, tiles, stored, limit = kernel or Kernel(0.0, 0.0, "")
    decodes, queries = step.decode_sequences, step.queries
    decode_flops, decode_bytes = decode_flops * queries, (decode_bytes[0] * queries, decode_bytes[1] * queries)
    attended = sum(weight * step.decode_context[index] for index, weight in mix)
    entry = kv_entry + pair_bytes * queries
    new = step.prefill_tokens
    pairs = sum(weight * step.prefill_pairs[index] for index, weight in mix)
    read = sum(weight * step.prefill_context[index] for index, weight in mix)
    mean, own = attended / np.maximum(decodes, 1.0), read / np.maximum(step.logits - decodes, 1.0)
    longest = (  # nobody says: all are equal
        np.where(np.greater(step.decode_longest * bool(limit), 0.0), np.minimum(step.decode_longest, limit), mean),
        np.where(np.greater(step.prefill_longest * bool(limit), 0.0), np.minimum(step.prefill_longest, limit), own),
    )
    yield Op(
        "decode_attention", "decode_attention", count, attended * decode_flops,
        attended * entry + decodes * decode_bytes[0], decodes * decode_bytes[1], dtype,
        driver="attention", active=np.minimum(decodes, 1.0), sequences=decodes,
        context=mean, longest=longest[0], limit=limit, mix=mix, sequence_read_bytes=decode_bytes[0],
        sequence_write_bytes=decode_bytes[1], entry_bytes=entry, pair_flops=decode_flops, heads=heads, tiles=tiles,
        format=stored, beside=Beside(new, pairs, read, longest[1], pair_flops),
    )  # fmt: skip
    yield Op(
        "prefill_attention", "prefill_attention", count, pairs * pair_flops,
        read * kv_entry + pairs * pair_bytes + new * prefill_bytes[0], new * prefill_bytes[1], dtype,
        driver="attention", active=np.minimum(new, 1.0), mix=mix, sequence_read_bytes=prefill_bytes[0],
        sequence_write_bytes=prefill_bytes[1], entry_bytes=kv_entry, pair_bytes=pair_bytes, pair_flops=pair_flops,
        rows=new, longest=longest[1], limit=limit, heads=heads, tiles=tiles, format=stored,
    )  # fmt: skip
