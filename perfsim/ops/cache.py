"""What a layer keeps per sequence on one of `tp` GPUs: cached entries, index keys, recurrent state, in bytes.

`kv_cache_dtype` is the policy's: "auto" stores entries in the activation dtype, "fp8" in one byte per number. Two
layouts are vLLM's own (`vllm/models/deepseek_v4/attention.py`, `vllm/model_executor/layers/attention/mla_attention.py`,
0.32): DeepSeek-V4 keeps its entries as fp8 with a 16-bit rotary part and 8 bytes of scales whatever is asked for, and
latents with a sparse indexer keep an fp32 scale per 128 numbers and a 16-bit rotary part under "fp8". Neglected: the
padding of pages.
"""

from __future__ import annotations

from typing import Literal

from perfsim.spec.model import (
    ACTIVATION_BYTES,
    Attention,
    CompressedAttention,
    GroupedQueryAttention,
    LayerGroup,
    ModelArch,
    MultiHeadLatentAttention,
    SparseIndexer,
)

CacheDType = Literal["auto", "fp8"]
INDEX_SCALE_BLOCK = 128  # index keys share one fp32 scale per so many numbers (vLLM's quant_block_size)


def kv_number_bytes(model: ModelArch, kv_cache_dtype: CacheDType) -> int:
    """Bytes of one cached number."""
    return 1 if kv_cache_dtype == "fp8" else ACTIVATION_BYTES[model.dtype]


def entry_bytes(model: ModelArch, attention: Attention | None, *, tp: int, kv_cache_dtype: CacheDType) -> float:
    """Bytes of one attended entry (a token's, or a summary's) of one layer; 0 for layers without such entries.

    K/V heads are divided among the GPUs, one at least; latents and the single head of DeepSeek-V4 are on every GPU.
    """
    number = kv_number_bytes(model, kv_cache_dtype)
    if isinstance(attention, GroupedQueryAttention):
        heads = max(1.0, attention.num_key_value_heads / tp)
        return heads * (attention.head_dim + attention.value_dim) * number
    if isinstance(attention, MultiHeadLatentAttention):
        latent, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
        if attention.indexer is not None and kv_cache_dtype == "fp8":
            return latent + 4.0 * latent / INDEX_SCALE_BLOCK + 2.0 * rope
        return float((latent + rope) * number)
    if isinstance(attention, CompressedAttention):
        rope = attention.qk_rope_head_dim
        return float(attention.head_dim - rope + 2 * rope + 8)
    return 0.0


def index_key_bytes(model: ModelArch, indexer: SparseIndexer | None) -> float:
    """Bytes of one entry's index key, on every GPU; 0 without an indexer of one's own."""
    if indexer is None or indexer.shared:
        return 0.0
    if indexer.fp8_keys:
        return indexer.head_dim * (1.0 + 4.0 / INDEX_SCALE_BLOCK)
    return float(indexer.head_dim * ACTIVATION_BYTES[model.dtype])


def indexer_of(attention: Attention | None) -> SparseIndexer | None:
    """The indexer that a layer runs itself; None where it has none or takes another layer's choice."""
    if isinstance(attention, GroupedQueryAttention | MultiHeadLatentAttention | CompressedAttention):
        indexer = attention.indexer
        return None if indexer is None or indexer.shared else indexer
    return None


def growing_bytes(model: ModelArch, group: LayerGroup, *, tp: int, kv_cache_dtype: CacheDType) -> float:
    """Cache bytes that one more token of context costs one sequence in one layer of `group`, however long it is.

    A layer with a window or a chunk holds a bounded state and does not count; summaries count per token they sum up.
    """
    reach = group.reach
    if reach is None or not reach.grows:
        return 0.0
    entry = entry_bytes(model, group.attention, tp=tp, kv_cache_dtype=kv_cache_dtype)
    return (entry + index_key_bytes(model, indexer_of(group.attention))) / max(1, reach.compress_ratio)


def bounded_bytes(
    model: ModelArch, attention: Attention | None, *, tp: int, kv_cache_dtype: CacheDType
) -> tuple[int, float]:
    """(tokens, bytes per token) of what one layer keeps of the last so many tokens only; zeros where it does not."""
    reach = None if attention is None else attention.reach
    size = None if reach is None else reach.chunk or reach.window
    if size is None:
        return 0, 0.0
    return size, entry_bytes(model, attention, tp=tp, kv_cache_dtype=kv_cache_dtype)
