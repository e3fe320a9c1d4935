"""Seconds of one matrix product y[m, n] = x[m, k] @ W[k, n] on a fitted curve: tiles in waves, and what they wait for.

One formula for a fit over a whole table, for an explained step and for a compiled one. Every factor on work is at least
one and every term that is added at least zero, so that no coefficients beat max(FLOPs / peak, bytes / bandwidth); all
of it grows with rows, columns and depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf

import numpy as np

from perfsim.cost.device import peak_flops
from perfsim.ops.op import Num, Op
from perfsim.spec.curves import GemmCurve
from perfsim.spec.hardware import Accelerator

# Of y in one tile: a kernel takes the size that is fastest, up to the tallest that its library has.
TILE_ROWS = (16.0, 32.0, 64.0, 128.0, 256.0)
TILE_COLUMNS = (64.0, 128.0)
WIDEST = 128.0
TAIL_TILE = 256.0 * 128.0  # numbers of y in one tile of the wave that `tail` is a share of
QUANTISED_BYTES = 3.0  # per number: read as bf16, written in 8 bits

PlainProduct = Callable[[float, float], float]  # as `Product.seconds`


def blended(first: Num, second: Num, sharpness: float) -> Num:
    """(first^s + second^s)^(1/s): at least the longer of both, at most their sum."""
    return (first**sharpness + second**sharpness) ** (1.0 / sharpness)


def tiled(rows: Num, columns: Num, *, tallest: float, edge: float, idle: Num, units: int) -> Num:
    """Numbers of y that the time of all tiles is worth, `units` of them at once; shapes as of `rows` and `columns`.

    A tile of r rows and c columns takes the time of (r + edge)(c + edge) numbers, in units in which the largest takes
    its own; kernels have the size for which all are done first. The last wave also takes the share `idle` of what its
    SMs do not do. Neglected: that libraries sometimes choose a slower size.
    """
    across = [(wide, np.ceil(columns / wide)) for wide in TILE_COLUMNS]
    largest = tallest * WIDEST / ((tallest + edge) * (WIDEST + edge))
    worth: Num = np.inf
    for high in (rows_of_one for rows_of_one in TILE_ROWS if rows_of_one <= tallest):
        down = np.ceil(rows / high)
        for wide, beside in across:
            tiles = down * beside
            whole = np.ceil(tiles / units) * units if units else tiles
            worth = np.minimum(worth, (tiles + idle * (whole - tiles)) * ((high + edge) * (wide + edge) * largest))
    return worth


@dataclass(frozen=True, slots=True)
class Product:
    """The curve of a product of given columns and depth: FLOP/s at `rate`, on `units` SMs."""

    curve: GemmCurve
    columns: Num
    depth: Num
    rate: float
    units: int

    def seconds(self, rows: Num, moved: Num) -> Num:
        """launch + blend(blend(moved, computing), filling), for what moves in `moved` seconds at the curve's bandwidth.

        computing = c (1 + throttle c / (c + throttle_seconds)) with c = 2 (tiled + tail)(k + padding) / rate: the clock
        falls where matrix units are busy for long. filling = ramp k / (k + ramp_depth): a pipeline's steps along k wait
        for each other until the kernel splits it. From about `idle_depth` on, kernels split k between SMs that would
        idle in the last wave.
        """
        curve = self.curve
        idle = curve.idle / (1.0 + self.depth / curve.idle_depth)
        work = tiled(rows, self.columns, tallest=curve.tallest, edge=curve.edge, idle=idle, units=self.units)
        work = work + curve.tail * TAIL_TILE * self.units
        computing = 2.0 * work * (self.depth + curve.depth_padding) / self.rate
        computing = computing * (1.0 + curve.throttle * computing / (computing + curve.throttle_seconds))
        filling = curve.ramp * self.depth / (self.depth + curve.ramp_depth)
        return curve.launch + blended(blended(moved, computing, curve.sharpness), filling, curve.ramp_sharpness)


def plain_product(product: Product) -> PlainProduct:
    """`product.seconds` of plain numbers, where NumPy would take ten times as long."""
    curve, columns, depth, units = product.curve, float(product.columns), float(product.depth), product.units
    tallest, edge, rate = curve.tallest, curve.edge, product.rate
    idle = curve.idle / (1.0 + depth / curve.idle_depth)
    largest = tallest * WIDEST / ((tallest + edge) * (WIDEST + edge))
    shapes = [
        (high, ceil(columns / wide), (high + edge) * (wide + edge) * largest)
        for high in TILE_ROWS if high <= tallest for wide in TILE_COLUMNS
    ]  # fmt: skip
    tail, deep = curve.tail * TAIL_TILE * units, depth + curve.depth_padding
    throttle, throttle_seconds = curve.throttle, curve.throttle_seconds
    filling = curve.ramp * depth / (depth + curve.ramp_depth)
    launch, sharpness, ramp_sharpness = curve.launch, curve.sharpness, curve.ramp_sharpness

    def seconds(rows: float, moved: float) -> float:
        work = inf
        for high, beside, numbers in shapes:
            tiles = ceil(rows / high) * beside
            whole = ceil(tiles / units) * units if units else tiles
            worth = (tiles + idle * (whole - tiles)) * numbers
            work = worth if worth < work else work
        computing = 2.0 * (work + tail) * deep / rate
        computing *= 1.0 + throttle * computing / (computing + throttle_seconds)
        return launch + float(blended(blended(moved, computing, sharpness), filling, ramp_sharpness))

    return seconds


def product_of(op: Op, curve: GemmCurve, chip: Accelerator) -> Product:
    """The product that an operator is, with as many columns as its FLOPs say."""
    columns = op.flops / np.maximum(op.rows, 1e-9) / (2.0 * op.depth)
    return Product(curve, columns, op.depth, curve.compute * peak_flops(chip, op.dtype), chip.sm_count or 0)


def gemm_row(depth: Num, curve: GemmCurve, chip: Accelerator) -> Num:
    """Seconds per row outside the product: quantising the row, where the kernel's input must be."""
    if curve.quantise_bandwidth is None:
        return curve.row_seconds
    return curve.row_seconds + QUANTISED_BYTES * depth / (curve.quantise_bandwidth * chip.memory.read_bandwidth)


def gemm_seconds(op: Op, curve: GemmCurve, chip: Accelerator) -> Num:
    """Rows x what one costs outside the product, and the product itself."""
    memory = chip.memory
    moved = (op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth) / curve.bandwidth
    return op.rows * gemm_row(op.depth, curve, chip) + product_of(op, curve, chip).seconds(op.rows, moved)
