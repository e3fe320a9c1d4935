"""Products on fitted curves: tiles in waves never beat the matrix units, and no side that grows makes one faster."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfsim.cost.products import Product, plain_product, tiled
from perfsim.spec.curves import GemmCurve

sides = st.integers(1, 10**6)
shares = st.floats(0, 1)
curves = st.builds(
    GemmCurve, launch=st.floats(0, 1e-5), ramp=st.floats(0, 1e-4), ramp_depth=st.floats(1, 2e4),
    ramp_sharpness=st.floats(1, 12), bandwidth=st.just(1.0), compute=st.just(1.0), depth_padding=st.floats(0, 4000),
    edge=st.floats(0, 2000), tallest=st.sampled_from([128.0, 256.0]), idle=shares, idle_depth=st.floats(1, 1e6),
    tail=shares, throttle=st.floats(0, 2), throttle_seconds=st.floats(1e-7, 1), sharpness=st.floats(1, 12),
)  # fmt: skip


@given(sides, sides, st.floats(0, 2000), st.sampled_from([128.0, 256.0]), shares, st.sampled_from([0, 108, 188]))
def test_tiles_are_worth_at_least_what_they_hold(
    rows: int, columns: int, edge: float, tallest: float, idle: float, units: int
) -> None:
    worth = tiled(rows, columns, tallest=tallest, edge=edge, idle=idle, units=units)
    assert worth >= rows * columns * (1 - 1e-12)


def test_a_whole_wave_of_the_largest_tiles_loses_nothing() -> None:
    assert tiled(256.0, 128.0 * 132, tallest=256.0, edge=500.0, idle=1.0, units=132) == pytest.approx(256 * 128 * 132)
    one_more = tiled(257.0, 128.0 * 132, tallest=256.0, edge=1e9, idle=1.0, units=132)
    assert one_more == pytest.approx(2 * 256 * 128 * 132)  # of the same edges, every tile takes as long as the largest


@given(curves, sides, sides, sides, st.integers(0, 10**6), st.integers(0, 2), st.floats(0, 1e-2))
def test_no_side_that_grows_makes_a_product_faster_nor_faster_than_light(
    curve: GemmCurve, rows: int, columns: int, depth: int, more: int, which: int, moved: float
) -> None:
    def seconds(m: float, n: float, k: float) -> float:
        return float(Product(curve, n, k, 1e15, 132).seconds(m, moved))

    small, large = [float(rows), float(columns), float(depth)], [float(rows), float(columns), float(depth)]
    large[which] += more
    took = seconds(*small)
    assert took >= max(2.0 * rows * columns * depth / 1e15, moved) * (1 - 1e-12)
    assert seconds(*large) >= took * (1 - 1e-12)


def test_a_table_and_its_rows_one_by_one_agree() -> None:
    curve = GemmCurve(launch=2e-6, ramp=5e-6, ramp_depth=3e3, ramp_sharpness=1.5, bandwidth=0.8, compute=0.8, edge=20.0,
                      idle=0.7, idle_depth=2e3, throttle=0.2, sharpness=3.0)  # fmt: skip
    m, n, k = np.array([1.0, 300.0, 4096.0]), np.array([512.0, 4096.0, 7168.0]), np.array([4096.0, 256.0, 2048.0])
    table = Product(curve, n, k, 8e14, 132).seconds(m, 1e-6)
    alone = [Product(curve, n[at], k[at], 8e14, 132).seconds(m[at], 1e-6) for at in range(3)]
    np.testing.assert_allclose(table, alone, rtol=1e-13)


@given(curves, sides, sides, sides, st.sampled_from([0, 132]), st.floats(1e-9, 1e-2))
def test_plain_numbers_give_what_arrays_do(
    curve: GemmCurve, rows: int, columns: int, depth: int, units: int, moved: float
) -> None:
    product = Product(curve, float(columns), float(depth), 1e15, units)
    assert plain_product(product)(rows, moved) == pytest.approx(float(product.seconds(float(rows), moved)), rel=1e-12)
