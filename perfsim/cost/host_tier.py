"""What a KV tier in the host's DRAM holds, and how fast K/V go there and back."""

from __future__ import annotations

from dataclasses import dataclass

from perfsim.errors import InputError
from perfsim.ops.cache import growing_bytes
from perfsim.spec.model import ModelArch, MultiHeadLatentAttention
from perfsim.spec.scenario import Scenario
from perfsim.units import GB


@dataclass(frozen=True, slots=True)
class TierPlan:
    """The tier of one scheduler: `chunks` chunks of `chunk_blocks` engine blocks.

    A transfer of n blocks takes setup + n * load_s (store_s) seconds and moves n * load_bytes (store_bytes) bytes, all
    GPUs of the scheduler together.
    """

    chunks: int
    chunk_blocks: int
    load_s: float
    store_s: float
    load_bytes: float
    store_bytes: float
    setup: float


def tier_plan(scenario: Scenario, *, block_size: int) -> TierPlan | None:
    """The KV tier of one scheduler of a replica of `scenario`; None without one. `block_size` tokens are a block.

    As in vLLM's `CPUOffloadingSpec` (`vllm/v1/kv_offload/cpu/spec.py`, 0.32) the capacity is for all GPUs of the
    replica together, of which every data-parallel rank has its share; a latent that all tensor-parallel ranks of one
    node keep is there once, and written by one of them. Every GPU reads its part over its own link to the host, no
    faster than its share of the DRAM's bandwidth; a transfer's set-up is the link's latency. Neglected: alignment of
    chunks, what layers with a window keep, a CPU that is farther away. Raises InputError where the tier is not
    modelled, for a `block_size` that is no multiple of the engine's, and for more DRAM than the nodes have.
    """
    offload, node, parallel = scenario.policy.kv_offload, scenario.hardware, scenario.parallel
    if offload is None:
        return None
    where = "policy.kv_offload"
    if parallel.pp > 1 or scenario.policy.lora is not None:
        other = "parallel.pp > 1" if parallel.pp > 1 else "policy.lora"
        raise InputError(f"{where}: not modelled together with {other}; leave one of them out")
    size = block_size if offload.block_size is None else offload.block_size
    if size % block_size:
        raise InputError(f"{where}.block_size: expected a multiple of the engine's {block_size} tokens, got {size}")
    nodes = -(-parallel.gpus // node.accelerator_count)
    if node.dram is not None and offload.capacity > nodes * node.dram.capacity:
        raise InputError(
            f"{where}.capacity: expected at most the {nodes * node.dram.capacity / GB:,.0f} GB of DRAM that the hosts "
            f"of a replica have, got {offload.capacity / GB:,.0f} GB"
        )
    per_gpu = block_size * _token_bytes(scenario)
    once = parallel.tp > 1 and parallel.tp <= node.accelerator_count and _latent_only(scenario.model)
    writers = 1 if once else parallel.tp
    read = write = node.host_link.bandwidth
    if node.dram is not None:
        read = min(read, node.dram.read_bandwidth / node.accelerator_count)
        write = min(write, node.dram.write_bandwidth / node.accelerator_count)
    blocks = size // block_size
    return TierPlan(
        chunks=int(offload.capacity / parallel.dp // (blocks * per_gpu * writers)),
        chunk_blocks=blocks,
        load_s=per_gpu / read,
        store_s=per_gpu / write,
        load_bytes=per_gpu * parallel.tp,
        store_bytes=per_gpu * writers,
        setup=node.host_link.latency,
    )


def _token_bytes(scenario: Scenario) -> float:
    """Bytes that a token keeps on one GPU; InputError for recurrent states, which prefixes cannot be cut from."""
    model, dtype, tp = scenario.model, scenario.policy.kv_cache_dtype, scenario.parallel.tp
    growing = sum(group.count * growing_bytes(model, group, tp=tp, kv_cache_dtype=dtype) for group in model.layers)
    if not growing or any(group.state is not None for group in model.layers):
        raise InputError(
            f"policy.kv_offload: expected a model that keeps K/V of all its tokens and no states, got {model.name}"
        )
    return growing


def _latent_only(model: ModelArch) -> bool:
    return all(
        group.attention is None or isinstance(group.attention, MultiHeadLatentAttention) for group in model.layers
    )
