"""Which architectures are read, and how: one table entry per architecture that is described exactly.

A family gives one LayerGroup per layer and, if need be, fields of the ModelArch that the standard keys don't hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from perfsim.spec import hf_attention as attention
from perfsim.spec import hf_classic as classic
from perfsim.spec import hf_hybrid as hybrid
from perfsim.spec import hf_mlp as mlps
from perfsim.spec import hf_vision as vision
from perfsim.spec.hf_config import Config
from perfsim.spec.model import MLP, Attention, LayerGroup, VisionTower

Layers = Callable[[Config, int], list[LayerGroup]]
Options = Callable[[Config], dict[str, Any]]


def _no_options(config: Config) -> dict[str, Any]:
    return {}


class Family(NamedTuple):
    """How one architecture is read: its layers, other fields of ModelArch, its vision tower, its names for keys."""

    layers: Layers
    options: Options = _no_options
    vision: Callable[[Config, int], VisionTower] | None = None
    names: Mapping[str, str] = {}


def _stack(
    attend: Callable[[Config], Attention], windows: Callable[[Config, int], list[int | None]],
    mlp: Callable[[Config, int], MLP],
) -> Layers:  # fmt: skip
    """Layers of one attention, of which some have a window, and an MLP that depends on the layer's number."""

    def layers(config: Config, count: int) -> list[LayerGroup]:
        full = attend(config)
        attentions = [full if window is None else full.model_copy(update={"window": window})
                      for window in windows(config, count)]  # fmt: skip
        return [LayerGroup(count=1, attention=attn, mlp=mlp(config, layer)) for layer, attn in enumerate(attentions)]

    return layers


def _minimax_m2(config: Config, count: int) -> list[LayerGroup]:
    """Q and K are normalised over all heads at once (`qk_norm_type: per_layer`)."""
    norm = "all_heads" if config.flag("use_qk_norm", default=False) else None
    attn = attention.gqa(config, qk_norm=norm)
    return [LayerGroup(count=1, attention=attn, mlp=mlps.minimax_experts(config, layer)) for layer in range(count)]


def _minimax_m2_options(config: Config) -> dict[str, Any]:
    if not config.flag("use_mtp", default=False):
        return {}
    modules = config.integer("num_mtp_modules", default=0, minimum=0, maximum=64)
    return {"num_nextn_predict_layers": modules * config.integer("mtp_transformer_layers", default=1, maximum=8)}


def _glm_dsa(config: Config, count: int) -> list[LayerGroup]:
    """GLM-5: DeepSeek's sparse attention; from 5.2 on most layers take the tokens that an earlier layer has picked.

    `indexer_types` says which; without it vLLM's rule from `index_topk_freq` and `index_skip_topk_offset`.
    """
    every = config.integer("index_topk_freq", default=1)
    offset = config.integer("index_skip_topk_offset", default=2, minimum=0)
    usual = ["shared" if max(layer - offset + 1, 0) % every else "full" for layer in range(count)]
    kinds = attention.per_layer(config, "indexer_types", count, ["full", "shared"], default=usual)
    own, shared = attention.sparse_mla(config), attention.sparse_mla(config, shared=True)
    return [LayerGroup(count=1, attention=own if kind == "full" else shared, mlp=mlps.deepseek_mlp(config, layer))
            for layer, kind in enumerate(kinds)]  # fmt: skip


def _glm_options(config: Config) -> dict[str, Any]:
    layer = LayerGroup(count=1, attention=attention.sparse_mla(config), mlp=mlps.deepseek_experts(config))
    return {"mtp_layers": (layer,)}


def _deepseek_v4(config: Config, count: int) -> list[LayerGroup]:
    """Every layer has experts; the first `num_hash_layers` pick them by token id, which needs no bias."""
    ratios = config.items("compress_ratios", int)[:count]
    if len(ratios) != count:
        raise config.error("compress_ratios", f"expected {count} entries (num_hidden_layers), got {len(ratios)}")
    hashed, moe = config.integer("num_hash_layers", default=0, minimum=0), mlps.deepseek_experts(config)
    plain = moe.model_copy(update={"router_bias": False})
    return [LayerGroup(count=1, attention=attention.compressed(config, ratio), mlp=plain if layer < hashed else moe)
            for layer, ratio in enumerate(ratios)]  # fmt: skip


