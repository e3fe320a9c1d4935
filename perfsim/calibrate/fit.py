"""Robust fits of a curve to rows: relative errors, soft L1, standard errors that allow for rows of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from perfsim.calibrate.bounds import NUISANCE
from perfsim.calibrate.forms import Form, fit_range, form
from perfsim.calibrate.rows import Array, Rows
from perfsim.spec.hardware import Accelerator

SOFT = 0.05  # errors beyond 5% count linearly: a few odd kernel choices must not bend a curve
SAMPLE = 3000  # rows of one fit: more change nothing that the standard errors would not cover
SEED = 20260101
CLOSE, STEPS = 1e-6, 150  # a search ends when neither the errors nor a coefficient change by more than a millionth


@dataclass(frozen=True)
class Fitted:
    """Coefficients of one group of rows, and what they were fitted to."""

    form: Form
    rows: Rows
    values: dict[str, float]
    covariance: Array
    """Of the logarithms of `values`, in their order."""

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors of the coefficients that a curve keeps."""
        spread = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))  # rounding below zero at a bound
        pairs = zip(self.values.items(), spread, strict=True)
        return {name: float(value * error) for (name, value), error in pairs if name not in NUISANCE}


def fit(rows: Rows, chip: Accelerator, *, known: Mapping[str, float] | None = None) -> Fitted:
    """Coefficients for the rows that are not held out, within the range that the curve describes.

    What is `known` from elsewhere is not fitted.
    """
    chosen = sample(fit_range(rows.where(~rows.held_out())))
    shape = form(rows)
    if known:
        bounds = {name: value for name, value in shape.bounds.items() if name not in known}
        shape = replace(shape, bounds=bounds, fixed={**shape.fixed, **known})
    return fit_together([chosen], [chip], shape)


def fit_together(groups: list[Rows], chips: list[Accelerator], shape: Form) -> Fitted:
    """One set of coefficients for rows of several devices, each with its own datasheet; every row weighs the same.

    Minimises sum SOFT^2 rho((ln predicted - ln measured)^2 / SOFT^2), rho(z) = 2 (sqrt(1 + z) - 1), over logarithms of
    the coefficients. The covariance is the sandwich estimate clustered by shape, because rows of one shape share what
    the curve does not know. Coefficients at a bound have no error.
    """
    from scipy.optimize import least_squares

    names = list(shape.bounds)
    low, high = (np.log([shape.bounds[name][at] for name in names]) for at in (1, 2))
    measured = np.log(np.concatenate([group.seconds for group in groups]))

    def errors(logs: Array) -> Array:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        predicted = [shape.seconds(values, group, chip) for group, chip in zip(groups, chips, strict=True)]
        result: Array = np.log(np.concatenate(predicted)) - measured
        return result

    searches = [
        least_squares(
            errors, np.log([start[name] for name in names]), bounds=(low, high), loss="soft_l1", f_scale=SOFT,
            ftol=CLOSE, xtol=CLOSE, max_nfev=STEPS,
        )
        for start in shape.starts()
    ]  # fmt: skip
    found = min(searches, key=lambda search: float(search.cost))
    values = dict(zip(names, np.exp(found.x).tolist(), strict=True))
    clusters = np.concatenate([np.char.add(f"{group.device} ", group.shape) for group in groups])
    return Fitted(shape, groups[0], values, sandwich(found.jac, found.fun, clusters))


def sandwich(jacobian: Array, errors: Array, clusters: np.ndarray) -> Array:
    """H^-1 (sum over clusters of g g') H^-1, with g the gradients of a cluster's rows: Liang and Zeger's estimate.

    `jacobian` holds the derivatives of the errors scaled by the loss, as least_squares returns them.
    """
    weight = 1.0 / np.sqrt(1.0 + (errors / SOFT) ** 2)
    scaled = errors * np.sqrt(weight)
    names, place = np.unique(clusters, return_inverse=True)
    gradients = np.zeros((len(names), jacobian.shape[1]))
    np.add.at(gradients, place, jacobian * scaled[:, None])
    inverse = np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-10)
    result: Array = inverse @ (gradients.T @ gradients) @ inverse
    return result


def sample(rows: Rows, limit: int = SAMPLE) -> Rows:
    """At most `limit` rows, drawn with a fixed seed."""
    if len(rows) <= limit:
        return rows
    picked = np.random.Generator(np.random.PCG64(SEED)).choice(len(rows), limit, replace=False)
    return rows.where(np.sort(picked))
