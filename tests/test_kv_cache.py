"""The run-granular KV cache against a pool of single blocks, and what must hold whatever is asked of it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_block_pool import Holder, ReferencePool

from perfsim.serving.kv_cache import KVCache, Run
from perfsim.serving.request import Request

SIZE = 4


paths = st.lists(st.integers(0, 2), max_size=3).map(tuple)
Action = tuple[str, Any, int, int]


def actions(*, least: int) -> st.SearchStrategy[list[Action]]:
    """Things to do to a pool: (what, path or whom, tokens, chunk); prompts have `least` tokens of their own."""
    whom, none = st.integers(0, 9), st.just(0)
    one = st.one_of(
        st.tuples(st.just("new"), paths, st.integers(least, 12), st.integers(1, 40)),
        st.tuples(st.just("grow"), whom, st.integers(1, 9), none),
        st.tuples(st.just("finish"), whom, none, none),
        st.tuples(st.just("preempt"), whom, none, none),
        st.tuples(st.just("resume"), whom, st.integers(1, 40), none),
    )
    return st.lists(one, max_size=80)


def family(path: tuple[int, ...], widest: int) -> tuple[list[int], list[int]]:
    """(keys, ends) of the prompts that begin with a path in a tree of shared prefixes: one key per node on the way.

    A key stands for 1 to `widest` blocks, which follows from the key alone, as with recorded block ids.
    """
    keys: list[int] = []
    ends: list[int] = []
    key = 0
    for step in path:
        key = key * 3 + step + 1
        keys.append(key)
        ends.append((ends[-1] if ends else 0) + 1 + key % widest)
    return keys, ends


@dataclass(eq=False)
class Client:
    """One request in both pools."""

    request: Request
    holder: Holder
    tokens: int = 0  # computed or scheduled: what it has slots for
    known: int = 0  # those whose values are known: not the token in flight while it decodes under async scheduling
    target: int = 0  # prompt and everything generated so far
    decodes: bool = False

    @property
    def committed(self) -> bool:
        return self.tokens >= SIZE * len(self.holder.shared)


class Lone:
    """Drives a KVCache as the engine does."""

    def __init__(self, total: int, *, widest: int, caching: bool = True, lag: int = 0) -> None:
        self.cache = KVCache(total, block_size=SIZE, caching=caching)
        self.widest = widest
        self.lag = lag
        self.running: list[Client] = []
        self.preempted: list[Client] = []
        self.created = 0

    def create(self, path: tuple[int, ...], private: int) -> Client:
        keys, ends = family(path, self.widest)
        starts = [0, *ends]
        shared = tuple((key, block) for key, *span in zip(keys, starts, ends, strict=False) for block in range(*span))
        prompt = max(1, SIZE * len(shared) + private)
        self.created += 1
        request = Request(self.created, 0.0, 0.0, prompt, 10**6, keys=keys, ends=ends)
        return Client(request, Holder(shared, f"own {self.created}"), target=prompt)

    def admit(self, client: Client, chunk: int) -> bool:
        """Admission of up to `chunk` tokens beyond those found."""
        hits, idle = self.cache.lookup(client.request, (client.target - 1) // SIZE)
        tokens = min(hits * SIZE + chunk, client.target)
        if -(-tokens // SIZE) - hits + idle > self.cache.free:
            return False
        self.acquire(client, hits)
        self.running.append(client)
        return self.grow(client, tokens - client.tokens)

    def acquire(self, client: Client, hits: int) -> None:
        self.cache.acquire(client.request, hits)
        client.tokens = hits * SIZE

    def grow(self, client: Client, tokens: int) -> bool:
        """Slots for more tokens, prompt first; generated ones raise the target."""
        if client.tokens < client.target:
            tokens = min(tokens, client.target - client.tokens)
        grown = client.tokens + tokens
        need = -(-grown // SIZE) - -(-client.tokens // SIZE)
        if need > self.cache.free:
            return False
        self.cache.take(need)
        if client.request.keys:
            self.cache.commit(client.request, min(grown, client.request.prompt) // SIZE)
        client.known = max(client.known, grown - (self.lag if client.decodes else 0))
        client.decodes = client.decodes or grown == client.target
        client.tokens = grown
        client.target = max(client.target, grown + 1)
        return True

    def leave(self, client: Client, *, resumes: bool) -> None:
        self.running.remove(client)
        if not resumes:
            client.known = client.tokens
        self.cache.release(client.request, client.tokens, hashed=client.known, resumes=resumes)
        client.tokens = client.known = 0
        client.decodes = False
        if resumes:
            self.preempted.append(client)

    def apply(self, action: Action) -> None:
        """Do one thing, unless there is nobody to do it to."""
        kind, which, amount, chunk = action
        if kind == "new":
            self.admit(self.create(which, amount), chunk)
            return
        clients = self.preempted if kind == "resume" else self.running
        if not clients:
            return
        client = clients[which % len(clients)]
        if kind == "grow":
            self.grow(client, amount)
        elif kind != "resume":
            self.leave(client, resumes=kind == "preempt")
        elif self.admit(client, amount):
            self.preempted.remove(client)


class Twin(Lone):
    """Does the same to a pool of single blocks and compares the two."""

    def __init__(self, total: int, *, widest: int, lag: int = 0) -> None:
        super().__init__(total, widest=widest, lag=lag)
        self.pool = ReferencePool(total, block_size=SIZE)
        self.hits = self.private_hits = self.copied = 0

    def twice_computed(self, client: Client) -> bool:
        """Whether somebody is about to compute blocks that this client would compute as well."""
        hits = len(self.pool.lookup(client.holder, (client.target - 1) // SIZE))
        missing = set(client.holder.shared[hits:])
        return any(missing.intersection(other.holder.shared) for other in self.running if not other.committed)

    def admit(self, client: Client, chunk: int) -> bool:
        if self.widest > 1 and self.twice_computed(client):
            return False
        return super().admit(client, chunk)

    def acquire(self, client: Client, hits: int) -> None:
        found = self.pool.lookup(client.holder, (client.target - 1) // SIZE)
        assert hits == len(found)
        self.pool.acquire(client.holder, found)
        super().acquire(client, hits)
        self.hits += hits > 0
        self.private_hits += hits > len(client.holder.shared)

    def grow(self, client: Client, tokens: int) -> bool:
        if not super().grow(client, tokens):
            return False
        self.pool.grow(client.holder, client.tokens, known=client.known)
        self.copied += any(len(same) > 1 for same in self.pool.cached.values())
        return True

    def leave(self, client: Client, *, resumes: bool) -> None:
        if not resumes:
            self.pool.grow(client.holder, client.tokens, known=client.tokens)
        super().leave(client, resumes=resumes)
        self.pool.release(client.holder)

    def compare(self) -> None:
        assert self.cache.free == self.pool.free
        # Evictions took the same blocks of the same prefixes, copies counted.
        resident: Counter[int] = Counter()
        for run in runs(self.cache):
            resident[run.key] += run.resident
        theirs: Counter[int] = Counter()
        for (key, _), same in self.pool.cached.items():
            theirs[key] += len(same) if isinstance(key, int) else 0
        assert resident == +theirs
        assert self.cache.blank == sum(block.content is None for block in self.pool.queue)
        sound(self.cache)
        probes = [self.create(path, 5) for path in ((0, 0, 0), (0, 1), (1, 2, 0), (2,))] if self.widest == 1 else []
        for client in (*self.preempted, *probes):
            limit = (client.target - 1) // SIZE
            found = self.pool.lookup(client.holder, limit)
            idle = sum(not block.references for block in found)
            assert self.cache.lookup(client.request, limit) == (len(found), idle)


def runs(cache: KVCache) -> set[Run]:
    """All runs that can be asked for."""
    return set(cache.nodes.values()).union(*cache.copies.values())


def sound(cache: KVCache) -> None:
    """What holds at any time: free blocks are blank or queued, a queued run is not referenced and not empty."""
    assert 0 <= cache.blank <= cache.free <= cache.total
    assert cache.free == cache.blank + sum(run.resident for run in cache.queue)
    assert all(run.refs == 0 and run.resident > 0 for run in cache.queue)
    assert all(run.refs > 0 or run in cache.queue for run in runs(cache))
    assert all(len(same) > 1 and next(iter(same)) is cache.nodes[key] for key, same in cache.copies.items())
    assert cache.tail is None or next(reversed(cache.queue)) is cache.tail


def follow(twin: Twin, todo: list[Action]) -> None:
    """Do it all, end what still runs, and compare after each."""
    for action in todo:
        twin.apply(action)
        twin.compare()
    while twin.running:
        twin.leave(twin.running[0], resumes=False)
        twin.compare()
    assert twin.cache.check() == ""


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 60), st.integers(0, 1), actions(least=0))
def test_keys_of_one_block_behave_as_single_blocks(total: int, lag: int, todo: list[Action]) -> None:
    """Whatever is asked: copies computed at once, prompts cached to their last block, tokens in flight."""
    follow(Twin(total, widest=1, lag=lag), todo)


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 60), st.integers(0, 1), actions(least=1))
def test_runs_behave_as_single_blocks(total: int, lag: int, todo: list[Action]) -> None:
    """Where the documented differences cannot occur: a prompt has a token of its own, nothing is computed twice."""
    follow(Twin(total, widest=3, lag=lag), todo)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("widest", [1, 3])
def test_full_pools_behave_as_single_blocks(seed: int, widest: int) -> None:
    """The same over long histories, in which every kind of hit and of eviction is sure to happen."""
    rng = random.Random(seed)
    hits = private_hits = copied = evicted = 0
    for _ in range(60):
        twin = Twin(rng.randint(8, 60), widest=widest, lag=rng.randint(0, 1))
        for _ in range(100):
            kind = rng.choice(["new", "new", "grow", "grow", "grow", "finish", "preempt", "resume", "resume"])
            path = tuple(rng.randint(0, 1) for _ in range(rng.randint(0, 3)))
            own = rng.randint(widest > 1, 12)
            twin.apply((kind, path if kind == "new" else rng.randint(0, 9), own, rng.randint(1, 24)))
            twin.compare()
        hits, private_hits, copied = hits + twin.hits, private_hits + twin.private_hits, copied + twin.copied
        evicted += twin.pool.evicted
    assert min(hits, private_hits, evicted) > 50
    assert copied > 50 or widest > 1


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 60), st.booleans(), st.integers(1, 3), actions(least=0))
def test_the_pool_is_sound_whatever_is_asked(total: int, caching: bool, widest: int, todo: list[Action]) -> None:
    """Concurrent copies, prompts cached to their last block, no caching: differences to single blocks, never errors."""
    lone = Lone(total, widest=widest, caching=caching)
    for action in todo:
        lone.apply(action)
        sound(lone.cache)
        private = sum(-(-client.tokens // SIZE) - client.request.node_blocks for client in lone.running)
        held = {node for client in lone.running for node in client.request.held}
        assert total - lone.cache.free == private + sum(node.resident for node in held)
        for client in lone.running:
            assert 0 <= client.request.node_blocks <= -(-client.tokens // SIZE)
        assert all(node.refs == sum(node in client.request.held for client in lone.running) for node in held)
    while lone.running:
        lone.leave(lone.running[0], resumes=False)
        sound(lone.cache)
    assert lone.cache.check() == ""


def test_two_copies_make_one_hit() -> None:
    """A hit may begin in a short copy and go on in a longer one; it takes no more than the blocks it needs."""
    cache = KVCache(12, block_size=SIZE, caching=True)
    long, short, late = (Request(index, 0.0, 0.0, blocks * SIZE, 9, keys=[7], ends=[blocks])
                         for index, blocks in enumerate((8, 2, 9)))  # fmt: skip
    for request, blocks in ((short, 2), (long, 8)):
        cache.take(blocks)
        cache.commit(request, blocks)
    cache.release(long, 8 * SIZE, resumes=False)
    cache.release(short, 2 * SIZE, resumes=False)
    assert cache.lookup(late, 7) == (7, 7)
    cache.acquire(late, 7)
    sound(cache)
    assert cache.free == 12 - 7
    cache.take(3)  # two blank ones, and the long copy's last block: the deepest goes first
    assert cache.lookup(Request(3, 0.0, 0.0, 9 * SIZE, 9, keys=[7], ends=[8]), 8) == (7, 0)
    assert sum(run.resident for run in cache.queue) == 2
    cache.release(late, 7 * SIZE, resumes=False)
    sound(cache)
