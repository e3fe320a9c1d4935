"""What happens between matrix products: norms with residual, positions and cache writes, gates, activations."""

from __future__ import annotations

from perfsim.ops.cache import indexer_of
from perfsim.ops.op import Op
from perfsim.ops.step import StepShape
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    CompressedAttention,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    LinearAttention,
    Mamba2,
    ModelArch,
    MultiHeadLatentAttention,
)

Kernel = tuple[float, float]  # numbers read and written per token


def elementwise_ops(model: ModelArch, group: LayerGroup, step: StepShape, tp: int) -> list[Op]:
    """The fused kernels of `group` as one Op of their mean size, or none.

    Numbers moved per token: each norm reads and writes the hidden state and the residual; the position kernel moves q
    and the new cache entry (an indexer has its own); norms of q and k move both, over all heads in two passes; a
    convolution moves its channels; a gate reads output and gate; an activation reads gate and up and writes their
    product (that of routed experts is inside their fused kernel, the launch stands for the router's selection); n
    residual streams are mixed into a block's input and its output back into them. A dozen operations per number are
    never what bounds them.
    """
    act, hidden = ACTIVATION_BYTES[model.dtype], float(model.hidden_size)
    kernels: list[Kernel] = [(2 * hidden, 2 * hidden)] * group.norm_count
    kernels += _mixer_kernels(group, tp)
    width = 0.0
    if group.mlp is not None:
        mlp = group.mlp
        width = (mlp.intermediate_size if isinstance(mlp, DenseMLP) else mlp.shared_intermediate_size) / tp
        kernels.append(((2 if mlp.gated else 1) * width, width))
    streams = float(model.hyper_connections)
    if streams:
        kernels += [(streams * hidden, hidden), ((streams + 1) * hidden, streams * hidden)] * group.blocks
    if not kernels:
        return []
    count, tokens = len(kernels), step.tokens
    read, written = (sum(kernel[side] for kernel in kernels) * act / count for side in (0, 1))
    flops = 10.0 * (hidden + width)
    return [
        Op("elementwise", "elementwise", count * group.count, tokens * flops, tokens * read, tokens * written, "fp32")
    ]


def _mixer_kernels(group: LayerGroup, tp: int) -> list[Kernel]:
    attn, kernels = group.attention, []
    if isinstance(attn, LinearAttention | Mamba2):
        conv = attn.conv_width / tp
        output = (attn.value_width if isinstance(attn, LinearAttention) else attn.inner_width) / tp
        return [(conv, conv), (2 * output, output)]
    if attn is None:
        return []
    heads = attn.num_attention_heads / tp
    if isinstance(attn, GroupedQueryAttention):
        kv_heads, value = max(1.0, attn.num_key_value_heads / tp), attn.value_dim
        positioned = heads * attn.head_dim + kv_heads * (attn.head_dim + value)
    elif isinstance(attn, MultiHeadLatentAttention):
        positioned, value = (heads + 1) * attn.qk_rope_head_dim + attn.kv_lora_rank, attn.v_head_dim
    else:
        positioned, value = (heads + 1) * attn.head_dim, attn.head_dim
    kernels.append((positioned, positioned))
    if isinstance(attn, GroupedQueryAttention) and attn.qk_norm is not None:
        normed = heads * attn.head_dim + kv_heads * attn.head_dim  # one kernel each; over all heads, variances first
        kernels += [(normed / 2, normed / 2)] * 2 if attn.qk_norm == "head" else [(normed, 0.0), (normed, normed)]
    indexer = indexer_of(attn)
    if indexer is not None:
        scored = (indexer.num_heads + 1.0) * indexer.head_dim
        kernels.append((scored, scored))
    if not isinstance(attn, CompressedAttention) and attn.output_gate is not None:
        output = heads * value
        kernels.append((output + (output if attn.output_gate == "element" else heads), output))
    elif isinstance(attn, CompressedAttention) and attn.compress_ratio:
        width = 2.0 * attn.head_dim * attn.overlap
        kernels.append((2 * width, attn.head_dim / attn.compress_ratio))  # fp32 values and scores into one summary
    return kernels
