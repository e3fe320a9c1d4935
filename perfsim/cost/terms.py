"""What is left of attention and state kernels once a model and a device are fixed: a few coefficients per layer shape.

Layers of equal shape share a term. Decode attention keeps its curve, prefill attention is affine in pairs, entries and
tokens, and the rest is affine in one sum; all of it is read off the lowered operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from perfsim.cost.curves import (
    ABREAST,
    decode_curve,
    decode_ramp,
    gemm_curve,
    prefill_coefficients,
    prefill_curve,
)
from perfsim.cost.decode import DecodeTimes
from perfsim.cost.device import peak_flops
from perfsim.cost.mixed import MixedKernel, PlainBeside, PlainPrompts, mixed_kernel, plain_beside, plain_prompts
from perfsim.cost.piecewise import PiecewiseLinear
from perfsim.cost.products import PlainProduct, blended, gemm_row, plain_product, product_of
from perfsim.cost.roofline import coefficients, decode_attention_curve
from perfsim.ops.op import Driver, Op
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.hardware import Accelerator, Node

Mix = tuple[tuple[int, float], ...]
NO_RAMP = PiecewiseLinear([0.0], [0.0], final_slope=0.0)


# (the number of sequences, floating; knots, values and slopes of a PiecewiseLinear; seconds per entry of the longest
# sequence beyond the mean). CPython multiplies two floats faster than a float and an integer.
Pieces = tuple[float, list[float], list[float], list[float], float]


class Curves(dict[int, Pieces]):
    """Seconds per sequence over its mean entries, by the number of sequences; each is made when first asked for.

    All of them wait `wait` seconds for each entry that the longest has beyond the mean, and `last` more from `unsplit`
    sequences on.
    """

    __slots__ = ("_last", "_make", "_unsplit", "_wait")

    def __init__(
        self, make: Callable[[int], PiecewiseLinear], *, wait: float = 0.0, last: float = 0.0, unsplit: float = 0.0
    ) -> None:
        super().__init__()
        self._make, self._wait, self._last, self._unsplit = make, wait, last, unsplit

    def __missing__(self, decodes: int) -> Pieces:
        curve, wait = self._make(decodes), self._wait
        if decodes >= self._unsplit:
            wait += self._last
        found = self[decodes] = (float(decodes), curve.x, curve.y, curve.slopes, wait)
        return found


@dataclass(frozen=True, slots=True)
class DecodeTerm:
    """Decode attention of all layers of one shape; `mix` blends the sums over spans into attended entries.

    `span` is the only one where an entry per token of one span is attended, else -1: most models need no blending.
    `curves` are per sequence over its mean entries, `ramp` (see `curves.decode_ramp`) over all entries together, and
    from `full` entries on it is `ramp_s` seconds in all of the layers; without a ramp that is from none. Beside prompt
    chunks `mixed` replaces all of it, where there is one.
    """

    mix: Mix
    span: int
    count: float
    launch: float
    curves: Curves
    ramp: PiecewiseLinear
    full: float
    ramp_s: float
    mixed: PlainBeside | None
    limit: float

    def beside(
        self, alone: float, decodes: float, attended: float, tokens: int, pairs: tuple[int, ...],
        entries: tuple[int, ...], chunks: int, longest: tuple[int, int],
    ) -> float:  # fmt: skip
        """Seconds that decodes add to `chunks` prompt chunks, in place of the seconds that they take `alone`."""
        if self.mixed is None:
            return alone
        span, count, limit = self.span, self.count, self.limit
        new: float
        read: float
        if span >= 0:
            new, read = pairs[span], entries[span]
        else:
            new, read = blend(self.mix, pairs), blend(self.mix, entries)
        of_decode, of_prompt = longest  # compared by hand: `min` and `max` of two numbers take four times as long
        context = (of_decode if of_decode < limit else limit) or attended / decodes
        own = (of_prompt if of_prompt < limit else limit) or read / chunks
        added, shared = self.mixed(decodes, attended, context, tokens, new, read, own)
        together, unshared = count * added, alone - count * shared
        return together if together > unshared else unshared


@dataclass(frozen=True, slots=True)
class PrefillTerm:
    """Prefill attention of all layers of one shape: launch + max(compute x pairs, what pairs, entries, tokens move).

    `span` as in a DecodeTerm. On a fitted curve compute and moved add up; `per_row` computes for each token, what a
    window cuts for up to `cut` pairs of it, and `critical` for each entry of the longest context (see
    `curves.prefill_seconds`); `mixed` times all but the launch and what is moved.
    """

    mix: Mix
    span: int
    count: float
    launch: float
    compute: float
    per_pair: float
    per_entry: float
    per_token: float
    critical: float = 0.0
    per_row: float = 0.0
    cut: float = 0.0
    fitted: bool = False
    mixed: PlainPrompts | None = None
    limit: float = 0.0

    def seconds(
        self, tokens: int, pairs: tuple[int, ...], entries: tuple[int, ...], chunks: int, longest: int
    ) -> float:
        attended: float
        read: float
        span, limit = self.span, self.limit
        if span >= 0:
            attended, read = pairs[span], entries[span]
        else:
            attended, read = blend(self.mix, pairs), blend(self.mix, entries)
        moved = self.per_pair * attended + self.per_entry * read + self.per_token * tokens
        context = (longest if longest < limit else limit) or read / chunks
        if self.mixed is not None:
            return self.count * (self.launch + moved + self.mixed(tokens, attended, context))
        if self.fitted:
            busy = self.compute * attended + self.per_row * tokens
            if limit == inf:
                busy = float(blended(busy, self.critical * context, ABREAST))
            else:
                busy += self.compute * min(self.cut * tokens, attended)
            return self.count * (self.launch + moved + busy)
        return self.count * (self.launch + max(self.compute * attended, moved))


@dataclass(frozen=True, slots=True)
class LinearTerm:
    """A kernel whose work is affine in one sum x: count * (launch + max(fixed + per_unit * x, compute * x)).

    A matrix product on a fitted curve takes `per_row` x and its own time instead, of what x moves.
    """

    mix: Mix
    count: int
    launch: float
    fixed: float
    per_unit: float
    compute: float
    per_row: float = 0.0
    product: PlainProduct | None = None

    def seconds(self, units: float) -> float:
        if self.product is not None:
            busy = self.product(units, self.fixed + self.per_unit * units)
            return self.count * (self.per_row * units + busy)
        return self.count * (self.launch + max(self.fixed + self.per_unit * units, self.compute * units))


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """A LoRA kernel of all layers of one shape: launch + max(compute x tokens, what tokens and adapters move)."""

    count: int
    launch: float
    compute: float
    per_token: float
    per_adapter: float

    def seconds(self, tokens: int, adapters: int) -> float:
        moved = self.per_token * tokens + self.per_adapter * adapters
        return self.count * (self.launch + max(self.compute * tokens, moved))


def adapter_terms(
    token: list[Op], adapter: list[Op], node: Node, device: DeviceEfficiency
) -> tuple[AdapterTerm, ...]:  # fmt: skip
    """One term per shape of LoRA kernel, from the same work lowered for one token alone and for one adapter alone."""
    found: dict[object, AdapterTerm] = {}
    memory = node.accelerator.memory
    for first, second in zip(token, adapter, strict=True):
        launch, compute, bandwidth = coefficients(first, device)
        moved = [
            float(op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / bandwidth
            for op in (first, second)
        ]
        rate = compute * peak_flops(node.accelerator, first.dtype)
        term = AdapterTerm(first.count, launch, float(first.flops) / rate, moved[0], moved[1])
        key = replace(term, count=0)
        found[key] = replace(term, count=first.count + (found[key].count if key in found else 0))
    return tuple(found.values())


def blend(mix: Mix, sums: tuple[int, ...]) -> float:
    """Entries attended: the weighted sum over spans."""
    total = 0.0
    for index, weight in mix:
        total += weight * sums[index]
    return total


def _only_span(mix: Mix) -> int:
    return mix[0][0] if len(mix) == 1 and mix[0][1] == 1.0 else -1


def decode_terms(ops: list[Op], node: Node, device: DeviceEfficiency) -> tuple[DecodeTerm, ...]:
    """One term per shape of decode attention among `ops`."""
    found: dict[object, DecodeTerm] = {}
    for op in ops:
        if op.kind == "decode_attention":
            key = (op.mix, op.entry_bytes, op.pair_flops, op.sequence_read_bytes, op.sequence_write_bytes, op.dtype,
                   op.heads, float(op.tiles), op.format)  # fmt: skip
            count = float(op.count + (found[key].count if key in found else 0))
            fitted, mixed = decode_curve(op, device), mixed_kernel(op, device, node.accelerator)
            ramp = NO_RAMP if fitted is None else decode_ramp(op, fitted) or NO_RAMP
            curves = _decode_curves(op, count, mixed, node.accelerator, device)
            found[key] = DecodeTerm(
                op.mix, _only_span(op.mix), count, coefficients(op, device)[0], curves, ramp, ramp.last,
                count * ramp.y[-1], None if mixed is None else plain_beside(mixed), op.limit,
            )  # fmt: skip
    return tuple(found.values())


def _decode_curves(
    op: Op, count: float, mixed: MixedKernel | None, chip: Accelerator, device: DeviceEfficiency
) -> Curves:
    """Curves of one layer, waits of all `count` of them."""
    fitted = decode_curve(op, device)
    if fitted is None:
        same = decode_attention_curve(op, chip, device)
        return Curves(lambda decodes: same)
    times = DecodeTimes(op, fitted, device, chip)
    if mixed is None:
        return Curves(times.curve, wait=count * times.wait)
    return Curves(times.curve, wait=count * times.wait, last=count * mixed.last, unsplit=mixed.unsplit)


def prefill_terms(ops: list[Op], node: Node, device: DeviceEfficiency) -> tuple[PrefillTerm, ...]:
    """One term per shape of prefill attention among `ops`."""
    found: dict[object, PrefillTerm] = {}
    memory = node.accelerator.memory
    for op in ops:
        if op.kind == "prefill_attention":
            launch, compute, bandwidth = coefficients(op, device)
            curve, chip = prefill_curve(op, device), node.accelerator
            per_pair, critical, per_row, cut = op.pair_flops / (compute * peak_flops(chip, op.dtype)), 0.0, 0.0, 0.0
            kernel = mixed_kernel(op, device, chip)
            if curve is not None:
                launch, bandwidth, cut = curve.launch, curve.bandwidth, curve.cut
                per_pair, critical, _, per_row = prefill_coefficients(op, curve, chip)
            moved, written = bandwidth * memory.read_bandwidth, bandwidth * memory.write_bandwidth
            per_token = op.sequence_read_bytes / moved + op.sequence_write_bytes / written
            term = PrefillTerm(
                op.mix, _only_span(op.mix), float(op.count), launch, per_pair, op.pair_bytes / moved,
                op.entry_bytes / moved, per_token, critical, per_row, cut, curve is not None,
                None if kernel is None else plain_prompts(kernel), op.limit,
            )  # fmt: skip
            key = (replace(term, count=0, mixed=None), kernel)  # two functions are never equal
            found[key] = replace(term, count=op.count + (found[key].count if key in found else 0))
    return tuple(found.values())


def linear_terms(
    one: list[Op], two: list[Op], driver: Driver, node: Node, device: DeviceEfficiency
) -> tuple[LinearTerm, ...]:
    """One term per shape of the kernels that follow `driver`, from the same work lowered for one unit and for two."""
    found: dict[object, LinearTerm] = {}
    memory = node.accelerator.memory
    chip = node.accelerator
    for first, second in zip(one, two, strict=True):
        if first.driver == driver:
            launch, compute, bandwidth = coefficients(first, device)
            rate, curve = compute * peak_flops(chip, first.dtype), gemm_curve(first, device)
            per_row, product = 0.0, None
            if curve is not None:
                launch, bandwidth = curve.launch, curve.bandwidth
                per_row, product = float(gemm_row(first.depth, curve, chip)), product_of(first, curve, chip)
            moved = [
                float(op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / bandwidth
                for op in (first, second)
            ]
            term = LinearTerm(
                first.mix, first.count, launch, 2 * moved[0] - moved[1], moved[1] - moved[0],
                float(second.flops - first.flops) / rate, per_row, None if product is None else plain_product(product),
            )  # fmt: skip
            key = (replace(term, count=0, product=None), product)  # two functions are never equal
            found[key] = replace(term, count=first.count + (found[key].count if key in found else 0))
    return tuple(found.values())
