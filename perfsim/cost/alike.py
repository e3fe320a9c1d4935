"""Many steps priced at once: work that follows their new tokens alone is priced once per number of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from perfsim.cost.estimate import Estimate
from perfsim.ops.op import Num, Op


@dataclass(frozen=True, slots=True)
class Alike:
    """Steps by their new tokens: `one` is the place of a step of each number, `each` that of every step's number."""

    one: NDArray[np.intp]
    each: NDArray[np.intp]

    @classmethod
    def by_tokens(cls, tokens: NDArray[np.float64]) -> Alike:
        """Steps of so many tokens, whole numbers up to a few thousand: they need not be sorted."""
        counts = tokens.astype(np.intp)
        place = np.full(int(counts.max()) + 1, -1)
        place[counts] = np.arange(len(counts))
        found = place >= 0
        return cls(place[found], (np.cumsum(found) - 1)[counts])

    def reduced(self, op: Op) -> Op:
        """The operator in one step of each number of tokens, which must be all that it depends on."""
        return replace(
            op, flops=_at(op.flops, self.one), read_bytes=_at(op.read_bytes, self.one),
            write_bytes=_at(op.write_bytes, self.one), active=_at(op.active, self.one), rows=_at(op.rows, self.one),
            tiles=_at(op.tiles, self.one),
        )  # fmt: skip

    def spread(self, part: Estimate) -> Estimate:
        """What `reduced` work takes, in every step."""
        return Estimate(
            _at(part.seconds, self.each), _at(part.flops, self.each), _at(part.bytes, self.each),
            _at(part.joules, self.each), {name: _at(seconds, self.each) for name, seconds in part.bound_s.items()},
            part.source, {name: _at(seconds, self.each) for name, seconds in part.d_seconds.items()},
        )  # fmt: skip


def _at(values: Num, places: NDArray[np.intp]) -> Num:
    return values[places] if isinstance(values, np.ndarray) else values
