"""The feed-forward block of a layer, read from a Hugging Face config: dense, or a mixture of experts."""

from __future__ import annotations

from typing import Any

from perfsim.spec.hf_config import Config
from perfsim.spec.model import MLP, DenseMLP, MixtureOfExperts


def dense(config: Config, layer: int) -> DenseMLP:
    return DenseMLP(intermediate_size=config.integer("intermediate_size"), bias=config.flag("mlp_bias", default=False))


def experts(config: Config, *, chosen_key: str = "num_experts_per_tok", **fields: Any) -> MixtureOfExperts:
    """A mixture of experts of `fields`, of which `chosen_key` says how many a token visits."""
    total, chosen = fields["num_experts"], config.integer(chosen_key)
    if chosen > total:
        raise config.error(chosen_key, f"expected at most the number of experts ({total}), got {chosen}")
    return MixtureOfExperts(num_experts_per_tok=chosen, **fields)


def local_experts(config: Config, layer: int) -> MixtureOfExperts:
    """Mixtral, Phi-MoE: every layer has experts, whose width is the plain `intermediate_size`."""
    width = config.integer("intermediate_size")
    return experts(config, num_experts=config.integer("num_local_experts"), moe_intermediate_size=width)


def gpt_oss_experts(config: Config, layer: int) -> MixtureOfExperts:
    return local_experts(config, layer).model_copy(update={"bias": True, "router_bias": True})


def minimax_experts(config: Config, layer: int) -> MixtureOfExperts:
    """MiniMax-M2: as Mixtral, with a bias per expert on the router's score."""
    bias = config.flag("use_routing_bias", default=False)
    return local_experts(config, layer).model_copy(update={"router_bias": bias})


def qwen_mlp(config: Config, layer: int) -> MLP:
    """Every `decoder_sparse_step`-th layer has experts, save those in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", default=1)
    if layer in config.items("mlp_only_layers", int) or (layer + 1) % step:
        return dense(config, layer)
    shared = config.integer("shared_expert_intermediate_size", default=0, minimum=0)
    return experts(
        config,
        num_experts=config.integer("num_experts"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=shared,
        shared_expert_gate=shared > 0,
    )


def deepseek_mlp(config: Config, layer: int) -> MLP:
    """Dense up to `first_k_dense_replace`, then experts in every `moe_layer_freq`-th layer."""
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    if layer < first or layer % config.integer("moe_layer_freq", default=1):
        return dense(config, layer)
    return deepseek_experts(config)


def deepseek_experts(config: Config) -> MixtureOfExperts:
    width = config.integer("moe_intermediate_size")
    return experts(
        config,
        num_experts=config.integer("n_routed_experts"),
        moe_intermediate_size=width,
        shared_intermediate_size=config.integer("n_shared_experts", default=0, minimum=0) * width,
        router_bias=config.text("topk_method", default="greedy") == "noaux_tc",
    )


def llama4_mlp(config: Config, layer: int) -> MLP:
    """Every `interleave_moe_layer_step`-th layer has experts, each with a shared one; the others are wide and dense."""
    listed = config.items("moe_layers", int)
    step = config.integer("interleave_moe_layer_step", default=1)
    if layer not in listed and (listed or (layer + 1) % step):
        return DenseMLP(intermediate_size=config.integer("intermediate_size_mlp"))
    width = config.integer("intermediate_size")
    return experts(
        config,
        num_experts=config.integer("num_local_experts"),
        moe_intermediate_size=width,
        shared_intermediate_size=width,
    )


def step_mlp(config: Config, layer: int) -> MLP:
    """Step 3.7: dense up to `first_k_dense_replace`, then routed experts beside a shared one."""
    if layer < config.integer("first_k_dense_replace", default=0, minimum=0):
        return dense(config, layer)
    shared = config.integer("n_shared_experts", default=1, minimum=0)
    return experts(
        config,
        num_experts=config.integer("num_experts"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=shared * config.integer("share_expert_dim"),
        router_bias=config.flag("use_moe_router_bias", default=False),
    )


def minimax_m3_mlp(config: Config, layer: int) -> MLP:
    """MiniMax-M3: `moe_layer_freq` marks the layers with experts, the others are dense and wider."""
    if not config.items("moe_layer_freq", int)[layer]:
        return DenseMLP(intermediate_size=config.integer("dense_intermediate_size"))
    shared = config.integer("n_shared_experts", default=0, minimum=0)
    return experts(
        config,
        num_experts=config.integer("num_local_experts"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=shared * config.integer("shared_intermediate_size", minimum=0),
        router_bias=config.flag("use_routing_bias", default=False),
    )


def gemma4_mlp(config: Config, layer: int) -> MLP:
    """Gemma 4: a dense block in every layer and, with `enable_moe_block`, routed experts in parallel to it.

    The dense block is what other models call a shared expert; the router's scale per expert stands as its bias.
    """
    if not config.flag("enable_moe_block", default=False):
        return dense(config, layer)
    return experts(
        config,
        chosen_key="top_k_experts",
        num_experts=config.integer("num_experts"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=config.integer("intermediate_size"),
        router_bias=True,
    )


def kimi_linear_mlp(config: Config, layer: int) -> MLP:
    """Kimi K3: experts in a latent space of `routed_expert_hidden_size`, shared ones outside of it."""
    first = config.integer("first_k_dense_replace", default=0, minimum=0)
    if layer < first or layer % config.integer("moe_layer_freq", default=1):
        return dense(config, layer)
    width, latent = config.integer("moe_intermediate_size"), config.optional_integer("routed_expert_hidden_size")
    return experts(
        config,
        chosen_key="num_experts_per_token",
        num_experts=config.integer("num_experts"),
        moe_intermediate_size=width,
        shared_intermediate_size=config.integer("num_shared_experts", default=0, minimum=0) * width,
        router_bias=True,
        latent_size=latent,
        latent_norm=latent is not None and config.flag("latent_moe_use_norm", default=False),
    )


def nemotron_dense(config: Config) -> DenseMLP:
    """Nemotron-H uses squared ReLU: no gate."""
    bias = config.flag("mlp_bias", default=False)
    return DenseMLP(intermediate_size=config.integer("intermediate_size"), gated=False, bias=bias)


def nemotron_experts(config: Config) -> MixtureOfExperts:
    shared = config.integer("moe_shared_expert_intermediate_size", default=0, minimum=0)
    return experts(
        config,
        num_experts=config.integer("n_routed_experts"),
        moe_intermediate_size=config.integer("moe_intermediate_size"),
        shared_intermediate_size=config.integer("n_shared_experts", default=1, minimum=0) * shared,
        gated=False,
        router_bias=True,
        latent_size=config.optional_integer("moe_latent_size"),
    )
