"""LoRA adapters of the running requests, and the slots on the GPU that hold the last ones used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection


class AdapterCounts:
    """How many sequences use each adapter; those without one (-1) are not counted."""

    __slots__ = ("counts", "sequences")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sequences = 0

    def join(self, adapter: int) -> None:
        self.counts[adapter] = self.counts.get(adapter, 0) + 1
        self.sequences += 1

    def leave(self, adapter: int) -> None:
        self.sequences -= 1
        left = self.counts[adapter] - 1
        if left:
            self.counts[adapter] = left
        else:
            del self.counts[adapter]


class AdapterSlots:
    """`slots` places on the GPU; an adapter that is in none of them is copied from the host into the oldest one's.

    The copy takes `load_s` and the step waits for it, as in vLLM (recalled: `LRUCacheWorkerLoRAManager` of
    vllm/lora/worker_manager.py). Adapters of the step itself stay: vLLM evicts in the order of its set, which may load
    one of them twice. Neglected: reading an adapter from storage when host memory does not hold it.
    """

    __slots__ = ("_held", "_load_s", "_slots", "loads")

    def __init__(self, slots: int, *, load_s: float) -> None:
        self._held: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._slots = slots
        self._load_s = load_s
        self.loads = 0

    def use(self, adapters: Collection[int]) -> float:
        """Seconds of loading before a step with these adapters, at most as many as there are slots."""
        held, missing = self._held, 0
        for adapter in sorted(adapters):
            if adapter in held:
                held.move_to_end(adapter)
            else:
                missing += 1
        for adapter in sorted(adapters):
            if adapter not in held:
                if len(held) == self._slots:
                    held.popitem(last=False)
                held[adapter] = None
            held.move_to_end(adapter)
        self.loads += missing
        return missing * self._load_s
