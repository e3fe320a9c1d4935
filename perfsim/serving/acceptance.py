"""How many draft tokens each verification accepts: drawn per request, the same whoever asks and in whatever order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STREAM = 0x5BEC  # keeps these draws apart from others of the same seed


class Acceptance:
    """Accepted drafts of every verification of every request.

    The verification accepts the leading drafts up to the first rejection: at least i of them with the chance
    a_1 x ... x a_i, so that 1 + sum_i prod_{j<=i} a_j tokens come out on average (Leviathan et al., arXiv:2211.17192,
    equation 1, for equal a). Draws are independent; that easy passages accept more in a row is neglected.
    """

    __slots__ = ("_reach", "_seed", "cut_off", "drafts")

    def __init__(self, chances: tuple[float, ...], *, seed: int) -> None:
        self.drafts = len(chances)
        self._reach = np.cumprod(chances)[::-1].copy()  # P(at least i accepted), ascending
        self._seed = seed
        self.cut_off = 0  # tokens accepted beyond the end of a request, so far

    def accepted(self, index: int, count: int) -> NDArray[np.int64]:
        """Accepted drafts in the first `count` verifications of request `index`, had each `drafts` to verify."""
        uniform = np.random.Generator(np.random.PCG64((self._seed, _STREAM, index))).random(count)
        return self.drafts - np.searchsorted(self._reach, uniform, side="right")


def mean_emission(chances: tuple[float, ...]) -> float:
    """Mean tokens that one verification puts out: its own and the accepted drafts.

    >>> mean_emission((0.5, 0.5))
    1.75
    """
    return float(1.0 + np.cumprod(chances).sum())
