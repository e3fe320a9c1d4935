"""Closed-form counts of what a model holds: parameters, weight bytes and cached bytes, whole and per GPU.

Every count is a sum over the layer groups of a ModelArch and exact, norms and biases included. Tensor parallelism
follows Megatron (arXiv:1909.08053, section 3) as vLLM applies it: columns of Q, K, V, gate and up and rows of output
and down are divided, embedding and head are divided by vocabulary; norms, routers, row-parallel biases, vision towers,
sparse indexers, latent projections of experts and the down-projections of multi-head latent attention are held by
every GPU; K and V heads (and Mamba-2's groups) are copied when there are fewer than GPUs. Neglected: vLLM shards vision
towers, too, where their heads divide.
"""

from __future__ import annotations

from perfsim.errors import InfeasibleError
from perfsim.ops.cache import growing_bytes
from perfsim.ops.param_counts import Parameters, expert_count, layer_count, norm_size, shared_expert_count
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    WEIGHT_BYTES,
    CompressedAttention,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    LinearAttention,
    Mamba2,
    MixtureOfExperts,
    ModelArch,
    MultiHeadLatentAttention,
)

__all__ = [
    "Parameters", "absorbed_bytes_per_gpu", "active_params", "check_tensor_parallel", "kv_bytes_per_token",
    "kv_bytes_per_token_per_gpu", "mtp_params", "shared_expert_shards", "state_bytes_per_layer",
    "state_bytes_per_sequence", "text_params", "total_params", "vision_params", "weight_bytes", "weight_bytes_per_gpu",
]  # fmt: skip


def total_params(model: ModelArch) -> int:
    """All parameters of the main model: embedding, layers, final norm, head (once if tied) and the vision tower, no
    prediction layers."""
    return text_params(model) + vision_params(model)


def text_params(model: ModelArch) -> int:
    """As `total_params`, without the vision tower."""
    return sum(_text(model, tp=1))


def vision_params(model: ModelArch) -> int:
    """Parameters of the vision tower and its projector; 0 without one."""
    return model.vision.params if model.vision is not None else 0


def mtp_params(model: ModelArch) -> int:
    """Parameters of the multi-token-prediction modules beyond what they share with the main model.

    Each has its own layers (one more of the last kind unless `mtp_layers` says otherwise), a projection of 2h to h and
    three norms (DeepSeek-V3, arXiv:2412.19437, 2.2); embedding and head are those of the main model. With residual
    streams (DeepSeek-V4) also a mixer before the head.
    """
    hidden, groups = model.hidden_size, model.mtp_layers or (model.layers[-1].model_copy(update={"count": 1}),)
    layers = sum(group.count * sum(layer_count(model, group, tp=1)) for group in groups)
    module = layers + 2 * hidden * hidden + 3 * norm_size(model) + _stream_head(model)
    return model.num_nextn_predict_layers * module


def active_params(model: ModelArch) -> int:
    """Parameters that one text token uses: all of a dense language model; of a mixture of experts, all but the experts
    it does not visit and the input embedding (a lookup, unless it is tied to the head). No vision tower, no prediction
    layers.
    """
    groups = [(group, group.mlp) for group in model.layers if isinstance(group.mlp, MixtureOfExperts)]
    if not groups:
        return text_params(model)
    idle = sum(g.count * (mlp.num_experts - mlp.num_experts_per_tok) * expert_count(model, mlp) for g, mlp in groups)
    lookup = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return text_params(model) - idle - lookup


def weight_bytes(model: ModelArch) -> float:
    """Bytes of the main model's weights as stored, scales of quantised formats and the vision tower included."""
    return _bytes(model, _text(model, tp=1))


