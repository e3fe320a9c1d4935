"""What a model is: a list of layers, each at most one attention kind and one MLP kind. Shapes only, no physics."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from perfsim.spec.attention import (
    Attention,
    CompressedAttention,
    GroupedQueryAttention,
    LinearAttention,
    Mamba2,
    MultiHeadLatentAttention,
    Reach,
    RecurrentState,
    SparseIndexer,
)
from perfsim.spec.base import Spec

__all__ = [
    "ACTIVATION_BYTES", "MLP", "WEIGHT_BYTES", "Attention", "CompressedAttention", "DenseMLP", "GroupedQueryAttention",
    "LayerGroup", "LinearAttention", "Mamba2", "MixtureOfExperts", "ModelArch", "MultiHeadLatentAttention", "Reach",
    "RecurrentState", "SparseIndexer", "VisionTower", "WeightDType",
]  # fmt: skip


class DenseMLP(Spec):
    """A feed-forward block: gate, up and down projections when `gated`, else up and down."""

    kind: Literal["dense"] = "dense"
    intermediate_size: int = Field(gt=0)
    gated: bool = True
    bias: bool = False


class MixtureOfExperts(Spec):
    """`num_experts` routed experts of which a token visits `num_experts_per_tok`, plus shared experts for every token.

    `shared_intermediate_size` is the total width of the shared experts (0: none); `shared_expert_gate` weighs their
    output per token (Qwen2-MoE). `router_bias` is one number per expert, added to its score. With `latent_size` the
    routed experts read and write vectors of that width, between two projections that every token passes (LatentMoE of
    Nemotron 3; Kimi K3), `latent_norm` normalises them.
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
    latent_size: int | None = Field(default=None, gt=0)
    latent_norm: bool = False


MLP = Annotated[DenseMLP | MixtureOfExperts, Field(discriminator="kind")]


class LayerGroup(Spec):
    """`count` layers of one shape; order inside the model is not kept, the work is the same.

    `attention` or `mlp` may be missing (hybrid stacks alternate them; NAS models drop some). `norms` is the number of
    norms over the hidden size (None: one before each block). `parallel` blocks read the same input (Falcon): one
    all-reduce and one norm (unless `norms` says more) serve both.
    """

    count: int = Field(gt=0)
    attention: Attention | None
    mlp: MLP | None
    parallel: bool = False
    norms: int | None = Field(default=None, ge=0)

    @property
    def reach(self) -> Reach | None:
        """Which cached entries a token attends here; None: none at all (no attention, or a recurrent one)."""
        return None if self.attention is None else self.attention.reach

    @property
    def state(self) -> RecurrentState | None:
        """Numbers that one sequence holds here whatever its length; None: none."""
        return None if self.attention is None else self.attention.state

    @property
    def blocks(self) -> int:
        """How many of attention and MLP exist (0 to 2)."""
        return (self.attention is not None) + (self.mlp is not None)

    @property
    def norm_count(self) -> int:
        if self.norms is not None:
            return self.norms
        return min(self.blocks, 1) if self.parallel else self.blocks


class VisionTower(Spec):
    """An image encoder with its projector: `params` weights in `dtype` of the model, in memory but not run for text."""

    params: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    patch_size: int = Field(gt=0)


WeightDType = Literal["fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "int4_g32", "mxfp4", "nvfp4"]

# Bytes per parameter with its share of scales: fp8_block has one fp32 per 128x128 (DeepSeek-V3 technical report,
# arXiv:2412.19437, 3.3), mxfp4 one byte per 32 (OCP Microscaling v1.0), nvfp4 one fp8 per 16, int4 one fp16
# per 128 (int4_g32: per 32).
WEIGHT_BYTES: dict[str, float] = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0 + 4 / (128 * 128), "int8": 1.0,
    "int4": 0.5 + 2 / 128, "int4_g32": 0.5 + 2 / 32, "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16,
}  # fmt: skip
ACTIVATION_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class ModelArch(Spec):
    """A decoder-only transformer, as its Hugging Face `config.json` describes it.

    `dtype` is that of activations, norms, embeddings and the KV cache (`torch_dtype`); `linear_dtype` and
    `expert_dtype` are how the projection and routed-expert weights are stored, `attention_dtype` those of attention
    (None: as the other projections; read it through `attention_weights`); with `weight_only` activations stay in
    `dtype` and the weights are expanded to it for the arithmetic. `num_nextn_predict_layers` counts
    multi-token-prediction modules, which hold weights in the checkpoint but are not run by default; `mtp_layers` are
    the layers of one module (empty: one more layer of the last kind). `learned_positions` is the length of a table of
    position embeddings (GPT-2). `hyper_connections` is the number of residual streams that mix before and after every
    block (DeepSeek-V4; 0: one plain stream). `other_params` counts what no field describes.
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
    attention_dtype: WeightDType | None = None
    expert_dtype: WeightDType = "bf16"
    weight_only: bool = False
    norm_bias: bool = False
    lm_head_bias: bool = False
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    mtp_layers: tuple[LayerGroup, ...] = ()
    learned_positions: int = Field(default=0, ge=0)
    hyper_connections: int = Field(default=0, ge=0)
    vision: VisionTower | None = None
    other_params: int = Field(default=0, ge=0)

    @property
    def attention_weights(self) -> str:
        """How the projections of attention and recurrent mixers are stored, a key of `WEIGHT_BYTES`."""
        return self.linear_dtype if self.attention_dtype is None else self.attention_dtype

    @property
    def num_hidden_layers(self) -> int:
        return sum(group.count for group in self.layers)
