"""Choices with a popularity law: which adapter, which document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from perfsim.errors import InputError
from perfsim.spec.policy import LoraServing
from perfsim.traffic.chunk import Ints, RequestChunk

_BATCH = 4096


def zipf_chooser(count: int, *, exponent: float, rng: np.random.Generator) -> Callable[[int], Ints]:
    """A function n -> int64[n] in [0, count), item i with a chance proportional to (i + 1)^-exponent.

    By inversion of the cumulative distribution, one random number per choice; exponent 0 is uniform.
    """
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]
    return lambda n: np.minimum(np.searchsorted(cumulative, rng.random(n), side="right"), count - 1).astype(np.int64)


class DistinctChooser:
    """`k` different items of `count` per call, in the order drawn: Zipf choices of which repetitions are dropped.

    Drawing one by one from what is left, with chances in the old proportion, has the same law. After 64 k choices (a
    steep law and k near `count`) the most popular of the rest complete the set.
    """

    def __init__(self, count: int, *, exponent: float, rng: np.random.Generator) -> None:
        self._choose = zipf_chooser(count, exponent=exponent, rng=rng)
        self._count = count
        self._drawn = self._endless()

    def take(self, k: int) -> list[int]:
        """The next set; k at most `count`."""
        chosen: dict[int, None] = {}
        for _ in range(64 * k):
            chosen[next(self._drawn)] = None
            if len(chosen) == k:
                return list(chosen)
        rest = (item for item in range(self._count) if item not in chosen)
        return [*chosen, *(next(rest) for _ in range(k - len(chosen)))]

    def _endless(self) -> Iterator[int]:
        # Always the same number at a time, so that the choices do not depend on how they are asked for.
        while True:
            yield from self._choose(_BATCH).tolist()


def with_adapters(
    chunks: Iterator[RequestChunk], lora: LoraServing | None, *, rng: np.random.Generator
) -> Iterator[RequestChunk]:
    """`chunks` with an adapter for every request, drawn by `lora.popularity` unless the chunk says which.

    Without `lora` nobody has one, whatever the trace says. Raises InputError for a recorded adapter that is not there.
    """
    if lora is None:
        for chunk in chunks:
            yield chunk if chunk.adapter is None else replace(chunk, adapter=None)
        return
    choose = zipf_chooser(lora.num_adapters, exponent=lora.popularity, rng=rng)
    for chunk in chunks:
        if chunk.adapter is None:
            yield replace(chunk, adapter=choose(len(chunk)))
            continue
        if int(chunk.adapter.max()) >= lora.num_adapters:
            raise InputError(
                f"policy.lora.num_adapters is {lora.num_adapters}, but the trace names adapter {chunk.adapter.max()} "
                "(counted from 0)"
            )
        yield chunk
