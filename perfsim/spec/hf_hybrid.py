"""Readers of stacks that mix kinds of layers: windows of another shape, chunks, linear attention, Mamba-2, no-ops.

Each follows the model's own code (`transformers` 5.24; DeciLM, MiniMax-M3, Kimi K3: vLLM 0.32).
"""

from __future__ import annotations

from typing import Any

from perfsim.spec import hf_attention as attention
from perfsim.spec import hf_mlp as mlps
from perfsim.spec.attention import Attention, GroupedQueryAttention, LinearAttention, SparseIndexer
from perfsim.spec.hf_config import Config
from perfsim.spec.model import DenseMLP, LayerGroup

_HYBRID = ("linear_attention", "full_attention")
_SLIDING = ("sliding_attention", "full_attention")
_BLOCKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def qwen35(config: Config, count: int) -> list[LayerGroup]:
    """Qwen3.5: three gated delta nets for each gated softmax attention."""
    every = config.integer("full_attention_interval", default=4)
    usual = [_HYBRID[(layer + 1) % every == 0] for layer in range(count)]
    kinds = attention.layer_types(config, count, _HYBRID, default=usual)
    full, linear = _qwen35_attention(config), attention.gated_delta_net(config)
    return [LayerGroup(count=1, attention=full if kind == "full_attention" else linear, mlp=_qwen35_mlp(config, layer))
            for layer, kind in enumerate(kinds)]  # fmt: skip


def qwen35_options(config: Config) -> dict[str, Any]:
    """Prediction layers have softmax attention."""
    count = config.integer("mtp_num_hidden_layers", default=0, minimum=0, maximum=64)
    layer = LayerGroup(count=1, attention=_qwen35_attention(config), mlp=_qwen35_mlp(config, 0))
    return {"num_nextn_predict_layers": count, "mtp_layers": (layer,) if count else ()}


def _qwen35_attention(config: Config) -> GroupedQueryAttention:
    gate = "element" if config.flag("attn_output_gate", default=True) else None
    return attention.head_norms(config).model_copy(update={"output_gate": gate})


def _qwen35_mlp(config: Config, layer: int) -> Any:
    return mlps.qwen_mlp(config, layer) if "num_experts" in config else mlps.dense(config, layer)


def mimo_v2(config: Config, count: int) -> list[LayerGroup]:
    """MiMo-V2: `hybrid_layer_pattern` marks windowed layers, which have more K/V heads and sinks."""
    windowed = attention.switches(config, "hybrid_layer_pattern", count)
    sparse = attention.switches(config, "moe_layer_freq", count)
    bias = config.flag("attention_bias", default=False)
    full = attention.gqa(
        config, v_head_dim=config.optional_integer("v_head_dim"), qkv_bias=bias,
        sinks=config.flag("add_full_attention_sink_bias", default=False),
    )  # fmt: skip
    local = GroupedQueryAttention(
        num_attention_heads=config.integer("swa_num_attention_heads"),
        num_key_value_heads=config.integer("swa_num_key_value_heads"), head_dim=config.integer("swa_head_dim"),
        v_head_dim=config.integer("swa_v_head_dim"), window=config.integer("sliding_window"), qkv_bias=bias,
        sinks=config.flag("add_swa_attention_sink_bias", default=False),
    )  # fmt: skip
    heads, kv_heads = local.num_attention_heads, local.num_key_value_heads
    attention.check_groups(config, "swa_num_key_value_heads", heads=heads, kv_heads=kv_heads)
    dense, moe = mlps.dense(config, 0), mlps.deepseek_experts(config)
    return [LayerGroup(count=1, attention=local if slides else full, mlp=moe if routed else dense)
            for slides, routed in zip(windowed, sparse, strict=True)]  # fmt: skip


def minimax_m3(config: Config, count: int) -> list[LayerGroup]:
    """MiniMax-M3: sparse layers score blocks of tokens with an indexer of their own and attend the best blocks."""
    sparse = config.section("sparse_attention_config")
    norm = "head" if config.flag("use_qk_norm", default=False) else None
    gate = "element" if config.flag("attention_output_gate", default=False) else None
    dense = attention.gqa(config, qk_norm=norm, output_gate=gate)
    picks, attentions = dense, [dense] * count
    if sparse is not None and sparse.flag("use_sparse_attention", default=True):
        block = sparse.integer("sparse_block_size", maximum=2**16)
        picks = dense.model_copy(update={"indexer": SparseIndexer(
            num_heads=sparse.integer("sparse_num_index_heads"), head_dim=sparse.integer("sparse_index_dim"),
            top_k=block * sparse.integer("sparse_topk_blocks", maximum=2**14), block_size=block,
            head_weights=False, key_norm="both", fp8_keys=False,
        )})  # fmt: skip
        marks = attention.switches(sparse, "sparse_attention_freq", count)
        attentions = [picks if mark else dense for mark in marks]
    attention.switches(config, "moe_layer_freq", count)
    return [LayerGroup(count=1, attention=attn, mlp=mlps.minimax_m3_mlp(config, layer))
            for layer, attn in enumerate(attentions)]  # fmt: skip


