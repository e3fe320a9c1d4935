"""Tokens and blocks for the running requests of a step: all at once, or one by one in vLLM's order when it matters."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from perfsim.serving.admission import admit
from perfsim.serving.request import Request
from perfsim.serving.speculative_batch import SpeculativeBatch

if TYPE_CHECKING:
    from perfsim.serving.engine import Engine

Chunks = list[tuple[Request, int]]


def schedule_running(engine: Engine) -> tuple[Chunks, list[Request], bool]:
    """(prefill chunks, decodes that get no token in this step, whether anyone was preempted)."""
    if not engine.config.mixed_steps:
        chunks = schedule_alone(engine)
        if chunks:
            decodes = [request for request in engine.running if request.decoding and request.finish < 0.0]
            for request in decodes:
                engine.stall(request)
            return chunks, decodes, False
    together = schedule_together(engine)
    return schedule_in_order(engine) if together is None else (together, [], False)


def schedule_alone(engine: Engine) -> Chunks:
    """Chunks of a step without decodes: of prompts that run already, then of those that are admitted.

    As SGLang's scheduler asks for a prefill batch before every step (`get_next_batch_to_run`). Where a running prompt
    finds no blocks there is none, and decodes go on.
    """
    kv, config, size = engine.kv, engine.config, engine.config.block_size
    chunks: Chunks = []
    budget = config.max_num_batched_tokens
    for request in engine.prefilling:
        tokens = min(request.prompt + request.emitted - request.computed, budget)
        slots = request.computed + config.lookahead
        need = -(-(slots + tokens) // size) - -(-slots // size)
        if not tokens or need > kv.free:
            return chunks
        kv.take(need)
        if request.keys:
            kv.commit(request, (request.computed + tokens) // size)
        chunks.append((request, tokens))
        budget -= tokens
    if engine.waiting and budget > 0 and (chunks or not engine.blocked):
        admit(engine, budget, chunks)
    return chunks


def schedule_together(engine: Engine) -> Chunks | None:
    """Blocks for all running requests at once, and the prefill chunks; None when order or preemption may matter.

    Order matters when the budget cannot serve everyone, and when taking blocks evicts what a prefill is about to
    share; not if the prefills come last anyway.
    """
    kv, batch, config = engine.kv, engine.batch, engine.config
    need = total = batch.new_blocks()
    budget = config.max_num_batched_tokens - batch.tokens
    if budget < 0 or need > kv.free:
        return None
    if not engine.prefilling:
        if need:
            kv.take(need)
        return []
    size, chunks, needs = batch.block_size, [], []
    last = engine.prefilling == list(islice(reversed(engine.running), len(engine.prefilling)))[::-1]
    for request in engine.prefilling:
        tokens = request.prompt + request.emitted - request.computed
        if config.long_prefill_token_threshold and len(engine.running) + len(engine.waiting) + engine.aside > 1:
            tokens = min(tokens, config.long_prefill_token_threshold)
        if tokens > budget:
            if not last or budget <= 0:
                return None
            tokens = budget
        budget -= tokens
        slots = request.computed + config.lookahead
        needs.append(-(-(slots + tokens) // size) - -(-slots // size))
        total += needs[-1]
        chunks.append((request, tokens))
    if total > kv.blank and not last:
        return None
    if total > kv.free:
        return None
    if need:
        kv.take(need)
    for (request, tokens), blocks in zip(chunks, needs, strict=True):
        kv.take(blocks)
        if request.keys:
            kv.commit(request, (request.computed + tokens) // size)
    return chunks


def schedule_in_order(engine: Engine) -> tuple[Chunks, list[Request], bool]:
    """Give every running request its tokens and blocks, preempting the last (or least urgent) ones when blocks run out.

    Returns (prefill chunks, decodes that get no token in this step, whether anyone was preempted). Decodes
    left out have been taken off the engine's sums. vLLM's `Scheduler.schedule`, first half. Under async scheduling it
    does not know yet who has ended with the step in flight: they get nothing, but they can be preempted.
    """
    config, kv, size = engine.config, engine.kv, engine.config.block_size
    budget = config.max_num_batched_tokens
    order = [request for request in engine.running if request.finish >= 0.0 or request not in engine.ended]
    crowd = len(engine.running) + len(engine.waiting) + engine.aside
    threshold = config.long_prefill_token_threshold if crowd > 1 else 0
    granted: dict[Request, int] = {}
    preempted = False
    index = 0
    while index < len(order) and budget > 0:
        request = order[index]
        if request.finish >= 0.0:
            index += 1
            continue
        computed = engine.batch.computed(request) if request.decoding else request.computed
        tokens = 1 + len(config.acceptance) if request.decoding else request.target - computed
        if threshold:
            tokens = min(tokens, threshold)
        tokens = min(tokens, budget)
        held = engine.batch.held(request) if request.decoding else -(-(computed + config.lookahead) // size)
        need = max(0, -(-(computed + tokens + config.lookahead) // size) - held)
        if kv.free < need:
            preempted = True
            index, returned = _make_room(engine, order, granted, index, need)
            budget += returned
            if request not in engine.running:
                break
        kv.take(need)
        if isinstance(engine.batch, SpeculativeBatch) and request.decoding and tokens <= engine.batch.drafts:
            engine.batch.shorten(request, tokens - 1)
        granted[request] = tokens
        budget -= tokens
        if request.keys and not request.decoding:
            kv.commit(request, (computed + tokens) // size)
        index += 1
    stalled = [request for request in order[index:] if request.decoding]
    for request in stalled:
        engine.stall(request)
    chunks = [(request, tokens) for request, tokens in granted.items() if not request.decoding]
    return chunks, stalled, preempted


def _make_room(
    engine: Engine, order: list[Request], granted: dict[Request, int], index: int, need: int
) -> tuple[int, int]:
    """Preempt until `need` blocks are free, at worst the request in place `index` of `order` itself.

    Returns (its place now, tokens that the preempted ones give back); they are taken out of `order` and `granted`.
    """
    request, returned = order[index], 0
    while engine.kv.free < need:
        victim = max(order, key=_urgency) if engine.config.priority else order[-1]
        position = order.index(victim)
        del order[position]
        if position < index:
            index -= 1
        tokens = granted.pop(victim, 0)
        returned += tokens
        engine.preempt(victim, *_slots(engine, victim, tokens))
        if victim is request:
            break
    return index, returned


def _slots(engine: Engine, request: Request, granted: int) -> tuple[int, int]:
    """(tokens that a running request has slots for, `granted` in this step included; the last ones not hashed yet).

    A block is hashed when its tokens are known to the scheduler. Under async scheduling it does not know the token that
    the step in flight samples: that has a slot when the request decodes in this step, and its predecessor, unknown at
    the time of the last hashing, when it decodes in the step in flight.
    """
    step = engine.batch.step
    if isinstance(engine.batch, SpeculativeBatch):
        return _slots_with_drafts(engine, engine.batch, request, granted)
    if request.finish >= 0.0:
        return request.computed, int(request.finish_step == step - 1)  # else it ends with a prefill
    if not request.decoding:
        return request.computed + granted, 0
    slots = request.base + step + granted
    lagging = engine.in_flight and engine.config.async_scheduling and request not in engine.late
    return slots, int(lagging and slots > request.computed)


def _slots_with_drafts(engine: Engine, batch: SpeculativeBatch, request: Request, granted: int) -> tuple[int, int]:
    """As `_slots`; what a verification in flight accepts is taken to be hashed, drafts in this step are not."""
    config, size = engine.config, engine.config.block_size
    if request.finish >= 0.0:
        blocks, hashed = request.blocks, request.computed
    elif request.decoding:
        hashed = batch.computed(request)
        blocks = max(batch.held(request), -(-(hashed + granted + config.lookahead) // size) if granted else 0)
    else:
        hashed = request.computed + granted
        blocks = -(-(hashed + config.lookahead) // size)
    return blocks * size, blocks * size - hashed


def _urgency(request: Request) -> tuple[int, float, int]:
    return request.priority, request.queued, request.index
