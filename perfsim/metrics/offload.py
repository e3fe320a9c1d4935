"""What the KV tier in host memory did, over all schedulers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfsim.serving.front import EngineFront


def offload_metrics(engines: Sequence[EngineFront], *, prompt_tokens: int) -> dict[str, Any]:
    """Hits, transfers and occupancy of all tiers together; empty without a tier.

    `prompt_tokens` are those of completed requests.
    """
    tiers = [engine.offload.tier for engine in engines if engine.offload is not None]
    if not tiers:
        return {}
    loads, stores = sum(tier.loads.count for tier in tiers), sum(tier.stores.count for tier in tiers)
    chunks = sum(tier.plan.chunks for tier in tiers)
    loaded_tokens = sum(engine.loaded_tokens for engine in engines)
    return {
        "kv_offload": {
            "hit_tokens": loaded_tokens,
            "hit_rate": loaded_tokens / prompt_tokens if prompt_tokens else None,
            "loads": loads,
            "loaded_bytes": sum(tier.loads.blocks * tier.plan.load_bytes for tier in tiers),
            "mean_load_s": sum(tier.loads.latency for tier in tiers) / loads if loads else None,
            "load_busy_s": sum(tier.loads.seconds for tier in tiers),
            "stores": stores,
            "stored_bytes": sum(tier.stores.blocks * tier.plan.store_bytes for tier in tiers),
            "mean_store_s": sum(tier.stores.latency for tier in tiers) / stores if stores else None,
            "store_busy_s": sum(tier.stores.seconds for tier in tiers),
            "crowded_out": sum(engine.offload.crowded_out for engine in engines if engine.offload is not None),
            "evicted_fraction": _share(sum(tier.evicted for tier in tiers), sum(tier.stored for tier in tiers)),
            "occupancy": _share(chunks - sum(tier.free for tier in tiers), chunks),
            "capacity_tokens": sum(
                tier.plan.chunks * tier.plan.chunk_blocks * tier.block_size for tier in tiers
            ),
        }
    }  # fmt: skip


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
