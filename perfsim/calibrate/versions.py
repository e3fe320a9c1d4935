"""A curve of another engine version from few shapes: the packaged curve, moved as far as they can tell.

Kernels of two versions on one device are much alike, and a dozen shapes do not determine fifteen coefficients. So the
curve of the version that many shapes were timed of is the prior: coefficients differ from it by what it does not know
itself (its covariance) and by what versions differ in. The rows of the other version are the likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perfsim.calibrate.forms import Form, form
from perfsim.calibrate.rows import Array, Rows
from perfsim.spec.curves import GemmCurve
from perfsim.spec.hardware import Accelerator
from perfsim.spec.operators_file import FittedGemm

# Standard deviation of the logarithm of a coefficient between versions. On shapes left out of the fit, 0.03, 0.1 and
# 0.3 miss products of the RTX PRO 6000 by 3.9, 3.7 and 3.6% in the median and 10.3, 10.1 and 10.4% at p90.
BETWEEN_VERSIONS = 0.1
CLOSE, STEPS = 1e-6, 150
COLD = {"gain": 0.0, "share": 1.0}  # rows whose data come from HBM


@dataclass(frozen=True)
class Moved:
    """The coefficients of the version that was timed on few shapes, and what is known of them."""

    form: Form
    rows: Rows
    values: dict[str, float]
    covariance: Array
    """Of the logarithms of `values`, in their order."""

    def seconds(self, rows: Rows, chip: Accelerator) -> Array:
        """What the curve says about rows whose data come from HBM."""
        return self.form.seconds({**self.values, **COLD}, rows, chip)

    @property
    def stderr(self) -> dict[str, float]:
        """Standard errors of the coefficients."""
        spread = np.sqrt(np.maximum(np.diag(self.covariance), 0.0))
        return {name: float(value * error) for (name, value), error in zip(self.values.items(), spread, strict=True)}


def moved(rows: Rows, prior: FittedGemm, chip: Accelerator, *, between: float = BETWEEN_VERSIONS) -> Moved:
    """The most likely coefficients (MAP) for `rows`, which the prior has not seen.

    Minimises sum rho(z) + d' (S + between^2 I)^-1 d over d, the change of the logarithms, within the coefficients'
    bounds: z is a row's relative error over the prior's discrepancy, rho(z) = 2 (sqrt(1 + z^2) - 1), S the covariance
    of the prior. The covariance is the sandwich estimate with rows clustered by shape, and the prior's own share.
    """
    from scipy.optimize import least_squares

    names = list(prior.stderr)
    known = prior.curve.model_dump(exclude_none=True)
    shape = _fixed(form(rows), known, names)
    centre = np.log([known[name] for name in names])
    low, high = (np.log([form(rows).bounds[name][at] for name in names]) for at in (1, 2))
    whiten = _root(_covariance(prior) + between**2 * np.eye(len(names)))
    measured = np.log(rows.seconds)

    def row_errors(logs: Array) -> Array:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        z = (np.log(shape.seconds({**values, **COLD}, rows, chip)) - measured) / prior.discrepancy
        result: Array = z * np.sqrt(2.0 / (1.0 + np.sqrt(1.0 + z**2)))  # its square is rho
        return result

    start = np.clip(centre, low + CLOSE, high - CLOSE)
    found = least_squares(
        lambda logs: np.concatenate([row_errors(logs), whiten @ (logs - centre)]), start, bounds=(low, high),
        x_scale="jac", ftol=CLOSE, xtol=CLOSE, max_nfev=STEPS,
    )  # fmt: skip
    values = dict(zip(names, np.exp(found.x).tolist(), strict=True))
    return Moved(shape, rows, values, _posterior(found.jac, found.fun, rows.shape, whiten))


def one_shape_left_out(rows: Rows, prior: FittedGemm, chip: Accelerator) -> Array:
    """Relative errors of every row, predicted by the curve that was moved by all other shapes."""
    errors = np.empty(len(rows))
    for name in np.unique(rows.shape):
        out = rows.shape == name
        rest = moved(rows.where(~out), prior, chip)
        errors[out] = rest.seconds(rows.where(out), chip) / rows.seconds[out] - 1.0
    return errors


def prior_errors(rows: Rows, prior: FittedGemm, chip: Accelerator) -> Array:
    """Relative errors of the prior on rows of the other version, whose data come from HBM."""
    values = {**prior.curve.model_dump(exclude_none=True), **COLD}
    result: Array = form(rows).seconds(values, rows, chip) / rows.seconds - 1.0
    return result


def _fixed(shape: Form, known: dict[str, float], names: list[str]) -> Form:
    fields = GemmCurve.model_fields
    fixed = {name: value for name, value in known.items() if name in fields and name not in names}
    return Form(shape.kind, {name: shape.bounds[name] for name in names}, fixed)


def _covariance(prior: FittedGemm) -> Array:
    """The prior's covariance as a whole matrix; rounded in its file, so that it is made positive again."""
    size = len(prior.covariance)
    full = np.zeros((size, size))
    for row, values in enumerate(prior.covariance):
        full[row, : row + 1] = values
    full = full + np.tril(full, -1).T
    eigenvalues, vectors = np.linalg.eigh(full)
    result: Array = (vectors * np.maximum(eigenvalues, 0.0)) @ vectors.T
    return result


def _root(covariance: Array) -> Array:
    """W with W'W = covariance^-1."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    result: Array = (vectors / np.sqrt(eigenvalues)).T
    return result


def _posterior(jacobian: Array, errors: Array, clusters: np.ndarray, whiten: Array) -> Array:
    """H^-1 (sum over shapes of g g' + W'W) H^-1, with g the gradients of a shape's rows."""
    count = len(clusters)
    names, place = np.unique(clusters, return_inverse=True)
    gradients = np.zeros((len(names), jacobian.shape[1]))
    np.add.at(gradients, place, jacobian[:count] * errors[:count, None])
    inverse = np.linalg.pinv(jacobian.T @ jacobian)
    result: Array = inverse @ (gradients.T @ gradients + whiten.T @ whiten) @ inverse
    return result
