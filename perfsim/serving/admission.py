"""From the queue into the batch: the head goes first, and nobody passes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfsim.serving.offload import FREED, GONE, NOTHING, Offload
from perfsim.serving.request import Request

if TYPE_CHECKING:
    from perfsim.serving.engine import Engine


_NO_LIMIT = 1 << 62


def admit(engine: Engine, budget: int, chunks: list[tuple[Request, int]]) -> None:
    """Admit from the queue while blocks, slots and `budget` tokens last; appends what runs now to `chunks`.

    vLLM's `Scheduler.schedule`, second half. Prompts with K/V from the KV tier go first.
    """
    waiting, running, most = engine.waiting, engine.running, engine.config.max_num_seqs
    while (waiting or engine.loaded) and budget > 0:
        if len(running) >= most:
            engine.blocked = True
            break
        if engine.offload is not None and engine.loaded:
            taken = _admit_loaded(engine, engine.offload, budget, chunks)
        elif engine.slots is not None and engine.skip_head(engine.adapters(chunks)):
            taken = 0
        elif (head := waiting.head()).remote:
            taken = 0 if _reserve(engine, head) else None
        else:
            taken = _admit_head(engine, head, budget, chunks)
        if taken is None:
            break
        budget -= taken
    if engine.skipped:
        engine.blocked = engine.blocked or not waiting  # until an adapter leaves, or somebody comes
        engine.unskip()
    if engine.offload is not None:
        engine.offload.looked()
        if engine.offload.delayed:
            engine.blocked = False  # ask again in the next step


def _admit_loaded(
    engine: Engine, offload: Offload, budget: int, chunks: list[tuple[Request, int]]
) -> int | None:  # fmt: skip
    """Tokens of the first prompt whose K/V have been loaded; None when it has to wait."""
    admitted = offload.admit(most=_share(engine), budget=budget, occupied=bool(engine.running))
    if admitted is None:
        engine.blocked = True
        return None
    _run(engine, *admitted, chunks)
    return admitted[1]


def _share(engine: Engine) -> int:
    """The most tokens of one prompt in a step."""
    threshold = engine.config.long_prefill_token_threshold
    crowd = len(engine.running) + len(engine.waiting) + engine.aside
    return threshold if threshold and crowd > 1 else _NO_LIMIT


def _admit_head(engine: Engine, request: Request, budget: int, chunks: list[tuple[Request, int]]) -> int | None:
    """Tokens of the head of the queue, 0 when it runs later but is off the queue; None when it has to wait."""
    config, kv = engine.config, engine.kv
    size, target = config.block_size, request.prompt + request.emitted
    hits, idle = kv.lookup(request, (target - 1) // size) if request.keys or request.run else (0, 0)
    if engine.offload is not None:
        verdict = engine.offload.fetch(
            request, hits, idle, prefilling=engine.prefilling, chunks=chunks, occupied=bool(engine.running)
        )
        if verdict != NOTHING:
            engine.blocked = verdict == FREED
            return 0 if verdict == GONE else None
    cached = hits * size
    chunk = target - cached
    if config.long_prefill_token_threshold:
        chunk = min(chunk, _share(engine))
    if chunk > budget:
        if not config.chunked_prefill:
            return None
        chunk = budget
    new = -(-(cached + chunk + config.lookahead) // size) - hits + request.beside
    whole = -(-target // size) - hits + request.beside if config.reserve_full_isl else 0
    room = kv.free - idle - (config.watermark_blocks if engine.running else 0)
    if whole > room or new > room:
        # Evicting what it would have hit may make a first chunk fit; a whole prompt waits for freed blocks.
        engine.blocked = whole > room if config.reserve_full_isl else not (request.keys or request.run)
        return None
    engine.waiting.take()
    if hits:
        kv.acquire(request, hits)
        engine.saved_tokens += cached
    else:
        request.run = None
    kv.take(new)
    request.computed = cached
    if request.scheduled < 0.0:
        request.scheduled = engine.now if engine.now > request.queued else request.queued
        request.cached = cached
    _run(engine, request, chunk, chunks)
    if request.keys:
        kv.commit(request, (cached + chunk) // size)
    return chunk


def _run(engine: Engine, request: Request, chunk: int, chunks: list[tuple[Request, int]]) -> None:
    engine.admissions += 1
    request.order = engine.admissions
    engine.running[request] = None
    engine.prefilling.append(request)
    chunks.append((request, chunk))


def _reserve(engine: Engine, request: Request) -> bool:
    """Set blocks aside for a prompt whose K/V come from elsewhere; False when it has to wait for blocks."""
    if not engine.set_aside(request):
        engine.blocked = True
        return False
    return True
