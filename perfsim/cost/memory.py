"""Where a GPU's memory goes, and how many KV blocks are left: vLLM's start-up arithmetic in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from typing import NamedTuple

from perfsim.errors import InfeasibleError
from perfsim.ops.cache import CacheDType, bounded_bytes, entry_bytes, growing_bytes
from perfsim.ops.lora import adapter_bytes
from perfsim.ops.params import absorbed_bytes_per_gpu, state_bytes_per_layer, weight_bytes_per_gpu
from perfsim.ops.speculation import drafter_bytes, with_drafter
from perfsim.spec.calibration import EngineProfile
from perfsim.spec.hardware import Accelerator
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    DenseMLP,
    LinearAttention,
    Mamba2,
    MixtureOfExperts,
    ModelArch,
    MultiHeadLatentAttention,
)
from perfsim.spec.policy import ParallelPlan, ServingPolicy
from perfsim.units import GB


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one GPU by use; `kv_blocks` blocks of `block_size` tokens, one of them vLLM's null block.

    A sequence holds one block per `block_size` tokens, `window_blocks` more whatever its length, and for every (most,
    groups) of `span_blocks`, a window or a chunk, as many per group as its tokens fill, at most `most`.
    """

    capacity: float
    weights: float
    activations: float
    runtime: float
    kv_cache: float
    kv_blocks: int
    window_blocks: int
    block_size: int
    span_blocks: tuple[tuple[int, int], ...]

    @property
    def usable_blocks(self) -> int:
        return self.kv_blocks - 1