def step37(config: Config, count: int) -> list[LayerGroup]:
    """Step 3.7: windows in three of four layers, normalised Q and K, an output gate per head.

    `transformers` lets a config give windowed layers more query heads (`attention_other_setting`).
    """
    window = config.integer("sliding_window")
    other = config.section("attention_other_setting")
    full = attention.gqa(config, qk_norm="head", output_gate="head")
    heads = full.num_attention_heads if other is None else other.integer("num_attention_heads")
    attention.check_groups(config, "num_key_value_heads", heads=heads, kv_heads=full.num_key_value_heads)
    local = full.model_copy(update={"window": window, "num_attention_heads": heads})
    kinds = attention.layer_types(config, count, _SLIDING)
    return [LayerGroup(count=1, attention=full if kind == "full_attention" else local, mlp=mlps.step_mlp(config, layer))
            for layer, kind in enumerate(kinds)]  # fmt: skip


def step37_options(config: Config) -> dict[str, Any]:
    """A prediction layer is dense (vLLM's step3p5_mtp) and as the last layer attends; its own head is not counted."""
    last = step37(config, config.integer("num_hidden_layers"))[-1]
    return {"mtp_layers": (last.model_copy(update={"mlp": mlps.dense(config, 0)}),)}


def llama4(config: Config, count: int) -> list[LayerGroup]:
    """Llama 4: layers with rotary embedding attend their own chunk; every fourth has none and attends everything."""
    every = config.integer("no_rope_layer_interval", default=4)
    usual = [int((layer + 1) % every != 0) for layer in range(count)]
    rotary = attention.switches(config, "no_rope_layers", count) if config.items("no_rope_layers", int) else usual
    bias = config.flag("attention_bias", default=False)
    full = attention.gqa(config, qkv_bias=bias, output_bias=bias)
    local = full.model_copy(update={"chunk": config.optional_integer("attention_chunk_size")})
    return [LayerGroup(count=1, attention=local if rotates else full, mlp=mlps.llama4_mlp(config, layer))
            for layer, rotates in enumerate(rotary)]  # fmt: skip


def gemma4(config: Config, count: int) -> list[LayerGroup]:
    """Gemma 4: five windowed layers to one global layer of wider heads whose V is its K.

    Norms over the hidden size: before and after attention and MLP; with experts three more, and the router's scale.
    """
    if config.integer("hidden_size_per_layer_input", default=0, minimum=0):
        raise config.error("hidden_size_per_layer_input", "unsupported per-layer embeddings; expected 0")
    if config.integer("num_kv_shared_layers", default=0, minimum=0):
        raise config.error("num_kv_shared_layers", "unsupported shared K/V layers; expected 0")
    local = attention.head_norms(config).model_copy(update={"window": config.integer("sliding_window")})
    wide = {"head_dim": config.integer("global_head_dim", default=local.head_dim), "window": None}
    if config.flag("attention_k_eq_v", default=False):
        heads = config.integer("num_global_key_value_heads", default=local.num_key_value_heads)
        attention.check_groups(config, "num_global_key_value_heads", heads=local.num_attention_heads, kv_heads=heads)
        wide |= {"num_key_value_heads": heads, "shared_key_value": True}
    full = local.model_copy(update=wide)
    norms = 8 if config.flag("enable_moe_block", default=False) else 4
    kinds = attention.layer_types(config, count, _SLIDING)
    return [LayerGroup(count=1, attention=full if kind == "full_attention" else local,
                       mlp=mlps.gemma4_mlp(config, layer), norms=norms)
            for layer, kind in enumerate(kinds)]  # fmt: skip


def kimi_linear(config: Config, count: int) -> list[LayerGroup]:
    """Kimi K3: Kimi delta attention in three of four layers, MLA without rotary embedding in the others.

    `attn_res_block_size`: a block reads a mix of earlier blocks' outputs; two vectors and two norms per layer.
    """
    settings = config.section("linear_attn_config")
    if settings is None:
        raise config.error("linear_attn_config", "missing; expected an object with kda_layers and full_attn_layers")
    full, linear = settings.items("full_attn_layers", int), settings.items("kda_layers", int)
    if sorted([*full, *linear]) != list(range(1, count + 1)):
        raise settings.error("kda_layers", f"expected each of the layers 1 to {count} in one of the two lists")
    size, heads = settings.integer("head_dim"), settings.integer("num_heads")
    kda = LinearAttention(
        num_key_heads=heads, num_value_heads=heads, key_head_dim=size, value_head_dim=size,
        conv_kernel=settings.integer("short_conv_kernel_size"), decay="channel", decay_rank=size,
        gate_rank=None if settings.flag("use_full_rank_gate", default=False) else size,
    )  # fmt: skip
    latent = attention.mla(config)
    norms = 6 if "attn_res_block_size" in config else 2
    return [LayerGroup(count=1, attention=latent if layer + 1 in set(full) else kda,
                       mlp=mlps.kimi_linear_mlp(config, layer), norms=norms)
            for layer in range(count)]  # fmt: skip


