"""From a Hugging Face `config.json` to a ModelArch: one table entry per architecture that is lowered correctly.

What a config leaves out follows the model's own code in `transformers`: Qwen2 and MiMo always have a bias on Q, K and V
and none on the output; Qwen3 normalises Q and K per head; gpt-oss has biases everywhere and attention sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from perfsim.errors import InputError
from perfsim.spec.hf_config import Config, read_config
from perfsim.spec.hf_quantization import weight_formats
from perfsim.spec.model import (
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    MixtureOfExperts,
    ModelArch,
    MultiHeadLatentAttention,
)
from perfsim.spec.problems import shorten, validated

MAX_LAYERS = 4096
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Family(NamedTuple):
    """How one architecture's config is read: attention without its window, the window and the MLP of each layer."""

    attention: Callable[[Config], GroupedQueryAttention | MultiHeadLatentAttention]
    windows: Callable[[Config, int], list[int | None]]
    mlp: Callable[[Config, int], DenseMLP | MixtureOfExperts]


def load_model(path: str | Path, *, name: str | None = None, hf_id: str | None = None) -> ModelArch:
    """The model that a `config.json` describes; `name` defaults to the file's stem.

    Raises InputError of one line, naming file and key, for a broken file, a missing key, a value of the wrong type or
    out of range, sizes that contradict each other, and an architecture or quantisation that is not supported.
    """
    return model_from_config(read_config(path), name=name or Path(path).stem, hf_id=hf_id)


def model_from_config(config: Config, *, name: str, hf_id: str | None = None) -> ModelArch:
    """The ModelArch of a parsed config; errors as for `load_model`."""
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    dtype = _dtype(config)
    formats = weight_formats(config, dtype=dtype)
    content = {
        "name": name,
        "hf_id": hf_id,
        "architecture": architecture,
        "hidden_size": config.integer("hidden_size"),
        "vocab_size": config.integer("vocab_size"),
        "layers": _layer_groups(config, family),
        "tie_word_embeddings": config.flag("tie_word_embeddings", default=False),
        "max_position_embeddings": config.integer("max_position_embeddings"),
        "dtype": dtype,
        "linear_dtype": formats.linear,
        "expert_dtype": formats.expert,
        "weight_only": formats.weight_only,
        "norm_bias": architecture == "PhiMoEForCausalLM",
        "lm_head_bias": config.flag("lm_head_bias", default=False),
        "num_nextn_predict_layers": config.integer("num_nextn_predict_layers", default=0, minimum=0, maximum=64),
    }
    return validated(ModelArch, content, where=config.where)


def _architecture(config: Config) -> str:
    names = config.items("architectures", str)
    if not names:
        raise InputError(f"{config.where}: missing key 'architectures'; expected one of {', '.join(FAMILIES)}")
    if names[0] not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise config.error("architectures", f"unsupported '{shorten(names[0])}'; supported: {supported}")
    return names[0]


def _dtype(config: Config) -> str:
    """The activation dtype: `torch_dtype`, `dtype` in newer configs, bf16 in those without (gpt-oss ships so)."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return config.choice(key, _DTYPES, default="bfloat16")


def _layer_groups(config: Config, family: Family) -> list[LayerGroup]:
    count = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    attention = family.attention(config)
    reach = config.integer("max_position_embeddings")
    shapes: dict[tuple[Any, Any], int] = {}
    for layer, window in enumerate(family.windows(config, count)):
        # A window as long as the longest sequence never cuts anything off.
        limited = attention if window is None or window >= reach else attention.model_copy(update={"window": window})
        shape = (limited, family.mlp(config, layer))
        shapes[shape] = shapes.get(shape, 0) + 1
    return [LayerGroup(count=count, attention=attn, mlp=mlp) for (attn, mlp), count in shapes.items()]


def _gqa(config: Config, *, qkv_bias: bool, output_bias: bool, **options: Any) -> GroupedQueryAttention:
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    hidden = config.integer("hidden_size")
    if heads % kv_heads:
        raise config.error("num_key_value_heads", f"expected a divisor of num_attention_heads {heads}, got {kv_heads}")
    if "head_dim" not in config and hidden % heads:
        raise config.error("num_attention_heads", f"expected a divisor of {hidden} (hidden_size), got {heads}")
    return GroupedQueryAttention(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.integer("head_dim", default=max(1, hidden // heads)),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        **options,
    )


def _configured_bias(config: Config) -> GroupedQueryAttention:
    bias = config.flag("attention_bias", default=False)
    return _gqa(config, qkv_bias=bias, output_bias=bias)


def _no_bias(config: Config) -> GroupedQueryAttention:
    return _gqa(config, qkv_bias=False, output_bias=False)


def _qkv_bias(config: Config) -> GroupedQueryAttention:
    return _gqa(config, qkv_bias=config.flag("qkv_bias", default=True), output_bias=False)


def _qk_norm(config: Config) -> GroupedQueryAttention:
    bias = config.flag("attention_bias", default=False)
    return _gqa(config, qkv_bias=bias, output_bias=bias, qk_norm="head")


def _sinks(config: Config) -> GroupedQueryAttention:
    bias = config.flag("attention_bias", default=True)
    return _gqa(config, qkv_bias=bias, output_bias=bias, sinks=True)


def _mla(config: Config) -> MultiHeadLatentAttention:
    if config.flag("attention_bias", default=False):
        raise config.error("attention_bias", "unsupported true with multi-head latent attention; expected false")
    return MultiHeadLatentAttention(
        num_attention_heads=config.integer("num_attention_heads"),
        q_lora_rank=config.optional_integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim"),
        v_head_dim=config.integer("v_head_dim"),
    )


def _no_window(config: Config, count: int) -> list[int | None]:
    return [None] * count


def _one_window(config: Config, count: int) -> list[int | None]:
    return [config.optional_integer("sliding_window")] * count


def _upper_window(config: Config, count: int) -> list[int | None]:
    """Qwen's rule: with `use_sliding_window`, the layers from `max_window_layers` on are limited."""
    if not config.flag("use_sliding_window", default=False):
        return [None] * count
    full = config.integer("max_window_layers", default=count, minimum=0)
    window = config.integer("sliding_window")
    return [None if layer < full else window for layer in range(count)]


