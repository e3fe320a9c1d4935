"""How one layer mixes tokens: softmax attention of three kinds, linear attention, Mamba-2. Shapes only, no physics.

Every kind answers the same three questions, so that nobody needs to know which it is: `reach` (which past entries one
token attends; None when it attends none), `state` (numbers that a sequence holds however long it is; None when it holds
none) and `window` (the raw tokens kept, as before).
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Spec


class Reach(NamedTuple):
    """Which cached entries the token at position t (t of them with itself) attends.

    Raw tokens: min(t, `window`), or those of its own `chunk` ((t - 1) mod chunk + 1), or all t when both are None and
    `compress_ratio` is 0. On top of a window, one summary per `compress_ratio` finished past tokens (0: none). Of
    what the window and the chunk do not limit, at most `top_k` entries: min(t, top_k) tokens, or
    min(t // compress_ratio, top_k) summaries. What picks them is the layer's `indexer`, which scans all of them.
    """

    window: int | None = None
    chunk: int | None = None
    compress_ratio: int = 0
    top_k: int | None = None

    @property
    def grows(self) -> bool:
        """Does a longer context cost more cache? A chunk does until it is full, and all raw tokens do."""
        return self.compress_ratio > 0 or (self.window is None and self.chunk is None)


class RecurrentState(NamedTuple):
    """What a sequence holds in a layer whatever its length: `recurrent` numbers in its `state_dtype`, `conv` ones (the
    last inputs of the causal convolution) in the activation dtype."""

    recurrent: int
    conv: int


class SparseIndexer(Spec):
    """A lightning indexer: cheap scores of all entries, of which the `top_k` best are attended (DeepSeek-V3.2-Exp, 2).

    `num_heads` query heads of `head_dim` score one shared key per entry. `block_size` > 1 scores every token but picks
    whole blocks (top_k counts tokens). `query_rank` is the width the queries are projected from (None: the hidden
    state). `shared` layers take the choice of an earlier layer: no weights, no key cache, no scan.
    `fp8_keys`: keys are cached as fp8 with one fp32 scale per 128 (vLLM), else in the activation dtype.
    """

    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    top_k: int = Field(gt=0)
    block_size: int = Field(default=1, gt=0)
    query_rank: int | None = Field(default=None, gt=0)
    head_weights: bool = True
    key_norm: Literal["layer", "rms", "both"] = "layer"
    shared: bool = False
    fp8_keys: bool = True


OutputGate = Literal["element", "head"]


class GroupedQueryAttention(Spec):
    """Softmax attention with `num_key_value_heads` shared K/V heads (MHA when equal to the query heads).

    `window` limits how many past tokens one token attends, itself included (None: all of them); with `chunk` it attends
    within its own chunk of so many tokens only (Llama 4). `v_head_dim` differs from `head_dim` in MiMo-V2.
    `shared_key_value`: V is computed from K's projection (Gemma 4: no V weights; the cache still holds both).
    `output_gate`: the output is multiplied by a sigmoid of the input, per element or per head. `qk_norm`: weights of
    one head's width, or of all heads' (MiniMax-M2); norms without weights don't count.
    """

    kind: Literal["gqa"] = "gqa"
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    v_head_dim: int | None = Field(default=None, gt=0)
    window: int | None = Field(default=None, gt=0)
    chunk: int | None = Field(default=None, gt=0)
    indexer: SparseIndexer | None = None
    shared_key_value: bool = False
    output_gate: OutputGate | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["head", "all_heads"] | None = None
    sinks: bool = False

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if sum(limit is not None for limit in (self.window, self.chunk, self.indexer)) > 1:
            raise ValueError("at most one of window, chunk and indexer may limit what a token attends")
        return self

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def reach(self) -> Reach:
        return Reach(window=self.window, chunk=self.chunk, top_k=self.indexer.top_k if self.indexer else None)

    @property
    def state(self) -> None:
        return None


class MultiHeadLatentAttention(Spec):
    """DeepSeek's MLA: K and V are re-expanded from one latent of `kv_lora_rank` plus a shared rotary key.

    With an `indexer` (DeepSeek-V3.2, GLM-5) a token attends the `top_k` best past tokens.
    """

    kind: Literal["mla"] = "mla"
    num_attention_heads: int = Field(gt=0)
    q_lora_rank: int | None = Field(gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    window: None = None
    indexer: SparseIndexer | None = None
    output_gate: OutputGate | None = None

    @property
    def reach(self) -> Reach:
        return Reach(top_k=self.indexer.top_k if self.indexer else None)

    @property
    def state(self) -> None:
        return None


class CompressedAttention(Spec):
    """DeepSeek-V4's attention: one K=V head of `head_dim`, a sliding window of raw tokens, and learned summaries.

    One summary entry per `compress_ratio` tokens (0: window only). With an `indexer` (compressed sparse attention) the
    `top_k` best summaries are attended and each mixes two overlapping spans; without (heavily compressed attention) all
    are. Queries come from a rank-`q_lora_rank` projection; the output is projected per group of heads to `o_lora_rank`,
    then to the hidden size. Every head has a sink. The spans that are not summarised yet are a state: values and scores
    of their tokens, in fp32 (vLLM's CompressorStateCache).
    """

    kind: Literal["compressed"] = "compressed"
    num_attention_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    q_lora_rank: int = Field(gt=0)
    o_lora_rank: int = Field(gt=0)
    o_groups: int = Field(gt=0)
    window: int = Field(gt=0)
    compress_ratio: int = Field(default=0, ge=0)
    indexer: SparseIndexer | None = None
    state_dtype: Literal["fp32"] = "fp32"

    @model_validator(mode="after")
    def _indexer_has_summaries(self) -> Self:
        if self.indexer is not None and not self.compress_ratio:
            raise ValueError("an indexer picks summaries: compress_ratio must not be 0")
        return self

    @property
    def overlap(self) -> int:
        """How many spans a token belongs to: two with an indexer, whose summaries overlap."""
        return 1 if self.indexer is None else 2

    @property
    def reach(self) -> Reach:
        top_k = self.indexer.top_k if self.indexer else None
        return Reach(window=self.window, compress_ratio=self.compress_ratio, top_k=top_k)

    @property
    def state(self) -> RecurrentState | None:
        if not self.compress_ratio:
            return None
        width = self.head_dim + (self.indexer.head_dim if self.indexer else 0)
        return RecurrentState(self.overlap * self.compress_ratio * 2 * self.overlap * width, 0)


class LinearAttention(Spec):
    """The gated delta rule: a matrix per value head instead of a KV cache (arXiv:2412.06464; KDA: arXiv:2510.26692).

    A short causal convolution over Q, K and V, then per value head a state of `key_head_dim` x `value_head_dim`.
    `decay`: forgetting per head (Gated DeltaNet: one input-dependent number) or per channel (KDA: from a projection
    through `decay_rank`). The output gate is full (`gate_rank` None) or goes through `gate_rank`.
    """

    kind: Literal["linear"] = "linear"
    num_key_heads: int = Field(gt=0)
    num_value_heads: int = Field(gt=0)
    key_head_dim: int = Field(gt=0)
    value_head_dim: int = Field(gt=0)
    conv_kernel: int = Field(gt=0)
    decay: Literal["head", "channel"] = "head"
    decay_rank: int | None = Field(default=None, gt=0)
    gate_rank: int | None = Field(default=None, gt=0)
    state_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    window: None = None

    @property
    def key_width(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_width(self) -> int:
        return 2 * self.key_width + self.value_width

    @property
    def reach(self) -> None:
        return None

    @property
    def state(self) -> RecurrentState:
        matrix = self.num_value_heads * self.key_head_dim * self.value_head_dim
        return RecurrentState(matrix, self.conv_width * (self.conv_kernel - 1))


class Mamba2(Spec):
    """A Mamba-2 mixer (arXiv:2405.21060): per head a state of `head_dim` x `state_size`, B and C shared per group."""

    kind: Literal["mamba2"] = "mamba2"
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    n_groups: int = Field(gt=0)
    state_size: int = Field(gt=0)
    conv_kernel: int = Field(gt=0)
    proj_bias: bool = False
    conv_bias: bool = True
    state_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    window: None = None

    @property
    def inner_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        return self.inner_width + 2 * self.n_groups * self.state_size

    @property
    def reach(self) -> None:
        return None

    @property
    def state(self) -> RecurrentState:
        return RecurrentState(self.inner_width * self.state_size, self.conv_width * (self.conv_kernel - 1))


Attention = Annotated[
    GroupedQueryAttention | MultiHeadLatentAttention | CompressedAttention | LinearAttention | Mamba2,
    Field(discriminator="kind"),
]