def kimi_linear_options(config: Config) -> dict[str, Any]:
    """The mix of blocks before the final norm has a norm and a vector of its own."""
    return {"other_params": 2 * config.integer("hidden_size") if "attn_res_block_size" in config else 0}


def nemotron_h(config: Config, count: int) -> list[LayerGroup]:
    """Nemotron-H and Nemotron 3: every layer is one block, of the kind that the pattern says."""
    return _nemotron_blocks(config, nemotron_kinds(config))


def nemotron_h_options(config: Config) -> dict[str, Any]:
    kinds = [_checked_kind(config, "mtp_layers_block_type", kind)
             for kind in config.items("mtp_layers_block_type", str)]  # fmt: skip
    return {"mtp_layers": tuple(_nemotron_blocks(config, kinds))}


def nemotron_kinds(config: Config) -> list[str]:
    """The kinds of all blocks: `layers_block_type`, or one letter each in `hybrid_override_pattern`."""
    listed = config.items("layers_block_type", str)
    if listed:
        return [_checked_kind(config, "layers_block_type", kind) for kind in listed]
    pattern = config.text("hybrid_override_pattern")
    return [_checked_kind(config, "hybrid_override_pattern", _BLOCKS.get(letter, letter)) for letter in pattern]


def _checked_kind(config: Config, key: str, kind: str) -> str:
    if kind not in _BLOCKS.values():
        raise config.error(key, f"unsupported block '{kind[:20]}'; expected {', '.join(_BLOCKS.values())} "
                                f"(letters {' '.join(_BLOCKS)})")  # fmt: skip
    return kind


def _nemotron_blocks(config: Config, kinds: list[str]) -> list[LayerGroup]:
    head = config.integer("attention_head_dim", default=128)
    shapes: dict[str, LayerGroup] = {}
    for kind in set(kinds):
        attn: Attention | None = None
        if kind == "attention":
            attn = attention.gqa(config, head_dim=config.integer("head_dim", default=head))
        elif kind == "mamba":
            attn = attention.mamba2(config)
        mlp = {"mlp": mlps.nemotron_dense, "moe": mlps.nemotron_experts}.get(kind)
        shapes[kind] = LayerGroup(count=1, attention=attn, mlp=mlp(config) if mlp else None)
    return [shapes[kind] for kind in kinds]


def deci(config: Config, count: int) -> list[LayerGroup]:
    """Nemotron-NAS: a Llama whose layers each keep, shrink or lose attention and MLP (`block_configs`)."""
    blocks = config.section_list("block_configs")
    if len(blocks) != count:
        raise config.error("block_configs", f"expected {count} entries (num_hidden_layers), got {len(blocks)}")
    return [LayerGroup(count=1, attention=_deci_attention(config, block), mlp=_deci_mlp(config, block))
            for block in blocks]  # fmt: skip


def _deci_attention(config: Config, block: Config) -> GroupedQueryAttention | None:
    part = _deci_part(block, "attention")
    if part is None:
        return None
    heads, group = config.integer("num_attention_heads"), part.integer("n_heads_in_group")
    if heads % group:
        raise part.error("n_heads_in_group", f"expected a divisor of num_attention_heads {heads}, got {group}")
    bias = config.flag("attention_bias", default=False)
    return attention.gqa(
        config, num_key_value_heads=heads // group, window=part.optional_integer("window_length"),
        qkv_bias=bias, output_bias=bias,
    )  # fmt: skip


def _deci_mlp(config: Config, block: Config) -> DenseMLP | None:
    """Width: two thirds of `ffn_mult` times the hidden size, rounded up to a multiple of 256 (vLLM's nemotron_nas)."""
    part = _deci_part(block, "ffn")
    if part is None:
        return None
    width = int(2 * part.number("ffn_mult") * config.integer("hidden_size") / 3)
    return DenseMLP(intermediate_size=-(-width // 256) * 256, bias=config.flag("mlp_bias", default=False))


def _deci_part(block: Config, key: str) -> Config | None:
    part = block.section(key)
    if part is None:
        raise block.error(key, "missing; expected an object")
    if part.flag("replace_with_linear", default=False):
        raise part.error("replace_with_linear", "unsupported true; expected false")
    return None if part.flag("no_op", default=False) else part
