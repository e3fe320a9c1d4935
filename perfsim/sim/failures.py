"""When machines fail and come back: a renewal process per machine, each with a random stream of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

# Part of every stream's seed ("fail"), so that failures share no random numbers with the traffic of the same seed.
_STREAM = 0x6661696C


def outages(
    seed: int, machine: int, *, mtbf: float, repair: float, exponential_repair: bool = False
) -> Iterator[tuple[float, float]]:
    """(down, up) times in seconds of machine number `machine`, in order and without end.

    The time from up to down is exponential with mean `mtbf`; a repair lasts `repair`, or is exponential with that
    mean. In the long run the machine is up for mtbf / (mtbf + repair) of the time. The stream is PCG64 of (seed,
    machine): more machines, or another order, leave everybody's times as they were. Neglected: ageing, and failures
    that hit several machines at once. Raises ValueError for an `mtbf` that is not positive or a negative `repair`.
    """
    if not (0.0 < mtbf < math.inf and 0.0 <= repair < math.inf):
        raise ValueError(f"mtbf {mtbf!r} s and repair {repair!r} s")
    return _outages(seed, machine, mtbf, repair, exponential_repair)


def _outages(seed: int, machine: int, mtbf: float, repair: float, exponential: bool) -> Iterator[tuple[float, float]]:
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=(_STREAM, machine))))
    up = 0.0
    while True:
        down = up + float(rng.exponential(mtbf))
        up = down + (float(rng.exponential(repair)) if exponential else repair)
        yield down, up
