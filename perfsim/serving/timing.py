"""Clock arithmetic of runs of steps whose length is affine in the step index."""

from __future__ import annotations

from math import ceil, sqrt

# An arrival within a nanosecond after a step boundary is seen at that boundary, so that rounding of closed-form times
# cannot move it across: no clock in the system being modelled is finer.
TIME_EPS = 1e-9


def nanosecond(time: float) -> int:
    """The nearest nanosecond: times that differ by rounding alone are equal and can be ordered by something else."""
    return round(time / TIME_EPS)


def run_seconds(count: int, first: float, slope: float) -> float:
    """Length of `count` steps of which step i lasts first + i * slope."""
    return count * first + slope * (count * (count - 1) / 2)


def steps_until(target: float, *, now: float, first: float, slope: float, most: int) -> int:
    """The smallest number of steps, at least 1 and at most `most`, that do not end before `target`."""
    span = target - now
    if slope <= 0.0:
        count = ceil(span / first)
    else:  # count * first + slope * count * (count - 1) / 2 = span
        linear = first - slope / 2
        count = ceil((sqrt(linear * linear + 2 * slope * span) - linear) / slope)
    count = most if count > most else max(1, count)
    while count > 1 and now + run_seconds(count - 1, first, slope) >= target:
        count -= 1
    while count < most and now + run_seconds(count, first, slope) < target:
        count += 1
    return count