def _typed_window(config: Config, count: int) -> list[int | None]:
    """`layer_types` says which layers slide; without it every other layer does, beginning with the first."""
    window = config.integer("sliding_window")
    alternating = ["sliding_attention", "full_attention"] * (count // 2 + 1)
    types = config.items("layer_types", str) or alternating[:count]
    if len(types) != count:
        raise config.error("layer_types", f"expected {count} entries (num_hidden_layers), got {len(types)}")
    for kind in types:
        if kind not in alternating[:2]:
            raise config.error("layer_types", f"unsupported '{shorten(kind)}'; expected {' or '.join(alternating[:2])}")
    return [window if kind == "sliding_attention" else None for kind in types]


def _dense(config: Config, layer: int) -> DenseMLP:
    return DenseMLP(intermediate_size=config.integer("intermediate_size"), bias=config.flag("mlp_bias", default=False))


def _experts(config: Config, **sizes: Any) -> MixtureOfExperts:
    total, chosen = sizes["num_experts"], config.integer("num_experts_per_tok")
    if chosen > total:
        raise config.error("num_experts_per_tok", f"expected at most the number of experts ({total}), got {chosen}")
    return MixtureOfExperts(num_experts_per_tok=chosen, **sizes)


def _local_experts(config: Config, layer: int) -> MixtureOfExperts:
    """Mixtral, Phi-MoE: every layer has experts, whose width is the plain `intermediate_size`."""
    width = config.integer("intermediate_size")
    return _experts(config, num_experts=config.integer("num_local_experts"), moe_intermediate_size=width)


def _gpt_oss_experts(config: Config, layer: int) -> MixtureOfExperts:
    return _local_experts(config, layer).model_copy(update={"bias": True, "router_bias": True})


def _qwen_mlp(config: Config, layer: int) -> DenseMLP | MixtureOfExperts:
    """Every `decoder_sparse_step`-th layer has experts, save those in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    if layer in config.items("mlp_only_layers", int) or (layer + 1) % step:
        return _dense(config, layer)
    shared = config.integer("shared_expert_intermediate_size", default=0, minimum=0)
    return _experts(
        config,
        num_experts=config.integer("num_experts"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=shared,
        shared_expert_gate=shared > 0,
    )


def _deepseek_mlp(config: Config, layer: int) -> DenseMLP | MixtureOfExperts:
    """Dense up to `first_k_dense_replace`, then experts in every `moe_layer_freq`-th layer."""
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    if layer < first or layer % config.integer("moe_layer_freq", default=1):
        return _dense(config, layer)
    width = config.integer("moe_intermediate_size")
    return _experts(
        config,
        num_experts=config.integer("n_routed_experts"),
        moe_intermediate_size=width,
        shared_intermediate_size=config.integer("n_shared_experts", default=0, minimum=0) * width,
        router_bias=config.text("topk_method", default="greedy") == "noaux_tc",
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_configured_bias, _no_window, _dense),
    "MistralForCausalLM": Family(_no_bias, _one_window, _dense),
    "MixtralForCausalLM": Family(_no_bias, _one_window, _local_experts),
    "Qwen2ForCausalLM": Family(_qkv_bias, _upper_window, _dense),
    "Qwen2MoeForCausalLM": Family(_qkv_bias, _upper_window, _qwen_mlp),
    "Qwen3ForCausalLM": Family(_qk_norm, _upper_window, _dense),
    "Qwen3MoeForCausalLM": Family(_qk_norm, _upper_window, _qwen_mlp),
    "MiMoForCausalLM": Family(_qkv_bias, _upper_window, _dense),
    "PhiMoEForCausalLM": Family(_configured_bias, _one_window, _local_experts),
    "DeepseekV2ForCausalLM": Family(_mla, _no_window, _deepseek_mlp),
    "DeepseekV3ForCausalLM": Family(_mla, _no_window, _deepseek_mlp),
    "GptOssForCausalLM": Family(_sinks, _typed_window, _gpt_oss_experts),
}
