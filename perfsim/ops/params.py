"""Closed-form counts of what a model holds: parameters, weight bytes and KV-cache bytes, whole and per GPU.

Every count is a sum over the layer groups of a ModelArch and exact, norms and biases included. Tensor parallelism
follows Megatron (arXiv:1909.08053, section 3) as vLLM applies it: columns of Q, K, V, gate and up and rows of output
and down are divided, embedding and head are divided by vocabulary; norms, routers, row-parallel biases and the
down-projections of multi-head latent attention are held by every GPU; K and V heads are copied when there are fewer
than GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

from perfsim.errors import InfeasibleError
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


class Parameters(NamedTuple):
    """Parameter counts by how they are stored: `linear_dtype`, `expert_dtype`, or the activation dtype for the rest."""

    linear: int
    expert: int
    other: int

    def plus(self, more: Parameters) -> Parameters:
        """The sum of two counts, class by class."""
        return Parameters(self.linear + more.linear, self.expert + more.expert, self.other + more.other)


def total_params(model: ModelArch) -> int:
    """All parameters of the main model: embedding, layers, final norm, head (once if tied), no prediction layers."""
    return sum(_main(model, tp=1))


def mtp_params(model: ModelArch) -> int:
    """Parameters of the multi-token-prediction layers beyond what they share with the main model.

    Each is one more layer of the last kind, a projection of 2h to h and three norms (DeepSeek-V3, arXiv:2412.19437,
    2.2); embedding and head are those of the main model.
    """
    hidden = model.hidden_size
    layer = sum(_layer(model, model.layers[-1], tp=1))
    return model.num_nextn_predict_layers * (layer + 2 * hidden * hidden + 3 * _norm(model))


def active_params(model: ModelArch) -> int:
    """Parameters that one token uses: all of a dense model; of a mixture of experts, all but the experts it does not
    visit and the input embedding (a lookup, unless it is tied to the head) and prediction layers.
    """
    groups = [(group, group.mlp) for group in model.layers if isinstance(group.mlp, MixtureOfExperts)]
    if not groups:
        return total_params(model)
    idle = sum(g.count * (mlp.num_experts - mlp.num_experts_per_tok) * _expert(model, mlp, tp=1) for g, mlp in groups)
    lookup = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return total_params(model) - idle - lookup


def weight_bytes(model: ModelArch) -> float:
    """Bytes of the main model's weights as stored, scales of quantised formats included."""
    return _bytes(model, _main(model, tp=1))


def weight_bytes_per_gpu(model: ModelArch, *, tp: int) -> float:
    """Bytes of weights on each of `tp` GPUs; equal on all, the vocabulary rounded up to a multiple of `tp`.

    Raises InfeasibleError when heads or widths cannot be divided by `tp`.
    """
    check_tensor_parallel(model, tp=tp)
    return _bytes(model, _main(model, tp=tp))


def kv_bytes_per_token(model: ModelArch) -> int:
    """KV-cache bytes that one more token of context costs one sequence: all layers, TP 1, in the activation dtype.

    A layer with a sliding window holds a bounded state and does not count.
    """
    return kv_bytes_per_token_per_gpu(model, tp=1)


def kv_bytes_per_token_per_gpu(model: ModelArch, *, tp: int) -> int:
    """As `kv_bytes_per_token`, on each of `tp` GPUs: K/V heads are divided, one at least; an MLA latent is copied.

    Raises InfeasibleError when heads or widths cannot be divided by `tp`.
    """
    check_tensor_parallel(model, tp=tp)
    growing = (group for group in model.layers if group.attention.window is None)
    return sum(group.count * kv_bytes_per_token_per_layer(model, group, tp=tp) for group in growing)


def kv_bytes_per_token_per_layer(model: ModelArch, group: LayerGroup, *, tp: int) -> int:
    """KV-cache bytes of one token in one layer of `group` on one of `tp` GPUs, windowed or not."""
    attention = group.attention
    if isinstance(attention, MultiHeadLatentAttention):
        entry = attention.kv_lora_rank + attention.qk_rope_head_dim
    else:
        entry = 2 * _kv_heads(attention, tp=tp) * attention.head_dim
    return entry * ACTIVATION_BYTES[model.dtype]


def check_tensor_parallel(model: ModelArch, *, tp: int) -> None:
    """Raises InfeasibleError when `tp` does not divide what vLLM must divide: heads, K/V heads, MLP widths."""
    for group in model.layers:
        attention, mlp = group.attention, group.mlp
        sizes = {"num_attention_heads": attention.num_attention_heads}
        if isinstance(attention, GroupedQueryAttention):
            kv_heads = attention.num_key_value_heads
            if kv_heads % tp and tp % kv_heads:
                raise _indivisible(model, "num_key_value_heads", kv_heads, tp)
        if isinstance(mlp, DenseMLP):
            sizes["intermediate_size"] = mlp.intermediate_size
        else:
            sizes["moe_intermediate_size"] = mlp.moe_intermediate_size
            sizes["shared_intermediate_size"] = mlp.shared_intermediate_size
        for name, size in sizes.items():
            if size % tp:
                raise _indivisible(model, name, size, tp)


