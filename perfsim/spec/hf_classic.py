"""Readers of older or plainer architectures whose configs have keys and defaults of their own.

Defaults are those of the `configuration_*.py` of `transformers` 5.24.
"""

from __future__ import annotations

from typing import Any

from perfsim.spec import hf_attention as attention
from perfsim.spec.attention import GroupedQueryAttention
from perfsim.spec.hf_config import Config
from perfsim.spec.model import DenseMLP, LayerGroup

GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner",
}  # fmt: skip
MPT_NAMES = {
    "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}  # fmt: skip
# A recurrent model has no longest sequence; this keeps the sizes that follow from one finite.
UNLIMITED_POSITIONS = 2**20


def norm_bias(config: Config) -> dict[str, Any]:
    """Models with LayerNorm: a weight and a bias per element."""
    return {"norm_bias": True}


def gpt2(config: Config, count: int) -> list[LayerGroup]:
    """GPT-2 and GPT-3: multi-head attention, biases everywhere, a plain MLP of four times the width.

    GPT-3 alternates dense and locally banded attention (arXiv:2005.14165, 2.1) in a pattern that is not published; all
    layers are read as dense.
    """
    width = 4 * config.integer("hidden_size", maximum=2**24)
    mlp = DenseMLP(intermediate_size=config.integer("intermediate_size", default=width), gated=False, bias=True)
    attn = attention.gqa(config, qkv_bias=True, output_bias=True)
    return [LayerGroup(count=1, attention=attn, mlp=mlp)] * count


def gpt2_options(config: Config) -> dict[str, Any]:
    positions = config.integer("max_position_embeddings")
    return {"norm_bias": True, "learned_positions": positions, **_tied(config)}


def mpt(config: Config, count: int) -> list[LayerGroup]:
    """MPT: ALiBi instead of position embeddings; `no_bias` leaves out those of norms, too."""
    bias = not config.flag("no_bias", default=True)
    settings = config.section("attn_config")
    single = settings is not None and settings.text("attn_type", default="multihead_attention") != "multihead_attention"
    heads = config.integer("num_attention_heads")
    attn = attention.gqa(config, num_key_value_heads=1 if single else heads, qkv_bias=bias, output_bias=bias)
    ratio = config.integer("expansion_ratio", default=4, maximum=1024)
    mlp = DenseMLP(intermediate_size=ratio * config.integer("hidden_size", maximum=2**20), gated=False, bias=bias)
    return [LayerGroup(count=1, attention=attn, mlp=mlp)] * count


def mpt_options(config: Config) -> dict[str, Any]:
    return {"norm_bias": not config.flag("no_bias", default=True), **_tied(config)}


def falcon(config: Config, count: int) -> list[LayerGroup]:
    """Falcon: attention and MLP side by side on one norm (40B and later: on one each), one K/V head (or groups)."""
    bias, new = config.flag("bias", default=False), config.flag("new_decoder_architecture", default=False)
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_kv_heads", default=heads) if new else 1
    if not new and not config.flag("multi_query", default=True):
        kv_heads = heads
    attention.check_groups(config, "num_kv_heads", heads=heads, kv_heads=kv_heads)
    attn = GroupedQueryAttention(
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=attention.head_dim(config, heads),
        qkv_bias=bias, output_bias=bias,
    )  # fmt: skip
    width = config.integer("ffn_hidden_size", default=4 * config.integer("hidden_size", maximum=2**24))
    parallel = new or config.flag("parallel_attn", default=True)
    norms = config.integer("num_ln_in_parallel_attn", default=2 if new or not parallel else 1, maximum=2)
    mlp = DenseMLP(intermediate_size=width, gated=False, bias=bias)
    return [LayerGroup(count=1, attention=attn, mlp=mlp, parallel=parallel, norms=norms)] * count


def falcon_options(config: Config) -> dict[str, Any]:
    positions = config.integer("max_position_embeddings", default=2048)
    return {"norm_bias": True, "max_position_embeddings": positions, **_tied(config)}


def mamba2(config: Config, count: int) -> list[LayerGroup]:
    """A pure Mamba-2 stack: one norm and one mixer per layer; vLLM keeps its states in the activation dtype."""
    inner = config.integer("expand", default=2, maximum=64) * config.integer("hidden_size", maximum=2**24)
    mixer = attention.mamba2(
        config, state_dtype=config.text("torch_dtype", default="bfloat16"), num_heads="num_heads",
        head_dim="head_dim", state_size="state_size", proj_bias="use_bias",
    )  # fmt: skip
    if mixer.inner_width != inner:
        expected = f"num_heads x head_dim = expand x hidden_size ({inner})"
        raise config.error("num_heads", f"expected {expected}, got {mixer.inner_width}")
    return [LayerGroup(count=1, attention=mixer, mlp=None)] * count


def mamba2_options(config: Config) -> dict[str, Any]:
    return {"max_position_embeddings": config.integer("max_position_embeddings", default=UNLIMITED_POSITIONS)}


def _tied(config: Config) -> dict[str, Any]:
    """These families tie the head to the embedding unless the config says otherwise."""
    return {"tie_word_embeddings": config.flag("tie_word_embeddings", default=True)}