def weight_bytes_per_gpu(model: ModelArch, *, tp: int, dp: int = 1, ep: int = 1, pp: int = 1) -> float:
    """Bytes of weights on each of `tp` GPUs; equal on all, the vocabulary rounded up to a multiple of `tp`.

    `dp` ranks share the experts: each is sharded over all `tp * dp` GPUs, or `ep` GPUs hold whole ones, the fullest of
    them ceil(num_experts / ep), and each has all of the shared experts. Of `pp` stages it is the heaviest:
    ceil(layers / pp) mean layers and one of embedding and head; that some layers are heavier than others is neglected
    there.
    Raises InfeasibleError when heads or widths cannot be divided by `tp`.
    """
    check_tensor_parallel(model, tp=tp, ep=ep)
    whole = _bytes(model, _text(model, tp=tp))
    experts = routed = 0.0
    shards = shared_expert_shards(tp=tp, dp=dp, ep=ep)
    for group in model.layers:
        if isinstance(group.mlp, MixtureOfExperts):
            copied = shared_expert_count(model, group.mlp, tp=shards) - shared_expert_count(model, group.mlp, tp=tp)
            whole += group.count * copied * WEIGHT_BYTES[model.linear_dtype]
            expert = layer_count(model, group, tp=tp).expert
            experts += group.count * expert
            share = -(-group.mlp.num_experts // ep) / group.mlp.num_experts * tp if ep > 1 else 1.0 / dp
            routed += group.count * expert * share
    whole += (routed - experts) * WEIGHT_BYTES[model.expert_dtype]
    if pp == 1:
        return whole
    ends = _ends(model, tp=tp) * WEIGHT_BYTES[model.dtype]
    vision = vision_params(model) * WEIGHT_BYTES[model.dtype]
    layers = model.num_hidden_layers
    heaviest = ends if model.tie_word_embeddings else ends / 2
    return (whole - ends - vision) * -(-layers // pp) / layers + heaviest + vision


def shared_expert_shards(*, tp: int, dp: int, ep: int) -> int:
    """Over how many GPUs a shared expert is divided: all of `tp`, or none where each has tokens of its own to route."""
    return 1 if dp > 1 and ep > 1 else tp


def absorbed_bytes_per_gpu(model: ModelArch, *, tp: int, pp: int = 1) -> float:
    """Bytes of the copies that engines make of MLA's K/V expansion, to fold it into queries and outputs at decode.

    In the activation dtype whatever the checkpoint's, beside the original that prefill needs: W_UK_T and W_UV of vLLM's
    `process_weights_after_loading` (vllm/model_executor/layers/attention/mla_attention.py, 0.32), w_kc and w_vc of
    SGLang. Of `pp` stages ceil(layers / pp) mean layers. Neglected: fp8 and fp4 copies on AMD GPUs.
    """
    numbers = 0
    for group in model.layers:
        mla = group.attention
        if isinstance(mla, MultiHeadLatentAttention):
            heads = mla.num_attention_heads // tp
            numbers += group.count * heads * mla.kv_lora_rank * (mla.qk_nope_head_dim + mla.v_head_dim)
    layers = model.num_hidden_layers
    return float(numbers * ACTIVATION_BYTES[model.dtype]) * -(-layers // pp) / layers


def kv_bytes_per_token(model: ModelArch) -> float:
    """KV-cache bytes that one more token of context costs one sequence: all layers, TP 1, in the activation dtype.

    A layer with a window or a chunk holds a bounded cache and a recurrent one a fixed state: they do not count. Keys of
    sparse indexers do; compressed attention (DeepSeek-V4) counts its summaries, a fraction of an entry per token.
    """
    return kv_bytes_per_token_per_gpu(model, tp=1)


def kv_bytes_per_token_per_gpu(model: ModelArch, *, tp: int) -> float:
    """As `kv_bytes_per_token`, on each of `tp` GPUs: K/V heads are divided, one at least; an MLA latent is copied.

    Raises InfeasibleError when heads or widths cannot be divided by `tp`.
    """
    check_tensor_parallel(model, tp=tp)
    return sum(group.count * growing_bytes(model, group, tp=tp, kv_cache_dtype="auto") for group in model.layers)


def state_bytes_per_sequence(model: ModelArch, *, tp: int = 1) -> int:
    """Bytes of states (recurrent, convolution, spans not yet summarised) that one sequence holds on each of `tp` GPUs,
    however long it is; windows and chunks are KV cache and do not count."""
    return sum(group.count * state_bytes_per_layer(model, group, tp=tp) for group in model.layers)


def state_bytes_per_layer(model: ModelArch, group: LayerGroup, *, tp: int) -> int:
    """As `state_bytes_per_sequence`, of one layer of `group`: recurrent heads are divided among the GPUs."""
    attention, state = group.attention, group.state
    if isinstance(attention, CompressedAttention) and state is not None:
        return state.recurrent * ACTIVATION_BYTES[attention.state_dtype]
    if state is None or not isinstance(attention, LinearAttention | Mamba2):
        return 0
    recurrent = state.recurrent // tp * ACTIVATION_BYTES[attention.state_dtype]
    width = attention.conv_width // tp
    if isinstance(attention, Mamba2):
        width = (attention.inner_width + 2 * max(tp, attention.n_groups) * attention.state_size) // tp
    return recurrent + width * (attention.conv_kernel - 1) * ACTIVATION_BYTES[model.dtype]


def check_tensor_parallel(model: ModelArch, *, tp: int, ep: int = 1) -> None:
    """Raises InfeasibleError when `tp` does not divide what vLLM must divide: heads, K/V heads, MLP widths.

    Experts stay whole with expert parallelism.
    """
    for group in model.layers:
        attention = group.attention
        if isinstance(attention, GroupedQueryAttention):
            heads = attention.num_key_value_heads
            if heads % tp and tp % heads:
                raise _indivisible(model, "num_key_value_heads", heads, tp)
        if isinstance(attention, Mamba2) and attention.n_groups % tp and tp % attention.n_groups:
            raise _indivisible(model, "n_groups", attention.n_groups, tp)
        for name, size in _divided(group).items():
            if size % tp and not (ep > 1 and name == "moe_intermediate_size"):
                raise _indivisible(model, name, size, tp)


def _divided(group: LayerGroup) -> dict[str, int]:
    """What tensor parallelism divides without a rest, by the name it has in messages."""
    attention, mlp = group.attention, group.mlp
    sizes: dict[str, int] = {}
    if isinstance(attention, LinearAttention):
        sizes |= {"linear_num_key_heads": attention.num_key_heads, "linear_num_value_heads": attention.num_value_heads}
    elif isinstance(attention, Mamba2):
        sizes["mamba_num_heads"] = attention.num_heads
    elif attention is not None:
        sizes["num_attention_heads"] = attention.num_attention_heads
    if isinstance(attention, CompressedAttention):
        sizes["o_groups"] = attention.o_groups
    if isinstance(mlp, DenseMLP):
        sizes["intermediate_size"] = mlp.intermediate_size
    elif mlp is not None:
        sizes["moe_intermediate_size"] = mlp.moe_intermediate_size
        sizes["shared_intermediate_size"] = mlp.shared_intermediate_size
    return sizes


def _indivisible(model: ModelArch, name: str, size: int, tp: int) -> InfeasibleError:
    message = f"{model.name} does not fit tensor parallelism {tp}: {name} ({size}) is not divisible by it"
    return InfeasibleError(message, binding="tensor_parallel_size")


def _bytes(model: ModelArch, count: Parameters) -> float:
    return (
        count.attention * WEIGHT_BYTES[model.attention_weights]
        + count.linear * WEIGHT_BYTES[model.linear_dtype]
        + count.expert * WEIGHT_BYTES[model.expert_dtype]
        + (count.other + vision_params(model)) * WEIGHT_BYTES[model.dtype]
    )


def _ends(model: ModelArch, *, tp: int) -> int:
    """Embedding and head: one table if they are tied."""
    tables = 1 if model.tie_word_embeddings else 2
    return tables * -(-model.vocab_size // tp) * model.hidden_size


def _text(model: ModelArch, *, tp: int) -> Parameters:
    other = _ends(model, tp=tp) + (-(-model.vocab_size // tp) if model.lm_head_bias else 0)
    other += model.learned_positions * model.hidden_size + norm_size(model) + _stream_head(model) + model.other_params
    count = Parameters(0, 0, 0, other)
    for group in model.layers:
        count = count.plus(layer_count(model, group, tp=tp).times(group.count))
    return count


def _stream_head(model: ModelArch) -> int:
    """The mixer of residual streams before the head: a number per pair of streams and hidden unit, biases, a scale."""
    streams = model.hyper_connections
    return streams * streams * model.hidden_size + streams + 1 if streams else 0
