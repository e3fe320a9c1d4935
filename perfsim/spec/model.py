"""What a model is: a list of layers, each one attention kind and one MLP kind. Shapes only, no physics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from perfsim.spec.base import Spec


class GroupedQueryAttention(Spec):
    """Softmax attention with `num_key_value_heads` shared K/V heads (MHA when equal to the query heads).

    `window` limits how many past tokens one token attends, itself included (None: all of them).
    """

    kind: Literal["gqa"] = "gqa"
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    window: int | None = Field(default=None, gt=0)
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False


class MultiHeadLatentAttention(Spec):
    """DeepSeek's MLA: K and V are re-expanded from one latent of `kv_lora_rank` plus a shared rotary key."""

    kind: Literal["mla"] = "mla"
    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None = Field(gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    window: None = None


Attention = Annotated[GroupedQueryAttention | MultiHeadLatentAttention, Field(discriminator="kind")]


class DenseMLP(Spec):
    """A feed-forward block: gate, up and down projections when `gated`, else up and down."""

    kind: Literal["dense"] = "dense"
    intermediate_size: int = Field(gt=0)
    gated: bool = True
    bias: bool = False


class MixtureOfExperts(Spec):
    """`num_experts` routed experts of which a token visits `num_experts_per_tok`, plus shared experts for every token.

    `shared_intermediate_size` is the total width of the shared experts (0: none); `shared_expert_gate` weighs their
    output per token (Qwen2-MoE). `router_bias` is one number per expert, added to its score.
    """

    kind: Literal["moe"] = "moe"
    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    shared_intermediate_size: int = Field(default=0, ge=0)
    shared_expert_gate: bool = False
    gated: bool = True
    bias: bool = False
    router_bias: bool = False


MLP = Annotated[DenseMLP | MixtureOfExperts, Field(discriminator="kind")]


class LayerGroup(Spec):
    """`count` layers of one shape; order inside the model is not kept, the work is the same."""

    count: int = Field(gt=0)
    attention: Attention
    mlp: MLP


WeightDType = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "mxfp4", "nvfp4"]

# Bytes per parameter with its share of scales: fp8_block has one fp32 per 128x128 (DeepSeek-V3 technical report,
# arXiv:2412.19437, 3.3), mxfp4 one byte per 32 (OCP Microscaling v1.0), nvfp4 one fp8 per 16, int4 one fp16 per 128.
WEIGHT_BYTES: dict[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0 + 4 / (128 * 128), "int8": 1.0,
    "int4": 0.5 + 2 / 128, "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16,
}  # fmt: skip
ACTIVATION_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class ModelArch(Spec):
    """A decoder-only transformer, as its Hugging Face `config.json` describes it.

    `dtype` is that of activations, norms, embeddings and the KV cache (`torch_dtype`); `linear_dtype` and
    `expert_dtype` are how the projection and routed-expert weights are stored; with `weight_only` activations stay in
    `dtype` and the weights are expanded to it for the arithmetic. `num_nextn_predict_layers` counts
    multi-token-prediction layers, which hold weights in the checkpoint but are not run by default.
    """

    name: str
    hf_id: str | None = None
    architecture: str
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    layers: tuple[LayerGroup, ...] = Field(min_length=1)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = Field(gt=0)
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    linear_dtype: WeightDType = "bf16"
    expert_dtype: WeightDType = "bf16"
    weight_only: bool = False
    norm_bias: bool = False
    lm_head_bias: bool = False
    num_nextn_predict_layers: int = Field(default=0, ge=0)

    @property
    def num_hidden_layers(self) -> int:
        return sum(group.count for group in self.layers)
