"""Decode attention on a fitted curve: what HBM has to move, and how the busiest SM gets through its share."""

from __future__ import annotations

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.cost.piecewise import PiecewiseLinear
from perfsim.cost.products import blended
from perfsim.ops.op import Num, Op
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import DecodeCurve
from perfsim.spec.hardware import Accelerator

KNOTS = tuple(16.0 * 2**step for step in range(21))  # contexts of 16 to 16.8M tokens
ROUNDED = 3.0  # exponent: where as many items as SMs are in flight, some SMs have a second one and others none
WIDEST = 128.0  # columns of a head up to which every kernel keeps pace with memory


def powered(one: Num, other: Num) -> Num:
    """The larger of both, rounded where they cross: what limits one SM, and how evenly its work is spread."""
    return blended(one, other, ROUNDED)


def sm_items(heads: Num, tiles: Num, packed: float) -> Num:
    """Pieces of work of one sequence: K/V heads, each with up to `packed` of its query heads, without whole tiles."""
    return tiles * np.maximum(1.0, heads / tiles / packed)


def parts(items: Num, split: Num) -> Num:
    """Contexts that the busiest SM reads: as many as there are items per SM, at least the part `split` of one."""
    return powered(items, split)


def queued(items: Num) -> Num:
    """Items that the busiest SM starts: one at least."""
    return powered(items, 1.0)


class DecodeTimes:
    """Decode attention on a fitted curve: seconds per sequence over mean contexts, linear between knots.

    All sequences together take blend(bytes / (e_b bandwidth), busiest SM). An SM works through whole items: a sequence
    and K/V head (of latent attention, up to `packed` query heads), whose context is split into at most `splits` parts.
    The busiest has max(items / SMs, 1 / splits) contexts to read at `sm_bandwidth` and max(items / SMs, 1) times `tile`
    besides, so that few long sequences leave SMs idle and many short ones queue for them. Both parts of the blend are
    affine in the context, which makes it convex: chords lie above it and above the speed of light. Sequences of unequal
    context are priced at their mean, and wait `wait` seconds for each entry that the longest has beyond it: no less
    than its parts take. Neglected: the last wave of items, that kernels choose fewer parts than they could, and how
    they split what a window leaves. On a device of unknown SM count only bytes and FLOPs count.
    """

    __slots__ = ("_bound", "_entry", "_fixed", "_items", "_read", "_sharpness", "_split", "_tile", "wait")

    def __init__(self, op: Op, curve: DecodeCurve, efficiency: DeviceEfficiency, chip: Accelerator) -> None:
        memory, units = chip.memory, float(chip.sm_count or 1)
        moved = op.sequence_read_bytes / memory.read_bandwidth + op.sequence_write_bytes / memory.write_bandwidth
        self._fixed = moved / curve.bandwidth
        self._entry = op.entry_bytes / memory.read_bandwidth / curve.bandwidth
        compute = efficiency.decode_attention_compute if curve.compute is None else curve.compute
        self._bound = op.pair_flops / (compute * peak_flops(chip, op.dtype))
        tiles = float(op.tiles)
        items = sm_items(op.heads, tiles, curve.packed)
        columns = max(0.0, op.pair_flops / (4.0 * op.heads) - WIDEST) if curve.wide and op.heads else 0.0
        own = op.entry_bytes / tiles / curve.sm_bandwidth if curve.sm_bandwidth else 0.0
        own += curve.wide * columns
        products = self._bound * units / items if curve.compute is not None else 0.0
        self._read = powered(own, products) if chip.sm_count else 0.0
        self._tile = curve.tile if chip.sm_count else 0.0
        self._items, self._sharpness = items / units, curve.sharpness
        self._split = 1.0 / curve.splits if curve.splits and op.unlimited else 0.0
        self.wait = float(self._read * self._split)

    def __call__(self, sequences: Num, context: Num) -> Num:
        """Seconds per sequence, at arrays or numbers."""
        knots = np.asarray((0.0, *KNOTS))
        last = np.searchsorted(knots, context, side="right") - 1
        first = np.minimum(last, len(KNOTS) - 1)
        low, high = knots[first], knots[first + 1]
        busiest = self._busiest(sequences)
        left, right = self._at(busiest, low), self._at(busiest, high)
        inside: Num = left + (right - left) * ((context - low) / (high - low))
        if not np.any(last > first):
            return inside
        beyond = self._at(busiest, knots[-1]) + self._slope(busiest) * (context - knots[-1])
        return np.where(last > first, beyond, inside)

    def curve(self, sequences: float) -> PiecewiseLinear:
        """The same for a fixed number of sequences, to be located at a point."""
        x, busiest = np.asarray((0.0, *KNOTS)), self._busiest(sequences)
        return PiecewiseLinear(
            x.tolist(), np.asarray(self._at(busiest, x)).tolist(), final_slope=float(self._slope(busiest))
        )

    def _busiest(self, sequences: Num) -> tuple[Num, Num, Num]:
        """(sequences, seconds of the busiest SM per entry of a context, and besides)."""
        sequences = np.maximum(sequences, 1.0)
        items = self._items * sequences
        return sequences, self._read * parts(items, self._split), self._tile * queued(items)

    def _at(self, busiest: tuple[Num, Num, Num], context: Num) -> Num:
        sequences, entry, fixed = busiest
        busy = (entry * context + fixed) / sequences
        return np.maximum(blended(self._fixed + self._entry * context, busy, self._sharpness), self._bound * context)

    def _slope(self, busiest: tuple[Num, Num, Num]) -> Num:
        sequences, entry, _ = busiest
        busy = entry / sequences
        return np.maximum(blended(self._entry + 0.0 * busy, busy, self._sharpness), self._bound)