def _indivisible(model: ModelArch, name: str, size: int, tp: int) -> InfeasibleError:
    message = f"{model.name} does not fit tensor parallelism {tp}: {name} ({size}) is not divisible by it"
    return InfeasibleError(message, binding="tensor_parallel_size")


def _bytes(model: ModelArch, count: Parameters) -> float:
    return (
        count.linear * WEIGHT_BYTES[model.linear_dtype]
        + count.expert * WEIGHT_BYTES[model.expert_dtype]
        + count.other * WEIGHT_BYTES[model.dtype]
    )


def _main(model: ModelArch, *, tp: int) -> Parameters:
    rows = -(-model.vocab_size // tp)
    tables = 1 if model.tie_word_embeddings else 2
    head_bias = rows if model.lm_head_bias else 0
    count = Parameters(0, 0, tables * rows * model.hidden_size + head_bias + _norm(model))
    for group in model.layers:
        layer = _layer(model, group, tp=tp)
        count = count.plus(Parameters(*(group.count * part for part in layer)))
    return count


def _norm(model: ModelArch) -> int:
    return model.hidden_size * (2 if model.norm_bias else 1)


def _layer(model: ModelArch, group: LayerGroup, *, tp: int) -> Parameters:
    """One layer: attention, MLP and the two norms before them."""
    if isinstance(group.attention, GroupedQueryAttention):
        attention = _gqa(model, group.attention, tp=tp)
    else:
        attention = _mla(model, group.attention, tp=tp)
    mlp = _dense(model, group.mlp, tp=tp) if isinstance(group.mlp, DenseMLP) else _moe(model, group.mlp, tp=tp)
    return attention.plus(mlp).plus(Parameters(0, 0, 2 * _norm(model)))


def _kv_heads(attention: GroupedQueryAttention, *, tp: int) -> int:
    return max(1, attention.num_key_value_heads // tp)


def _gqa(model: ModelArch, attention: GroupedQueryAttention, *, tp: int) -> Parameters:
    hidden, dim, heads = model.hidden_size, attention.head_dim, attention.num_attention_heads // tp
    columns = (heads + 2 * _kv_heads(attention, tp=tp)) * dim
    other = 0
    if attention.qkv_bias:
        other += columns
    if attention.output_bias:
        other += hidden
    if attention.qk_norm:
        other += 2 * dim
    if attention.sinks:
        other += heads
    return Parameters(hidden * columns + heads * dim * hidden, 0, other)


def _mla(model: ModelArch, attention: MultiHeadLatentAttention, *, tp: int) -> Parameters:
    """DeepSeek-V2, arXiv:2405.04434, 2.1.2 and appendix C: low-rank Q (if any) and joint K/V, each with its norm."""
    hidden, heads = model.hidden_size, attention.num_attention_heads // tp
    latent, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    query = heads * (attention.qk_nope_head_dim + rope)
    expand = latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    linear = hidden * (latent + rope) + expand + heads * attention.v_head_dim * hidden
    if attention.q_lora_rank is None:
        return Parameters(linear + hidden * query, 0, latent)
    return Parameters(linear + attention.q_lora_rank * (hidden + query), 0, latent + attention.q_lora_rank)


def _dense(model: ModelArch, mlp: DenseMLP, *, tp: int) -> Parameters:
    width, matrices = mlp.intermediate_size // tp, 3 if mlp.gated else 2
    bias = (matrices - 1) * width + model.hidden_size if mlp.bias else 0
    return Parameters(matrices * width * model.hidden_size, 0, bias)


def _moe(model: ModelArch, mlp: MixtureOfExperts, *, tp: int) -> Parameters:
    hidden, matrices = model.hidden_size, 3 if mlp.gated else 2
    width = mlp.moe_intermediate_size // tp
    other = hidden * mlp.num_experts
    if mlp.router_bias:
        other += mlp.num_experts
    if mlp.shared_expert_gate:
        other += hidden
    if mlp.bias:
        other += mlp.num_experts * ((matrices - 1) * width + hidden)
    shared = matrices * hidden * (mlp.shared_intermediate_size // tp)
    return Parameters(shared, mlp.num_experts * matrices * hidden * width, other)


def _expert(model: ModelArch, mlp: MixtureOfExperts, *, tp: int) -> int:
    """Parameters of one routed expert, biases included."""
    matrices, width = 3 if mlp.gated else 2, mlp.moe_intermediate_size // tp
    bias = (matrices - 1) * width + model.hidden_size if mlp.bias else 0
    return matrices * model.hidden_size * width + bias
