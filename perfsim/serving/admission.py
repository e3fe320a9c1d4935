"""From the queue into the batch: the head goes first, and nobody passes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfsim.serving.request import Request

if TYPE_CHECKING:
    from perfsim.serving.engine import Engine


def admit(engine: Engine, budget: int, chunks: list[tuple[Request, int]]) -> None:
    """Admit from the queue while blocks, slots and `budget` tokens last; appends what runs now to `chunks`.

    vLLM's `Scheduler.schedule`, second half.
    """
    _admit(engine, budget, chunks)
    if engine.skipped:
        engine.blocked = engine.blocked or not engine.waiting  # until an adapter leaves, or somebody comes
        engine.unskip()


def _admit(engine: Engine, budget: int, chunks: list[tuple[Request, int]]) -> None:
    config, kv, waiting, running = engine.config, engine.kv, engine.waiting, engine.running
    size = config.block_size
    while waiting and budget > 0:
        if len(running) >= config.max_num_seqs:
            engine.blocked = True
            return
        request = waiting.head()
        skipped = engine.slots is not None and engine.skip_head(engine.adapters(chunks))
        if skipped or (request.remote and _reserve(engine, request)):
            continue
        if request.remote:
            return
        target = request.prompt + request.emitted
        hits, idle = kv.lookup(request, (target - 1) // size) if request.keys or request.run else (0, 0)
        cached = hits * size
        chunk = target - cached
        if config.long_prefill_token_threshold and len(running) + len(waiting) + engine.aside > 1:
            chunk = min(chunk, config.long_prefill_token_threshold)
        if chunk > budget:
            if not config.chunked_prefill:
                return
            chunk = budget
        new = -(-(cached + chunk + config.lookahead) // size) - hits + request.beside
        whole = -(-target // size) - hits + request.beside if config.reserve_full_isl else 0
        room = kv.free - idle - (config.watermark_blocks if running else 0)
        if whole > room or new > room:
            # Evicting what it would have hit may make a first chunk fit; a whole prompt waits for freed blocks.
            engine.blocked = whole > room if config.reserve_full_isl else not (request.keys or request.run)
            return
        waiting.take()
        if hits:
            kv.acquire(request, hits)
            engine.saved_tokens += cached
        else:
            request.run = None
        kv.take(new)
        request.computed = cached
        if request.scheduled < 0.0:
            request.scheduled = max(engine.now, request.queued)
            request.cached = cached
        engine.admissions += 1
        request.order = engine.admissions
        running[request] = None
        engine.prefilling.append(request)
        chunks.append((request, chunk))
        budget -= chunk
        if request.keys:
            kv.commit(request, (cached + chunk) // size)


def _reserve(engine: Engine, request: Request) -> bool:
    """Set blocks aside for a prompt whose K/V come from elsewhere; False when it has to wait for blocks."""
    if not engine.set_aside(request):
        engine.blocked = True
        return False
    return True