def memory_plan(
    *, model: ModelArch, accelerator: Accelerator, parallel: ParallelPlan, engine: EngineProfile, policy: ServingPolicy
) -> MemoryPlan:
    """KV = utilization * (capacity - driver) - weights - peak activations - libraries, cut into whole blocks.

    As in vLLM's `determine_available_memory`. With the policy's `memory_rule` sglang the share is for weights and KV
    cache alone (`_profile_available_bytes` of SGLang 0.5.23's kv_cache_configurator.py) and what it leaves is all that
    activations have; with trtllm it is a share of what everything else leaves free (recalled, not read).
    `kv_cache_memory` replaces the sum, `kv_cache_blocks` the block count.
    Blocks and what a sequence holds beside them follow vLLM's hybrid KV cache manager, see `_cache_layout`. The
    policy's None fields must have been filled in.
    A drafter's layers count like the model's own; LoRA slots and what engines copy of MLA's weights like weights.
    Neglected: allocator fragmentation, CUDA graphs (vLLM captures them after sizing the cache), K/V of a separate draft
    model.
    Raises InfeasibleError, binding "HBM capacity", when weights and activations leave no room for the cache.
    """
    tp, pp = parallel.tp, parallel.pp
    tokens, seqs, longest = policy.max_num_batched_tokens, policy.max_num_seqs, policy.max_model_len
    if tokens is None or seqs is None or longest is None:
        raise ValueError("the policy is not resolved: load the scenario, or fill in its limits")
    held = with_drafter(model, policy.speculative)
    weights = _weight_bytes(model, held, parallel, policy)
    activations = _activation_bytes(model, tp, engine, tokens, seqs)
    runtime = engine.context_memory + (engine.communication_memory if parallel.gpus > 1 else 0.0)
    share, owned = policy.gpu_memory_utilization, accelerator.memory.capacity * (1.0 - engine.reserved_fraction)
    usable = share * owned
    if policy.memory_rule == "sglang":
        activations = min(activations, (1.0 - share) * (owned - runtime))
    room = _room(policy.memory_rule, share, weights, activations, runtime, owned=owned)
    copies = 2 if policy.enable_prefix_caching else 1
    block_size, block, states, spans = _cache_layout(
        held, tp, policy.block_size, policy.kv_cache_dtype, longest=longest, state_copies=copies
    )
    fewest = 2 + states + sum(groups for _, groups in spans)  # the null block, and a sequence of one block
    block *= -(-model.num_hidden_layers // pp) / model.num_hidden_layers  # of the fullest stage
    if room < fewest * block:
        raise InfeasibleError(
            f"{model.name} does not fit {accelerator.name} with tp={tp}: weights {weights / GB:.1f} GB, activations "
            f"{activations / GB:.1f} GB and runtime {runtime / GB:.1f} GB per GPU leave no KV cache in "
            f"{usable / GB:.1f} GB; HBM capacity binds, use more GPUs (tp) or a smaller model",
            binding="HBM capacity",
        )
    blocks = _blocks(policy, room, block=block, block_size=block_size, fewest=fewest)
    _check_capacity(accelerator, weights + activations + runtime + blocks * block, blocks)
    return MemoryPlan(
        accelerator.memory.capacity, weights, activations, runtime, blocks * block, blocks, states, block_size, spans
    )


def _weight_bytes(model: ModelArch, held: ModelArch, parallel: ParallelPlan, policy: ServingPolicy) -> float:
    """Bytes of one GPU that stay while the engine runs; `held` is the model with the layers of its drafter."""
    tp, pp = parallel.tp, parallel.pp
    weights = weight_bytes_per_gpu(held, tp=tp, dp=parallel.dp, ep=parallel.ep, pp=pp)
    weights += absorbed_bytes_per_gpu(held, tp=tp, pp=pp)
    weights += drafter_bytes(model, policy.speculative, tp=tp)
    if policy.lora is not None:
        weights += policy.lora.max_loras * adapter_bytes(model, policy.lora, tp=tp)
    return weights


def _blocks(policy: ServingPolicy, room: float, *, block: float, block_size: int, fewest: int) -> int:
    """Whole blocks of `block` bytes in `room` or what the policy sets instead; InfeasibleError below `fewest`."""
    available = room if policy.kv_cache_memory is None else policy.kv_cache_memory
    blocks = floor(available / block) if policy.kv_cache_blocks is None else policy.kv_cache_blocks
    if blocks < fewest:
        raise InfeasibleError(
            f"the KV cache holds {blocks} blocks of {block_size} tokens, a sequence needs at least {fewest}; "
            "policy.kv_cache_blocks or policy.kv_cache_memory binds",
            binding="KV cache size",
        )
    return blocks


def _check_capacity(accelerator: Accelerator, used: float, blocks: int) -> None:
    if used > accelerator.memory.capacity:
        raise InfeasibleError(
            f"a KV cache of {blocks:,} blocks makes {used / GB:.1f} GB per GPU, {accelerator.name} has "
            f"{accelerator.memory.capacity / GB:.1f} GB; HBM capacity binds",
            binding="HBM capacity",
        )


def _room(rule: str, share: float, weights: float, activations: float, runtime: float, *, owned: float) -> float:
    """Bytes for the KV cache; `owned` is what the driver leaves of the device."""
    if rule == "sglang":
        return share * (owned - runtime) - weights
    if rule == "trtllm":
        return share * (owned - weights - activations - runtime)
    return share * owned - weights - activations - runtime


def _activation_bytes(model: ModelArch, tp: int, engine: EngineProfile, tokens: int, seqs: int) -> float:
    """Peak of the profiling step: the widest layer's activations for every token, and the sampler's fp32 logits."""
    width = 0.0
    for group in model.layers:
        inner, mlp, mixer = 0.0, group.mlp, group.attention
        if isinstance(mlp, DenseMLP):
            inner = 2.0 * mlp.intermediate_size / tp
        elif isinstance(mlp, MixtureOfExperts):
            inner = 2.0 * (mlp.num_experts_per_tok * mlp.moe_intermediate_size + mlp.shared_intermediate_size) / tp
        if isinstance(mixer, LinearAttention | Mamba2):
            output = mixer.value_width if isinstance(mixer, LinearAttention) else mixer.inner_width
            inner = max(inner, (mixer.conv_width + output) / tp)
        width = max(width, inner + 2.0 * model.hidden_size)
    logits = engine.logit_copies * min(seqs, tokens) * model.vocab_size * 4.0
    return engine.activation_copies * tokens * width * ACTIVATION_BYTES[model.dtype] + logits


class _Layout(NamedTuple):
    block_size: int
    block_bytes: float
    state_blocks: int
    span_blocks: tuple[tuple[int, int], ...] = ()


def _cache_layout(
    model: ModelArch, tp: int, block_size: int, kv_cache_dtype: CacheDType, *, longest: int, state_copies: int
) -> _Layout:
    """Tokens and bytes of a block, the blocks of a sequence's states, and those of its windows and chunks.

    A block spans the layers whose cache grows with the context. What other layers keep is counted in the same blocks,
    per group of as many bytes, as in vLLM's `_get_kv_cache_groups_uniform_page_size`:

    - a window or chunk: at most the blocks that so many tokens can touch.
    - a recurrent state: one page per group of layers, two where prefix caching keeps a checkpoint beside it. Blocks
      grow until one layer's entries fill a page (vLLM's `_align_hybrid_block_size`). Neglected: checkpoints that stay.

    Without growing layers, recurrent models have blocks of `longest` tokens, a state each, and no checkpoints: no
    prefix is ever found (vLLM's `is_prefix_caching_supported` turns caching off for attention-free models). Windowed
    ones are charged as if they kept their whole context.
    """
    growing = entry = held = page = 0.0
    bounded: dict[int, float] = {}
    for group in model.layers:
        attention = group.attention
        entry = max(entry, entry_bytes(model, attention, tp=tp, kv_cache_dtype=kv_cache_dtype))
        growing += group.count * growing_bytes(model, group, tp=tp, kv_cache_dtype=kv_cache_dtype)
        size, bytes_per_token = bounded_bytes(model, attention, tp=tp, kv_cache_dtype=kv_cache_dtype)
        bounded[size] = bounded.get(size, 0.0) + group.count * bytes_per_token
        state = state_bytes_per_layer(model, group, tp=tp)
        held += group.count * state
        if isinstance(attention, LinearAttention | Mamba2):
            page = max(page, float(state))
    if not growing and any(bounded.values()):
        growing, bounded = sum(bounded.values()), {}
    if not growing:
        return _Layout(longest, held, 0)
    if page:
        latent = any(isinstance(group.attention, MultiHeadLatentAttention) for group in model.layers)
        step = max(block_size, 128 if latent else 16)
        block_size = max(block_size, step * _whole(page / (step * entry)))
    block = growing * block_size
    spans = tuple((ceil(size / block_size) + 1, _whole(kept / growing)) for size, kept in bounded.items() if kept)
    if not page:  # spans that are not summed up yet
        return _Layout(block_size, block, _whole(held / block), spans)
    layers = sum(group.count for group in model.layers if group.state is not None)
    return _Layout(block_size, block, state_copies * _whole(layers * block_size * entry / block), spans)


def _whole(amount: float) -> int:
    """The next whole number, rounding errors forgiven."""
    return ceil(amount - 1e-9)
