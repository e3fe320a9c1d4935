"""Records what vLLM's CPUOffloadingManager decides under random use: `python record.py cases.jsonl`.

Runs beside an installed vLLM 0.32 (its CPU build will do) and imports nothing of perfsim. One line per case: the
capacity in chunks and what happened, an operation a list:

  ["new", request, [key of each chunk]]          a prompt; equal keys are equal chunks with equal chunks before them
  ["look", request, start, found]                consecutive chunks from `start` on; null: one of them is being stored
  ["load", request, start, stop]                 these chunks are being loaded
  ["offer", request, stop, [stored], [evicted]]  the chunks up to `stop` not offered yet; nulls: there was no room
  ["stored", request], ["loaded", request]       the oldest store, the oldest load has ended
  ["finish", request]                            its chunks become recent
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

CASES, OPERATIONS = 40, 160


class Case:
    """One manager under random use."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.capacity = self.draw.choice([4, 9, 16, 30, 60])
        self.manager = CPUOffloadingManager(num_chunks=self.capacity)
        self.log: list[list[Any]] = []
        self.keys: list[list[int]] = []
        self.contexts: list[ReqContext] = []
        self.offered: list[int] = []
        self.open: list[int] = []
        self.stores: list[tuple[int, list[Any]]] = []
        self.loads: list[tuple[int, list[Any]]] = []
        self.names: dict[tuple[int, ...], int] = {}
        self.spelled: dict[Any, int] = {}

    def run(self) -> dict[str, Any]:
        """Use the manager at random."""
        for _ in range(OPERATIONS):
            choices = [self.new]
            if self.open:
                choices += [self.offer, self.offer, self.look, self.finish]
            if self.stores:
                choices += [self.stored, self.stored]
            if self.loads:
                choices += [self.loaded]
            self.draw.choice(choices)()
        return {"chunks": self.capacity, "operations": self.log}

    def new(self) -> None:
        """A prompt of up to 14 chunks whose beginning it may share; what is alone at its end is nobody else's."""
        path = tuple(self.draw.choice([0, 0, 1]) for _ in range(self.draw.randint(0, 10)))
        alone = tuple(-1 - len(self.keys) for _ in range(self.draw.randint(0, 4)))
        whole = path + alone
        keys = [self.names.setdefault(whole[: end + 1], len(self.names)) for end in range(len(whole))]
        self.open.append(len(self.keys))
        self.log.append(["new", len(self.keys), keys])
        self.keys.append(keys)
        context = ReqContext(req_id=str(len(self.contexts)))
        for end, key in enumerate(keys):
            context.set_offload_key_position(self.key(key), end + 1)
        self.manager.on_new_request(context)
        self.contexts.append(context)
        self.offered.append(0)

    def key(self, name: int) -> Any:
        """vLLM's key of a chunk."""
        key = make_offload_key(name.to_bytes(8, "big"), 0)
        self.spelled[key] = name
        return key

    def busy(self, request: int) -> bool:
        return any(other == request for other, _ in (*self.stores, *self.loads))

    def look(self) -> None:
        """The connector's prefix lookup; half of the hits are loaded."""
        request = self.draw.choice(self.open)
        if self.busy(request):
            return
        keys, context = self.keys[request], self.contexts[request]
        start = self.draw.randint(0, len(keys))
        found, pending = 0, False
        for key in keys[start:]:
            answer = self.manager.lookup(self.key(key), context)
            if answer is LookupResult.MISS:
                break
            found += 1
            pending = pending or answer is LookupResult.HIT_PENDING
        self.log.append(["look", request, start, None if pending else found])
        hits = [self.key(key) for key in keys[start : start + found]]
        if not pending and found and self.draw.random() < 0.7:
            self.manager.prepare_load(hits, context)
            self.offered[request] = start + found
            self.loads.append((request, hits))
            self.log.append(["load", request, start, start + found])

    def offer(self) -> None:
        """Some more of a prompt has been computed."""
        request = self.draw.choice(self.open)
        first = self.offered[request]
        if first >= len(self.keys[request]) or any(other == request for other, _ in self.loads):
            return
        stop = self.draw.randint(first + 1, len(self.keys[request]))
        keys = [self.key(key) for key in self.keys[request][first:stop]]
        answer = self.manager.prepare_store(keys, self.contexts[request])
        if answer is None:
            self.log.append(["offer", request, stop, None, None])
            return
        self.offered[request] = stop
        stored, evicted = ([self.spelled[key] for key in some] for some in (answer.keys_to_store, answer.evicted_keys))
        self.log.append(["offer", request, stop, stored, evicted])
        if stored:
            self.stores.append((request, list(answer.keys_to_store)))

    def stored(self) -> None:
        """The oldest store has ended."""
        request, keys = self.stores.pop(0)
        self.manager.complete_store(keys, self.contexts[request])
        self.log.append(["stored", request])

    def loaded(self) -> None:
        """The oldest load has ended."""
        request, keys = self.loads.pop(0)
        self.manager.complete_load(keys, self.contexts[request])
        self.log.append(["loaded", request])

    def finish(self) -> None:
        """A request is done; not while it loads."""
        request = self.draw.choice(self.open)
        if any(other == request for other, _ in self.loads):
            return
        self.open.remove(request)
        self.manager.on_request_finished(self.contexts[request])
        self.log.append(["finish", request])


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        for seed in range(CASES):
            out.write(json.dumps(Case(seed).run(), separators=(",", ":")) + "\n")