def _deepseek_v4_options(config: Config) -> dict[str, Any]:
    """The prediction layer's ratio follows those of the layers."""
    count, ratios = config.integer("num_hidden_layers"), config.items("compress_ratios", int)
    ratio = ratios[count] if len(ratios) > count else 0
    layer = LayerGroup(count=1, attention=attention.compressed(config, ratio), mlp=mlps.deepseek_experts(config))
    return {"mtp_layers": (layer,), "hyper_connections": config.integer("hc_mult", default=1)}


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_stack(attention.configured_bias, attention.no_window, mlps.dense)),
    "MistralForCausalLM": Family(_stack(attention.no_bias, attention.one_window, mlps.dense)),
    "MixtralForCausalLM": Family(_stack(attention.no_bias, attention.one_window, mlps.local_experts)),
    "Qwen2ForCausalLM": Family(_stack(attention.qkv_bias, attention.upper_window, mlps.dense)),
    "Qwen2MoeForCausalLM": Family(_stack(attention.qkv_bias, attention.upper_window, mlps.qwen_mlp)),
    "Qwen3ForCausalLM": Family(_stack(attention.head_norms, attention.upper_window, mlps.dense)),
    "Qwen3MoeForCausalLM": Family(_stack(attention.head_norms, attention.upper_window, mlps.qwen_mlp)),
    "MiMoForCausalLM": Family(_stack(attention.qkv_bias, attention.upper_window, mlps.dense)),
    "Phi3ForCausalLM": Family(_stack(attention.no_bias, attention.one_window, mlps.dense)),
    "PhiMoEForCausalLM": Family(
        _stack(attention.configured_bias, attention.one_window, mlps.local_experts), classic.norm_bias
    ),
    "DeepseekV2ForCausalLM": Family(_stack(attention.mla, attention.no_window, mlps.deepseek_mlp)),
    "DeepseekV3ForCausalLM": Family(_stack(attention.mla, attention.no_window, mlps.deepseek_mlp)),
    "DeepseekV32ForCausalLM": Family(_stack(attention.sparse_mla, attention.no_window, mlps.deepseek_mlp)),
    "DeepseekV4ForCausalLM": Family(_deepseek_v4, _deepseek_v4_options),
    "GlmMoeDsaForCausalLM": Family(_glm_dsa, _glm_options),
    "KimiK25ForConditionalGeneration": Family(
        _stack(attention.mla, attention.no_window, mlps.deepseek_mlp), vision=vision.moonvit
    ),
    "KimiLinearForCausalLM": Family(hybrid.kimi_linear, hybrid.kimi_linear_options),
    "KimiK3ForConditionalGeneration": Family(hybrid.kimi_linear, hybrid.kimi_linear_options, vision.moonvit),
    "GptOssForCausalLM": Family(_stack(attention.sinks, attention.typed_window, mlps.gpt_oss_experts)),
    "MiniMaxM2ForCausalLM": Family(_minimax_m2, _minimax_m2_options),
    "MiniMaxM3ForCausalLM": Family(hybrid.minimax_m3),
    "Qwen3VLMoeForConditionalGeneration": Family(
        _stack(attention.head_norms, attention.no_window, mlps.qwen_mlp), vision=vision.qwen
    ),
    "Qwen3_5ForConditionalGeneration": Family(hybrid.qwen35, hybrid.qwen35_options, vision.qwen),
    "Qwen3_5MoeForConditionalGeneration": Family(hybrid.qwen35, hybrid.qwen35_options, vision.qwen),
    "MiMoV2FlashForCausalLM": Family(hybrid.mimo_v2),
    "Step3p7FlashForCausalLM": Family(hybrid.step37, hybrid.step37_options),
    "Llama4ForConditionalGeneration": Family(hybrid.llama4, vision=vision.llama4),
    "Gemma4ForConditionalGeneration": Family(hybrid.gemma4, vision=vision.gemma4),
    "NemotronHForCausalLM": Family(hybrid.nemotron_h, hybrid.nemotron_h_options),
    "DeciLMForCausalLM": Family(hybrid.deci),
    "GPT2LMHeadModel": Family(classic.gpt2, classic.gpt2_options, names=classic.GPT2_NAMES),
    "MptForCausalLM": Family(classic.mpt, classic.mpt_options, names=classic.MPT_NAMES),
    "FalconForCausalLM": Family(classic.falcon, classic.falcon_options),
    "Mamba2ForCausalLM": Family(classic.mamba2, classic.mamba2_options),
}
