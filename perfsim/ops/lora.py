"""Low-rank adapters beside the base weights: what their kernels do in one step, and what an adapter weighs.

Every projection gets y += x A B with A of (inputs x rank) and B of (rank x outputs): a shrink and an expand kernel that
read the weights of each distinct adapter of the batch once (Punica's SGMV, arXiv:2310.18547, 4; S-LoRA,
arXiv:2311.03285). As in vLLM (recalled: `vllm/lora/layers`) fused projections have one A per part, kernels and slots
have the engine's largest rank, and under tensor parallelism the sharded dimension alone is divided, so that nothing is
exchanged. Adapters are in the activation format, on the attention and dense feed-forward projections of every layer.
Neglected: adapters on routed experts, embedding and head; lower ranks, which would be padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from perfsim.errors import InputError
from perfsim.ops.op import Op
from perfsim.ops.step import StepShape
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    MixtureOfExperts,
    ModelArch,
)
from perfsim.spec.policy import LoraServing

COMPONENT = "lora"


class Projection(NamedTuple):
    """A projection of one layer on one GPU; `parts` are fused in it."""

    name: str
    inputs: float
    outputs: float
    parts: int


def projections(model: ModelArch, group: LayerGroup, *, tp: int) -> Iterator[Projection]:
    """What adapters act on in one layer of `group`, on one of `tp` GPUs.

    Raises InputError for attention other than multi-head and grouped-query attention.
    """
    attention, mlp, hidden = group.attention, group.mlp, float(model.hidden_size)
    if isinstance(attention, GroupedQueryAttention):
        heads, kv_heads = attention.num_attention_heads / tp, max(1.0, attention.num_key_value_heads / tp)
        value = 0 if attention.shared_key_value else attention.value_dim
        columns = heads * attention.head_dim + kv_heads * (attention.head_dim + value)
        yield Projection("qkv", hidden, columns, 2 if attention.shared_key_value else 3)
        yield Projection("o", heads * attention.value_dim, hidden, 1)
    elif attention is not None:
        raise InputError(f"policy.lora: adapters on the {attention.kind} attention of {model.name} are not modelled")
    width, gated = 0.0, False
    if isinstance(mlp, DenseMLP):
        width, gated = mlp.intermediate_size / tp, mlp.gated
    elif isinstance(mlp, MixtureOfExperts):
        width, gated = mlp.shared_intermediate_size / tp, mlp.gated
    if width:
        yield Projection("up", hidden, width * (2 if gated else 1), 2 if gated else 1)
        yield Projection("down", width, hidden, 1)


def adapter_bytes(model: ModelArch, lora: LoraServing, *, tp: int) -> float:
    """Bytes of one adapter slot on each of `tp` GPUs."""
    numbers = 0.0
    for group in model.layers:
        for projection in projections(model, group, tp=tp):
            numbers += group.count * (projection.parts * projection.inputs + projection.outputs)
    return numbers * lora.max_lora_rank * ACTIVATION_BYTES[model.dtype]


def adapter_tensors(model: ModelArch) -> int:
    """Tensors of one adapter, each copied to the device on its own: an A and a B per part of a projection."""
    return sum(2 * group.count * part.parts for group in model.layers for part in projections(model, group, tp=1))


def lora_ops(model: ModelArch, step: StepShape, lora: LoraServing | None, *, tp: int) -> Iterator[Op]:
    """Shrink and expand kernels of one step on one GPU; not launched when no token has an adapter."""
    if lora is None:
        return
    act, rank = ACTIVATION_BYTES[model.dtype], lora.max_lora_rank
    tokens, adapters = step.lora_tokens, step.lora_adapters
    active = np.minimum(adapters, 1.0)
    for group in model.layers:
        for name, inputs, outputs, parts in projections(model, group, tp=tp):
            wide = parts * rank
            yield Op(
                "gemm", f"lora_shrink_{name}", group.count, tokens * (2.0 * inputs * wide),
                adapters * (inputs * wide * act) + tokens * (inputs * act), tokens * (wide * act), model.dtype,
                driver="adapters", active=active, part=COMPONENT,
            )  # fmt: skip
            yield Op(  # adds to the projection's output: it is read and written again
                "gemm", f"lora_expand_{name}", group.count, tokens * (2.0 * rank * outputs),
                adapters * (rank * outputs * act) + tokens * ((wide + outputs) * act), tokens * (outputs * act),
                model.dtype, driver="adapters", active=active, part=COMPONENT,
            )  # fmt: skip
