"""Parameters of one layer, block by block, on one of `tp` GPUs; `perfsim.ops.params` adds them up."""

from __future__ import annotations

from typing import NamedTuple

from perfsim.spec.model import (
    CompressedAttention,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    LinearAttention,
    Mamba2,
    MixtureOfExperts,
    ModelArch,
    MultiHeadLatentAttention,
    SparseIndexer,
)


class Parameters(NamedTuple):
    """Parameter counts by how they are stored: `attention_weights`, `linear_dtype`, `expert_dtype`, or the activation
    dtype for the rest."""

    attention: int
    linear: int
    expert: int
    other: int

    def plus(self, more: Parameters) -> Parameters:
        """The sum of two counts, class by class."""
        return Parameters(*(mine + theirs for mine, theirs in zip(self, more, strict=True)))

    def times(self, count: int) -> Parameters:
        """As many of `count` equal things."""
        return Parameters(*(count * mine for mine in self))


def norm_size(model: ModelArch) -> int:
    """Parameters of one norm over the hidden size."""
    return model.hidden_size * (2 if model.norm_bias else 1)


def kv_heads(attention: GroupedQueryAttention, *, tp: int) -> int:
    """K/V heads on one GPU: copied when there are fewer than GPUs."""
    return max(1, attention.num_key_value_heads // tp)


def layer_count(model: ModelArch, group: LayerGroup, *, tp: int) -> Parameters:
    """One layer: attention or mixer, MLP, norms, and the mixers of residual streams around each block.

    Hyper-connections of n streams (DeepSeek-V4): per block a projection of the n streams to n (n + 2) weights, as many
    biases and three scales.
    """
    streams = model.hyper_connections
    width = streams * (streams + 2)
    mixers = group.blocks * (width * streams * model.hidden_size + width + 3) if streams else 0
    norms = group.norm_count * norm_size(model)
    return _mixer(model, group, tp=tp).plus(_mlp(model, group, tp=tp)).plus(Parameters(0, 0, 0, norms + mixers))


def _mixer(model: ModelArch, group: LayerGroup, *, tp: int) -> Parameters:
    attention = group.attention
    if isinstance(attention, GroupedQueryAttention):
        return _gqa(model, attention, tp=tp)
    if isinstance(attention, MultiHeadLatentAttention):
        return _mla(model, attention, tp=tp)
    if isinstance(attention, CompressedAttention):
        return _compressed(model, attention, tp=tp)
    if isinstance(attention, LinearAttention):
        return _linear_attention(model, attention, tp=tp)
    return _mamba2(model, attention, tp=tp) if isinstance(attention, Mamba2) else Parameters(0, 0, 0, 0)


def _mlp(model: ModelArch, group: LayerGroup, *, tp: int) -> Parameters:
    if isinstance(group.mlp, DenseMLP):
        return _dense(model, group.mlp, tp=tp)
    return _moe(model, group.mlp, tp=tp) if group.mlp is not None else Parameters(0, 0, 0, 0)


def _gqa(model: ModelArch, attention: GroupedQueryAttention, *, tp: int) -> Parameters:
    hidden, dim, heads = model.hidden_size, attention.head_dim, attention.num_attention_heads // tp
    shared, value = kv_heads(attention, tp=tp), attention.value_dim
    columns = (heads + shared) * dim + (0 if attention.shared_key_value else shared * value)
    gate = {"element": heads * value, "head": heads, None: 0}[attention.output_gate]
    other = {"head": 2 * dim, "all_heads": (heads + shared) * dim, None: 0}[attention.qk_norm]
    if attention.qkv_bias:
        other += columns
    if attention.output_bias:
        other += hidden
    if attention.sinks:
        other += heads
    picks = _indexer(model, attention.indexer, shards=tp)
    return Parameters(hidden * (columns + gate) + heads * value * hidden, 0, 0, other).plus(picks)


def _mla(model: ModelArch, attention: MultiHeadLatentAttention, *, tp: int) -> Parameters:
    """DeepSeek-V2, arXiv:2405.04434, 2.1.2 and appendix C: low-rank Q (if any) and joint K/V, each with its norm."""
    hidden, heads = model.hidden_size, attention.num_attention_heads // tp
    latent, rope, rank = attention.kv_lora_rank, attention.qk_rope_head_dim, attention.q_lora_rank
    query, value = heads * (attention.qk_nope_head_dim + rope), heads * attention.v_head_dim
    expand = latent * (heads * attention.qk_nope_head_dim + value)
    gate = {"element": value, "head": heads, None: 0}[attention.output_gate]
    shared = hidden * (latent + rope + gate) + expand + value * hidden
    own = hidden * query if rank is None else rank * (hidden + query)
    norms = latent + (rank or 0)
    return Parameters(shared + own, 0, 0, norms).plus(_indexer(model, attention.indexer))


def _indexer(model: ModelArch, indexer: SparseIndexer | None, *, shards: int = 1) -> Parameters:
    """Queries from their latent (or the hidden state), one shared key, weights of the heads, norms.

    On every GPU, save that MiniMax-M3's heads are divided like the K/V heads they choose for (vLLM's minimax_m3).
    """
    if indexer is None or indexer.shared:
        return Parameters(0, 0, 0, 0)
    hidden, size, heads = model.hidden_size, indexer.head_dim, max(1, indexer.num_heads // shards)
    rank = hidden if indexer.query_rank is None else indexer.query_rank
    weights = rank * heads * size + hidden * size
    head_weights = hidden * heads if indexer.head_weights else 0
    norm = {"layer": 2 * size, "rms": size, "both": 2 * size}[indexer.key_norm]
    return Parameters(weights, 0, 0, head_weights + norm)


def _compressed(model: ModelArch, attention: CompressedAttention, *, tp: int) -> Parameters:
    """DeepSeek-V4 (`transformers`, deepseek_v4): low-rank Q, one K=V head, output by groups, sinks, compressors."""
    hidden, heads, size = model.hidden_size, attention.num_attention_heads // tp, attention.head_dim
    rank, groups = attention.q_lora_rank, attention.o_groups // tp
    linear = rank * (hidden + heads * size) + hidden * size
    linear += attention.o_lora_rank * heads * size + groups * attention.o_lora_rank * hidden
    count = Parameters(linear, 0, 0, rank + size + heads)
    if not attention.compress_ratio:
        return count
    # Overlapping spans (with an indexer) keep two sets of weights; the indexer summarises its keys in the same way.
    count = count.plus(_compressor(model, attention.overlap * size, size, attention.compress_ratio))
    if attention.indexer is None:
        return count
    indexer = attention.indexer
    queries = Parameters(rank * indexer.num_heads * indexer.head_dim, 0, 0, hidden * indexer.num_heads)
    return count.plus(queries).plus(
        _compressor(model, 2 * indexer.head_dim, indexer.head_dim, attention.compress_ratio)
    )


def _compressor(model: ModelArch, width: int, size: int, ratio: int) -> Parameters:
    """Values and gates of `width` per token, a bias per position in the span, one norm over the summary; 16 bits."""
    return Parameters(0, 0, 0, 2 * model.hidden_size * width + ratio * width + size)


def _linear_attention(model: ModelArch, attention: LinearAttention, *, tp: int) -> Parameters:
    """Q, K, V, output gate and output; the write strength and decay of each head; the convolution; the output norm."""
    hidden, heads = model.hidden_size, attention.num_value_heads // tp
    mixed, value = attention.conv_width // tp, attention.value_width // tp
    gate = hidden * value if attention.gate_rank is None else attention.gate_rank * (hidden + value)
    linear = hidden * (mixed + heads) + gate + value * hidden
    if attention.decay == "channel":
        keys = attention.key_width // tp
        rank = attention.decay_rank
        linear += hidden * keys if rank is None else rank * (hidden + keys)
        decay = keys + heads
    else:
        linear += hidden * heads
        decay = 2 * heads
    return Parameters(linear, 0, 0, mixed * attention.conv_kernel + decay + attention.value_head_dim)


def _mamba2(model: ModelArch, mixer: Mamba2, *, tp: int) -> Parameters:
    """Mamba-2 (arXiv:2405.21060): one input projection, a convolution, A, D and dt per head, a gated norm."""
    hidden, heads, inner = model.hidden_size, mixer.num_heads // tp, mixer.inner_width // tp
    mixed = inner + 2 * max(1, mixer.n_groups // tp) * mixer.state_size
    columns = inner + mixed + heads
    other = mixed * mixer.conv_kernel + (mixed if mixer.conv_bias else 0) + 3 * heads + inner
    if mixer.proj_bias:
        other += columns + hidden
    return Parameters(hidden * columns + inner * hidden, 0, 0, other)


def _dense(model: ModelArch, mlp: DenseMLP, *, tp: int) -> Parameters:
    width, matrices = mlp.intermediate_size // tp, 3 if mlp.gated else 2
    bias = (matrices - 1) * width + model.hidden_size if mlp.bias else 0
    return Parameters(0, matrices * width * model.hidden_size, 0, bias)


def _moe(model: ModelArch, mlp: MixtureOfExperts, *, tp: int) -> Parameters:
    hidden, matrices = model.hidden_size, 3 if mlp.gated else 2
    inner, width = mlp.latent_size or hidden, mlp.moe_intermediate_size // tp
    other = hidden * mlp.num_experts
    if mlp.router_bias:
        other += mlp.num_experts
    if mlp.shared_expert_gate:
        other += hidden
    if mlp.bias:
        other += mlp.num_experts * ((matrices - 1) * width + inner)
    if mlp.latent_norm:
        other += inner
    latent = 2 * hidden * mlp.latent_size if mlp.latent_size else 0
    shared = shared_expert_count(model, mlp, tp=tp)
    return Parameters(0, shared + latent, mlp.num_experts * matrices * inner * width, other)


def shared_expert_count(model: ModelArch, mlp: MixtureOfExperts, *, tp: int) -> int:
    """Parameters of the shared experts on one of `tp` GPUs."""
    return (3 if mlp.gated else 2) * model.hidden_size * (mlp.shared_intermediate_size // tp)


def expert_count(model: ModelArch, mlp: MixtureOfExperts) -> int:
    """Parameters of one routed expert, biases included."""
    inner, matrices, width = mlp.latent_size or model.hidden_size, 3 if mlp.gated else 2, mlp.moe_intermediate_size
    bias = (matrices - 1) * width + inner if mlp.bias else 0
    return matrices * inner * width + bias
