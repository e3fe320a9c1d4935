"""Which replica a request goes to: the policies of common routers, on the loads that the router itself knows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter
from typing import Protocol

import numpy as np

from perfsim.serving.fleet import Replica
from perfsim.serving.request import Request
from perfsim.spec.deployment import LeastLoaded, PowerOfTwo, PrefixAware, RoundRobin, SessionSticky

# Part of the seed of random choices ("rout"), so that they share no random numbers with the traffic.
_STREAM = 0x726F7574
_DRAWS = 4096
_load = attrgetter("load")


class Router(Protocol):
    """Chooses among the replicas that serve now, which stand in a fixed order; there is at least one.

    `needs_loads`: `load` (requests in the replica) must be up to date when `choose` is called. `forget` is told of
    every replica that stops serving, which takes its cache with it.
    """

    needs_loads: bool

    def choose(self, request: Request, replicas: Sequence[Replica]) -> Replica: ...
    def forget(self, replica: Replica) -> None: ...


def make_router(spec: RoundRobin | LeastLoaded | PowerOfTwo | PrefixAware | SessionSticky, *, seed: int) -> Router:
    """The router that `spec` describes; random choices are drawn from `seed`."""
    if isinstance(spec, RoundRobin):
        return TakingTurns()
    if isinstance(spec, LeastLoaded):
        return FewestRequests()
    if isinstance(spec, PowerOfTwo):
        return BetterOfTwo(seed=seed)
    if isinstance(spec, PrefixAware):
        return LongestPrefix(spec)
    return StickySessions()


class TakingTurns:
    """One after the other; a replica that comes or goes does not change whose turn is next among the rest."""

    needs_loads = False

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        last = self._last
        if replicas[-1].index <= last:
            last = -1
        chosen = next(replica for replica in replicas if replica.index > last)
        self._last = chosen.index
        return chosen

    def forget(self, replica: Replica) -> None: ...


class FewestRequests:
    """The first of those with the fewest requests."""

    needs_loads = True

    def choose(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        return min(replicas, key=_load)

    def forget(self, replica: Replica) -> None: ...


class BetterOfTwo:
    """The less loaded of two different replicas drawn at random, the first one drawn when they are equal."""

    needs_loads = True

    def __init__(self, *, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=(_STREAM,))))
        self._drawn: list[tuple[float, float]] = []

    def choose(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        if len(replicas) == 1:
            return replicas[0]
        if not self._drawn:
            pairs = self._rng.random((_DRAWS, 2))[::-1].tolist()
            self._drawn = [(pair[0], pair[1]) for pair in pairs]
        first, second = self._drawn.pop()
        one = int(first * len(replicas))
        other = int(second * (len(replicas) - 1))
        other += other >= one
        return replicas[other] if replicas[other].load < replicas[one].load else replicas[one]

    def forget(self, replica: Replica) -> None: ...


class StickySessions:
    """A session stays where it began for as long as that replica serves; a request without one: fewest requests."""

    needs_loads = True

    def __init__(self) -> None:
        self._homes: dict[int, Replica] = {}

    def choose(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        home = self._homes.get(request.session)
        if home is not None and home.serving:
            return home
        chosen = min(replicas, key=_load)
        if request.session >= 0:
            self._homes[request.session] = chosen
        return chosen

    def forget(self, replica: Replica) -> None: ...


class LongestPrefix:
    """Follows cached prefixes while the loads are in balance, as SGLang's cache-aware router does.

    What it believes to be cached is what it sent: of every replica the most recently used keys worth `tree_tokens`
    tokens, oldest and deepest first to go. A key stands for a block and all before it, so a set of keys is a tree. Of
    several replicas with the longest match the one that has had it longest is chosen: like SGLang's tree, which names
    one owner of a node (recalled, not read again), and so that copies made while the loads were out of balance do not
    spread every prefix over all replicas. O(keys of the prompt) per request.
    """

    needs_loads = True

    def __init__(self, spec: PrefixAware) -> None:
        self._spec = spec
        self._holders: dict[int, int] = {}  # key: the replicas that hold it, one bit each
        self._recent: dict[int, OrderedDict[int, int]] = {}  # replica: its keys and their tokens, oldest first
        self._tokens: dict[int, int] = {}
        self._homes: dict[int, Replica] = {}  # key: the first of its holders
        self._replicas: dict[int, Replica] = {}  # by their bits

    def choose(self, request: Request, replicas: Sequence[Replica]) -> Replica:
        spec, loads = self._spec, [replica.load for replica in replicas]
        least = min(loads)
        chosen = replicas[loads.index(least)]
        most = max(loads)
        balanced = most - least <= spec.balance_abs or most <= spec.balance_rel * least
        if balanced and request.keys:
            depth = self._match(request)
            if depth and request.ends[depth - 1] * chosen.block_size >= spec.match_threshold * request.prompt:
                chosen = self._homes[request.keys[depth - 1]]
        if request.keys:
            self._remember(request, chosen)
        return chosen

    def forget(self, replica: Replica) -> None:
        """The replica's cache is gone."""
        bit = 1 << replica.index
        for key in self._recent.pop(replica.index, ()):
            self._drop(key, bit)
        self._replicas.pop(bit, None)
        self._tokens.pop(replica.index, None)

    def _match(self, request: Request) -> int:
        """Keys in the longest match that one replica holds; only replicas that serve are remembered."""
        known, match, depth = self._holders, -1, 0
        for key in request.keys:
            match &= known.get(key, 0)
            if not match:
                break
            depth += 1
        return depth

    def _remember(self, request: Request, replica: Replica) -> None:
        index, holders = replica.index, self._holders
        bit, tokens = 1 << index, self._tokens.get(index, 0)
        if bit not in self._replicas:
            self._replicas[bit] = replica
            self._recent[index] = OrderedDict()
        recent = self._recent[index]
        keys, ends = request.keys, request.ends
        for depth in range(len(keys) - 1, -1, -1):  # the deepest first, so that they are the older ones
            key = keys[depth]
            if key in recent:
                recent.move_to_end(key)
                continue
            covers = (ends[depth] - (ends[depth - 1] if depth else 0)) * replica.block_size
            recent[key] = covers
            if key in holders:
                holders[key] |= bit
            else:
                holders[key] = bit
                self._homes[key] = replica
            tokens += covers
        while tokens > self._spec.tree_tokens:
            key, covers = recent.popitem(last=False)
            tokens -= covers
            self._drop(key, bit)
        self._tokens[index] = tokens

    def _drop(self, key: int, bit: int) -> None:
        left = self._holders[key] & ~bit
        if not left:
            del self._holders[key], self._homes[key]
            return
        self._holders[key] = left
        if bit == 1 << self._homes[key].index:
            self._homes[key] = self._replicas[left & -left]
