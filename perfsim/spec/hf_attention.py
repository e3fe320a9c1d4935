"""The softmax attention of a layer, read from a Hugging Face config: heads, windows, chunks and sparse indexers.

What a config leaves out follows the model's own code in `transformers`: Qwen2 and MiMo always have a bias on Q, K and V
and none on the output; Qwen3 normalises Q and K per head; gpt-oss has biases everywhere and attention sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perfsim.spec.attention import (
    CompressedAttention,
    GroupedQueryAttention,
    LinearAttention,
    Mamba2,
    MultiHeadLatentAttention,
    SparseIndexer,
)
from perfsim.spec.hf_config import Config
from perfsim.spec.problems import shorten


def gqa(config: Config, **options: Any) -> GroupedQueryAttention:
    """The heads of `config`; `options` are fields of GroupedQueryAttention that the family knows."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", default=heads)
    check_groups(config, "num_key_value_heads", heads=heads, kv_heads=kv_heads)
    defaults = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim(config, heads)}
    return GroupedQueryAttention(**{**defaults, **options})


def check_groups(config: Config, key: str, *, heads: int, kv_heads: int) -> None:
    """InputError about `key` when query heads cannot be shared out evenly among K/V heads."""
    if heads % kv_heads:
        raise config.error(key, f"expected a divisor of num_attention_heads {heads}, got {kv_heads}")


