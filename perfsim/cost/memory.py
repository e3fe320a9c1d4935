"""Where a GPU's memory goes, and how many KV blocks are left: vLLM's start-up arithmetic in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from perfsim.errors import InfeasibleError
from perfsim.ops.params import kv_bytes_per_token_per_gpu, kv_bytes_per_token_per_layer, weight_bytes_per_gpu
from perfsim.spec.calibration import EngineProfile
from perfsim.spec.hardware import Accelerator
from perfsim.spec.model import ACTIVATION_BYTES, DenseMLP, ModelArch
from perfsim.spec.policy import ParallelPlan
from perfsim.units import GB


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one GPU by use; `kv_blocks` blocks of `block_size` tokens, one of them vLLM's null block."""

    capacity: float
    weights: float
    activations: float
    runtime: float
    kv_cache: float
    kv_blocks: int
    window_blocks: int

    @property
    def usable_blocks(self) -> int:
        return self.kv_blocks - 1


def memory_plan(
    *, model: ModelArch, accelerator: Accelerator, parallel: ParallelPlan, engine: EngineProfile,
    max_num_batched_tokens: int, max_num_seqs: int, gpu_memory_utilization: float, block_size: int,
    kv_cache_blocks: int | None = None, kv_cache_memory: float | None = None,
) -> MemoryPlan:  # fmt: skip
    """KV = utilization * (capacity - driver) - weights - peak activations - libraries, cut into whole blocks.

    As in vLLM's `determine_available_memory`; `kv_cache_memory` replaces the sum, `kv_cache_blocks` the block count.
    A model that mixes full and windowed layers keeps blocks per attention group, as vLLM's hybrid KV cache manager
    does: a block spans the layers of one group, and a sequence holds `window_blocks` more for its windows.
    A model with windowed layers only is charged as if it kept its whole context.
    Neglected: allocator fragmentation, CUDA graphs (vLLM captures them after sizing the cache).
    Raises InfeasibleError, binding "HBM capacity", when weights and activations leave no room for the cache.
    """
    tp, pp = parallel.tp, parallel.pp
    weights = weight_bytes_per_gpu(model, tp=tp, dp=parallel.dp, ep=parallel.ep, pp=pp)
    activations = _activation_bytes(model, tp, engine, max_num_batched_tokens, max_num_seqs)
    runtime = engine.context_memory + (engine.communication_memory if parallel.gpus > 1 else 0.0)
    usable = gpu_memory_utilization * accelerator.memory.capacity * (1.0 - engine.reserved_fraction)
    room = usable - weights - activations - runtime
    per_token, windows = _kv_layout(model, tp, block_size)
    per_token *= -(-model.num_hidden_layers // pp) / model.num_hidden_layers  # of the fullest stage
    least = (2 + windows) * per_token * block_size
    if room < least:
        raise InfeasibleError(
            f"{model.name} does not fit {accelerator.name} with tp={tp}: weights {weights / GB:.1f} GB, activations "
            f"{activations / GB:.1f} GB and runtime {runtime / GB:.1f} GB per GPU leave no KV cache in "
            f"{usable / GB:.1f} GB; HBM capacity binds, use more GPUs (tp) or a smaller model",
            binding="HBM capacity",
        )
    available = room if kv_cache_memory is None else kv_cache_memory
    blocks = floor(available / (per_token * block_size)) if kv_cache_blocks is None else kv_cache_blocks
    if blocks < 2 + windows:
        raise InfeasibleError(
            f"the KV cache holds {blocks} blocks of {block_size} tokens, a sequence needs at least {2 + windows}; "
            "policy.kv_cache_blocks or policy.kv_cache_memory binds",
            binding="KV cache size",
        )
    used = weights + activations + runtime + blocks * per_token * block_size
    if used > accelerator.memory.capacity:
        raise InfeasibleError(
            f"a KV cache of {blocks:,} blocks makes {used / GB:.1f} GB per GPU, {accelerator.name} has "
            f"{accelerator.memory.capacity / GB:.1f} GB; HBM capacity binds",
            binding="HBM capacity",
        )
    return MemoryPlan(
        accelerator.memory.capacity, weights, activations, runtime, blocks * per_token * block_size, blocks, windows
    )


def _activation_bytes(model: ModelArch, tp: int, engine: EngineProfile, tokens: int, seqs: int) -> float:
    """Peak of the profiling step: the widest layer's activations for every token, and the sampler's fp32 logits."""
    width = 0.0
    for group in model.layers:
        mlp = group.mlp
        if isinstance(mlp, DenseMLP):
            inner = 2.0 * mlp.intermediate_size / tp
        else:
            inner = 2.0 * (mlp.num_experts_per_tok * mlp.moe_intermediate_size + mlp.shared_intermediate_size) / tp
        width = max(width, inner + 2.0 * model.hidden_size)
    logits = engine.logit_copies * min(seqs, tokens) * model.vocab_size * 4.0
    return engine.activation_copies * tokens * width * ACTIVATION_BYTES[model.dtype] + logits


def _kv_layout(model: ModelArch, tp: int, block_size: int) -> tuple[float, int]:
    """(KV bytes per token of one block, extra blocks that each sequence holds for windowed layers)."""
    full = kv_bytes_per_token_per_gpu(model, tp=tp)
    layers: dict[int | None, int] = {}
    for group in model.layers:
        layers[group.attention.window] = layers.get(group.attention.window, 0) + group.count
    unlimited = layers.pop(None, 0)
    if not layers:
        return full, 0
    if not unlimited:  # vLLM frees what has left the window; here such a sequence keeps all of it
        everything = sum(group.count * kv_bytes_per_token_per_layer(model, group, tp=tp) for group in model.layers)
        return everything, 0
    extra = 0
    for window, count in layers.items():
        if window is not None:
            extra += ceil(count / unlimited) * (ceil(window / block_size) + 1)
    return full, extra