def head_dim(config: Config, heads: int) -> int:
    """`head_dim`, or the hidden size divided among the heads."""
    hidden = config.integer("hidden_size")
    if "head_dim" not in config and hidden % heads:
        raise config.error("num_attention_heads", f"expected a divisor of {hidden} (hidden_size), got {heads}")
    return config.integer("head_dim", default=max(1, hidden // heads))


def configured_bias(config: Config) -> GroupedQueryAttention:
    bias = config.flag("attention_bias", default=False)
    return gqa(config, qkv_bias=bias, output_bias=bias)


def no_bias(config: Config) -> GroupedQueryAttention:
    return gqa(config)


def qkv_bias(config: Config) -> GroupedQueryAttention:
    return gqa(config, qkv_bias=config.flag("qkv_bias", default=True))


def head_norms(config: Config) -> GroupedQueryAttention:
    return configured_bias(config).model_copy(update={"qk_norm": "head"})


def sinks(config: Config) -> GroupedQueryAttention:
    bias = config.flag("attention_bias", default=True)
    return gqa(config, qkv_bias=bias, output_bias=bias, sinks=True)


def mla(config: Config) -> MultiHeadLatentAttention:
    if config.flag("attention_bias", default=False):
        raise config.error("attention_bias", "unsupported true with multi-head latent attention; expected false")
    return MultiHeadLatentAttention(
        num_attention_heads=config.integer("num_attention_heads"),
        q_lora_rank=config.optional_integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim"),
        v_head_dim=config.integer("v_head_dim"),
        output_gate="element" if config.flag("mla_use_output_gate", default=False) else None,
    )


def sparse_mla(config: Config, *, shared: bool = False) -> MultiHeadLatentAttention:
    """MLA with DeepSeek's lightning indexer, whose queries come from the query latent."""
    rank = config.integer("q_lora_rank")
    return mla(config).model_copy(update={"indexer": indexer(config, query_rank=rank, shared=shared)})


def indexer(config: Config, **options: Any) -> SparseIndexer:
    return SparseIndexer(
        num_heads=config.integer("index_n_heads"),
        head_dim=config.integer("index_head_dim"),
        top_k=config.integer("index_topk"),
        **options,
    )


def compressed(config: Config, ratio: int) -> CompressedAttention:
    """DeepSeek-V4: ratio 0 is a plain window, 4 has an indexer over the summaries, 128 attends all of them.

    The code of the model (`transformers`, deepseek_v4) gives an indexer to ratio 4 alone.
    """
    if ratio not in (0, 4, 128):
        raise config.error("compress_ratios", f"expected 0, 4 or 128 per layer, got {ratio}")
    rank = config.integer("q_lora_rank")
    return CompressedAttention(
        num_attention_heads=config.integer("num_attention_heads"),
        head_dim=config.integer("head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim"),
        q_lora_rank=rank,
        o_lora_rank=config.integer("o_lora_rank"),
        o_groups=config.integer("o_groups"),
        window=config.integer("sliding_window"),
        compress_ratio=ratio,
        indexer=indexer(config, query_rank=rank, key_norm="rms") if ratio == 4 else None,
    )


STATE_DTYPES: dict[str, Any] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def gated_delta_net(config: Config) -> LinearAttention:
    """Qwen3-Next and Qwen3.5: one decay per value head, a full output gate, states in `mamba_ssm_dtype`."""
    heads, key_heads = config.integer("linear_num_value_heads"), config.integer("linear_num_key_heads")
    if heads % key_heads:
        raise config.error(
            "linear_num_key_heads", f"expected a divisor of linear_num_value_heads {heads}, got {key_heads}"
        )
    return LinearAttention(
        num_key_heads=key_heads,
        num_value_heads=heads,
        key_head_dim=config.integer("linear_key_head_dim"),
        value_head_dim=config.integer("linear_value_head_dim"),
        conv_kernel=config.integer("linear_conv_kernel_dim"),
        state_dtype=config.choice("mamba_ssm_dtype", STATE_DTYPES, default="float32"),
    )


def mamba2(config: Config, *, state_dtype: str = "float32", **names: str) -> Mamba2:
    """A Mamba-2 mixer; `names` maps fields to the keys of this config where they differ from Nemotron-H's.

    `state_dtype` is what vLLM keeps states in when the config does not say (fp32 for Nemotron-H).
    """
    keys = {"num_heads": "mamba_num_heads", "head_dim": "mamba_head_dim", "state_size": "ssm_state_size",
            "proj_bias": "mamba_proj_bias", **names}  # fmt: skip
    return Mamba2(
        num_heads=config.integer(keys["num_heads"]),
        head_dim=config.integer(keys["head_dim"]),
        n_groups=config.integer("n_groups", default=8),
        state_size=config.integer(keys["state_size"]),
        conv_kernel=config.integer("conv_kernel", default=4),
        proj_bias=config.flag(keys["proj_bias"], default=False),
        conv_bias=config.flag("use_conv_bias", default=True),
        state_dtype=config.choice("mamba_ssm_cache_dtype", STATE_DTYPES, default=state_dtype),
    )


def no_window(config: Config, count: int) -> list[int | None]:
    return [None] * count


def one_window(config: Config, count: int) -> list[int | None]:
    return [config.optional_integer("sliding_window")] * count


def upper_window(config: Config, count: int) -> list[int | None]:
    """Qwen's rule: with `use_sliding_window`, the layers from `max_window_layers` on are limited."""
    if not config.flag("use_sliding_window", default=False):
        return [None] * count
    full = config.integer("max_window_layers", default=count, minimum=0)
    window = config.integer("sliding_window")
    return [None if layer < full else window for layer in range(count)]


def typed_window(config: Config, count: int) -> list[int | None]:
    """`layer_types` says which layers slide; without it every other layer does, beginning with the first."""
    window = config.integer("sliding_window")
    alternating = ["sliding_attention", "full_attention"]
    types = layer_types(config, count, alternating, default=alternating * (count // 2 + 1))
    return [window if kind == "sliding_attention" else None for kind in types]


def layer_types(config: Config, count: int, valid: Sequence[str], *, default: Sequence[str] = ()) -> list[str]:
    """`layer_types`, one of `valid` for each of `count` layers."""
    return per_layer(config, "layer_types", count, valid, default=default)


def per_layer(config: Config, key: str, count: int, valid: Sequence[str], *, default: Sequence[str] = ()) -> list[str]:
    """The list of words at `key`, one of `valid` for each layer; the first `count` of `default` when absent."""
    kinds = config.items(key, str) or list(default[:count])
    if len(kinds) != count:
        raise config.error(key, f"expected {count} entries (num_hidden_layers), got {len(kinds)}")
    for kind in kinds:
        if kind not in valid:
            raise config.error(key, f"unsupported '{shorten(kind)}'; expected {' or '.join(valid)}")
    return kinds


def switches(config: Config, key: str, count: int) -> list[bool]:
    """The list of zeros and ones at `key`, one for each layer."""
    values = config.items(key, int)
    if len(values) != count or any(value not in (0, 1) for value in values):
        raise config.error(key, f"expected {count} entries (num_hidden_layers) of 0 or 1, got {shorten(str(values))}")
    return [value == 1 for value in values]
