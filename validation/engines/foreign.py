"""Prints, and with --write stores, the laws that carry kernels to other makers' devices, as whole runs there show them.

    python -m validation.engines.foreign --data DIR [--write]

Two factors per software stack: on fixed times, one per version of the software, and on the share of memory bandwidth.
The simulator is run on a grid of both and interpolated in logarithms. Versions and loads weigh the same. Every version,
and every pair of prompt and output length, is left out once; rows beside those of `fitted` are predicted only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.base import FlopRate, Spec
from perfsim.spec.calibration_file import load_calibration
from perfsim.spec.engine_version import EngineVersion
from perfsim.spec.foreign_file import FOREIGN, carried
from perfsim.spec.load import CALIBRATION
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml
from validation.compare import facts
from validation.compare.ask import Ask, Progress, scenario_of, simulated
from validation.compare.inferencex import question_of
from validation.compare.table import Table, read_table
from validation.report.split import meeting

Floats = NDArray[np.float64]
FILE = Path(__file__).with_name("foreign.yaml")
LAUNCHES, BANDWIDTHS = (0.5, 1.0, 1.6, 2.6, 3.8), (1.0, 1.4, 2.0)  # grid; factors stay inside
SOFT = 0.1  # relative errors far beyond it stop to count


class Achieved(Spec):
    """A device and the share of its dense bf16 peak, or of the rate `of`, that its best product reaches."""

    name: str
    achieved: float = Field(gt=0, le=1)
    of: FlopRate | None = None

    @property
    def share(self) -> float:
        """Of the peak in the descriptor."""
        peak = float(catalog.accelerator(self.name).peak_flops["bf16"])
        return self.achieved * (peak if self.of is None else self.of) / peak


class Version(Spec):
    """Runs before the day `until` that no earlier version has; the engine's version, where an image tells it."""

    name: str
    until: str
    engine_version: EngineVersion | None = None


class Stack(Spec):
    """A software stack: where its runs are, and what is known of its devices."""

    table: str
    hardware: tuple[str, ...]
    engine: str
    source: str
    lender: Achieved
    devices: tuple[Achieved, ...]
    achieved_source: str
    versions: tuple[Version, ...] = Field(min_length=2)
    fitted: tuple[str, ...]

    def compute(self, name: str) -> float:
        """The factor on arithmetic of a device."""
        return next(device.share for device in self.devices if device.name == name) / self.lender.share


class Stacks(Spec):
    """All stacks that have runs."""

    stacks: dict[str, Stack]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Distinct runs: ln of the measured time per token, float64[n], and what each is, int or object[n].

    `asked` numbers `questions`, `version` those of the stack; `shape` is "prompt/output tokens"; `fitted` marks
    the rows that a fit may see.
    """

    questions: tuple[Ask, ...]
    devices: tuple[str, ...]
    measured: Floats
    asked: NDArray[np.intp]
    version: NDArray[np.intp]
    shape: NDArray[Any]
    fitted: NDArray[np.bool_]
    rows: tuple[dict[str, Any], ...]

    def weights(self) -> Floats:
        """Every version and question weighs the same, however often it was run; they sum to the number of pairs."""
        key = self.version * len(self.questions) + self.asked
        _, place, count = np.unique(key, return_inverse=True, return_counts=True)
        result: Floats = 1.0 / count[place]
        return result


@dataclass(frozen=True, slots=True)
class Law:
    """ln of the factor on bandwidth, and on fixed times of each version, float64[versions]; NaN: it has no rows."""

    bandwidth: float
    versions: Floats

    @property
    def launch(self) -> float:
        """What stands for a version that is not known."""
        return float(np.nanmean(self.versions))


class Surface:
    """ln of the time per token of every question, over ln of both factors: splines through simulations on the grid."""

    def __init__(self, values: Floats) -> None:
        """`values` is float64[questions, launches, bandwidths]."""
        from scipy.interpolate import RectBivariateSpline

        x, y = np.log(LAUNCHES), np.log(BANDWIDTHS)
        self._splines = [RectBivariateSpline(x, y, each, kx=3, ky=2) for each in values]

    def __call__(self, asked: NDArray[np.intp], launch: Floats, bandwidth: float) -> Floats:
        return np.array([self._splines[at](x, bandwidth)[0, 0] for at, x in zip(asked, launch, strict=True)])


def read(stack: Stack, data: Path) -> Sweep:
    """The runs of a stack in the tables of `data`/serving."""
    table = read_table(data / "serving" / f"{stack.table}.parquet")
    own = np.isin(table.texts("hardware").astype(str), stack.hardware)
    fitted = np.zeros(len(table), dtype=bool)
    fitted[meeting(table, stack.fitted)] = True
    return _sweep(stack, table, np.flatnonzero(own), fitted)


def _sweep(stack: Stack, table: Table, own: NDArray[np.intp], fitted: NDArray[np.bool_]) -> Sweep:
    everything = table.rows()
    seen: dict[str, int] = {}
    for index in own.tolist():
        row = everything[index]
        key = [row[name] for name in ("hardware", "isl", "osl", "conc", "date", "median_tpot")]
        seen.setdefault(json.dumps(key, default=str), index)  # the latest runs are in the history as well
    chosen = list(seen.values())
    rows = [everything[index] for index in chosen]
    asks = [question_of({**row, "image": None}) for row in rows]  # versions are told apart here
    questions = tuple(dict.fromkeys(asks))
    devices = {ask: facts.device(row["hardware"]) for ask, row in zip(asks, rows, strict=True)}
    return Sweep(
        questions, tuple(devices[ask] for ask in questions),
        np.log([row["median_tpot"] for row in rows]),
        np.array([questions.index(ask) for ask in asks]),
        np.array([_version(stack, str(row["date"])) for row in rows]),
        np.array([f"{row['isl']}/{row['osl']}" for row in rows]),
        fitted[chosen], tuple(rows),
    )  # fmt: skip


def _version(stack: Stack, date: str) -> int:
    for place, version in enumerate(stack.versions):
        if date < version.until:
            return place
    raise InputError(f"a run of {date} is later than the versions in {FILE.name}")


def surface(stack: Stack, sweep: Sweep) -> Surface:
    """Every question simulated on the grid of factors."""
    values = np.zeros((len(sweep.questions), len(LAUNCHES), len(BANDWIDTHS)))
    progress = Progress(values.size)
    for place in np.ndindex(values.shape):
        launch, bandwidth = LAUNCHES[place[1]], BANDWIDTHS[place[2]]
        values[place] = np.log(seconds(stack, sweep, place[0], launch=launch, bandwidth=bandwidth))
        progress.step()
    return Surface(values)


def seconds(stack: Stack, sweep: Sweep, asked: int, *, launch: float, bandwidth: float) -> float:
    """The median time per token of a question under these factors."""
    scenario, name = scenario_of(sweep.questions[asked]), sweep.devices[asked]
    folder = catalog.data_directories()[0] / "hardware" / "calibration"
    lent = load_calibration(folder / f"{CALIBRATION}.yaml", accelerator=name, engine=stack.engine, foreign=False)
    device = carried(lent.device, launch=launch, bandwidth=bandwidth, compute=stack.compute(name))
    changed = scenario.model_copy(update={"calibration": lent.model_copy(update={"device": device})})
    return float(simulated(sweep.questions[asked], changed, bands=False).metrics["tpot"]["p50"])


def solve(sweep: Sweep, at: Surface, keep: NDArray[np.bool_]) -> Law:
    """The factors that fit the rows `keep` best: soft-L1 on logarithms, each version with its own fixed times."""
    from scipy.optimize import least_squares

    weight = np.sqrt(sweep.weights()[keep])
    present, place = np.unique(sweep.version[keep], return_inverse=True)

    def errors(x: Floats) -> Floats:
        found: Floats = weight * (at(sweep.asked[keep], x[1:][place], float(x[0])) - sweep.measured[keep])
        return found

    low = np.log([BANDWIDTHS[0], *[LAUNCHES[0]] * len(present)])
    high = np.log([BANDWIDTHS[-1], *[LAUNCHES[-1]] * len(present)])
    x = least_squares(errors, np.full(1 + len(present), 0.3), bounds=(low, high), loss="soft_l1", f_scale=SOFT).x
    versions = np.full(int(sweep.version.max()) + 1, np.nan)
    versions[present] = x[1:]
    return Law(float(x[0]), versions)


def missed(sweep: Sweep, at: Surface, law: Law, *, own: bool = False) -> Floats:
    """ln(predicted / measured), float64[n], at the mean of versions or (`own`) at that of each row's version."""
    launch = law.versions[sweep.version] if own else np.full(len(sweep.measured), law.launch)
    found: Floats = at(sweep.asked, np.where(np.isnan(launch), law.launch, launch), law.bandwidth) - sweep.measured
    return found


def left_out(sweep: Sweep, at: Surface, groups: NDArray[Any], *, own: bool = False) -> tuple[Floats, list[Law]]:
    """As `missed`, of every group by the law without it; those laws.

    NaN on rows that are not fitted and, where `own` is asked for, on those whose version has no others.
    """
    found, laws = np.full(len(sweep.measured), np.nan), []
    for group in np.unique(groups[sweep.fitted]):
        out = sweep.fitted & (groups == group)
        laws.append(solve(sweep, at, sweep.fitted & ~out))
        known = ~np.isnan(laws[-1].versions[sweep.version]) | (not own)
        found[out & known] = missed(sweep, at, laws[-1], own=own)[out & known]
    return found, laws


def jackknife(laws: Sequence[Law]) -> Floats:
    """Covariance of ln of the factors on fixed times and bandwidth, from the laws without one version each."""
    values = np.array([(law.launch, law.bandwidth) for law in laws])
    apart = values - values.mean(axis=0)
    result: Floats = (len(values) - 1) / len(values) * (apart.T @ apart)
    return result


@dataclass(frozen=True, slots=True)
class Found:
    """The law of a stack, and ln(predicted / measured) of its rows, at the mean of versions or at their own."""

    law: Law
    covariance: Floats
    errors: dict[str, Floats]

    def between(self) -> float:
        """Standard deviation over versions of ln of the factor on fixed times."""
        return float(np.nanstd(self.law.versions, ddof=1))


def fit(sweep: Sweep, at: Surface) -> Found:
    """The law of the fitted rows, with what it misses there, left out, and on rows that no fit has seen."""
    law = solve(sweep, at, sweep.fitted)
    without_version, laws = left_out(sweep, at, sweep.version)
    without_shape, _ = left_out(sweep, at, sweep.shape)
    own_without_shape, _ = left_out(sweep, at, sweep.shape, own=True)
    everywhere = missed(sweep, at, law)
    errors = {
        "fitted": np.where(sweep.fitted, everywhere, np.nan),
        "version": without_version, "lengths": without_shape, "lengths_own_version": own_without_shape,
        "kept_out": np.where(sweep.fitted, np.nan, everywhere),
        "kept_out_own_version": np.where(sweep.fitted, np.nan, missed(sweep, at, law, own=True)),
    }  # fmt: skip
    return Found(law, jackknife(laws), errors)


def summary(sweep: Sweep, errors: Floats) -> tuple[int, float, float]:
    """(rows, median, mean) of absolute relative errors; versions and loads weigh the same."""
    kept = np.isfinite(errors)
    size, weight = np.abs(np.expm1(errors[kept])), sweep.weights()[kept]
    order = np.argsort(size)
    share = (np.cumsum(weight[order]) - 0.5 * weight[order]) / weight.sum()
    return int(kept.sum()), float(np.interp(0.5, share, size[order])), float(np.average(size, weights=weight))


def rms(sweep: Sweep, errors: Floats) -> float:
    """Root mean square, every version and load weighing the same."""
    kept = np.isfinite(errors)
    return float(np.sqrt(np.average(errors[kept] ** 2, weights=sweep.weights()[kept])))


def document(name: str, stack: Stack, sweep: Sweep, found: Found) -> Iterator[str]:
    """The lines of one stack in the file of coefficients."""
    spread = np.sqrt(np.diag(found.covariance))
    used = [row for row, kept in zip(sweep.rows, sweep.fitted, strict=True) if kept]
    yield f"  {name}:"
    yield f"    lender: {stack.lender.name}"
    yield f"    engine: {stack.engine}"
    yield f"    measured: [{', '.join(sorted(set(sweep.devices)))}]"
    yield "    devices:"
    for device in stack.devices:
        source = f"{device.share:.3f} / {stack.lender.share:.3f}: {stack.achieved_source}"
        yield f'      {device.name}: {{compute: {stack.compute(device.name):.4f}, source: "{source}"}}'
    yield f"    launch: {{value: {np.exp(found.law.launch):.4f}, stderr: {spread[0]:.4f}}}"
    yield f"    bandwidth: {{value: {np.exp(found.law.bandwidth):.4f}, stderr: {spread[1]:.4f}}}"
    covariance = found.covariance
    yield f"    covariance: [[{covariance[0, 0]:.3g}], [{covariance[1, 0]:.3g}, {covariance[1, 1]:.3g}]]"
    yield "    versions:"
    for version, value in zip(stack.versions, found.law.versions, strict=True):
        known = f', engine_version: "{version.engine_version}"' if version.engine_version else ""
        yield f'      "{version.name}": {{launch: {np.exp(value):.4f}{known}}}'
    yield f"    between: {found.between():.4f}"
    yield f"    discrepancy: {rms(sweep, found.errors['version']):.4f}"
    yield f"    own_discrepancy: {rms(sweep, found.errors['lengths_own_version']):.4f}"
    yield f'    source: "{stack.source}, {", ".join(stack.fitted)}"'
    yield f"    rows: {len(used)}"
    yield f"    sha256: {_hash(used)}"
    spans = {key: (min(row[key] for row in used), max(row[key] for row in used)) for key in ("isl", "osl", "conc")}
    yield f"    range: {{{', '.join(f'{key}: [{low}, {high}]' for key, (low, high) in spans.items())}}}"
    cells = {key: _missed(sweep, errors) for key, errors in found.errors.items()}
    yield f"    fitted: {cells['fitted']}"
    yield "    left_out:"
    yield from (f"      {key}: {cells[key]}" for key in ("version", "lengths", "lengths_own_version"))
    yield f"    kept_out: {cells['kept_out']}"


def _missed(sweep: Sweep, errors: Floats) -> str:
    rows, median, mean = summary(sweep, errors)
    return f"{{rows: {rows}, median: {median:.4f}, mean: {mean:.4f}}}"


def _hash(rows: Sequence[dict[str, Any]]) -> str:
    digests = [hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest() for row in rows]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def text(stack: Stack, sweep: Sweep, at: Surface, found: Found) -> Iterator[str]:
    """What was found, for a terminal: signed errors by version and lengths, and how far the interpolation is off."""
    yield f"{'errors of the time per token':24}{'rows':>6}{'median':>9}{'mean':>9}"
    for key, errors in found.errors.items():
        rows, median, mean = summary(sweep, errors)
        yield f"{key:24}{rows:>6}{median:>9.1%}{mean:>9.1%}"
    for place, version in enumerate(stack.versions):
        for shape in np.unique(sweep.shape):
            rows = (sweep.version == place) & (sweep.shape == shape)
            if rows.any():
                signed = [np.mean(missed(sweep, at, found.law, own=own)[rows]) for own in (False, True)]
                yield f"{version.name:40} {shape:10} mean of versions {signed[0]:+.3f}, its own {signed[1]:+.3f}"
    factors = {"launch": float(np.exp(found.law.launch)), "bandwidth": float(np.exp(found.law.bandwidth))}
    numbers = np.arange(len(sweep.questions))
    direct = np.log([seconds(stack, sweep, number, **factors) for number in numbers])
    apart = at(numbers, np.full(len(numbers), found.law.launch), found.law.bandwidth) - direct
    yield f"interpolated time per token is off by {np.abs(apart).max():.2%} at most"


def main(arguments: Sequence[str] | None = None) -> int:
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m validation.engines.foreign", description=title)
    parser.add_argument("--data", type=Path, required=True, help="folder whose serving/ holds the measured tables")
    parser.add_argument("--write", action="store_true", help=f"write hardware/calibration/{FOREIGN}")
    options = parser.parse_args(arguments)
    lines = [
        "# Laws that carry curves to other makers' devices; do not edit: `python -m validation.engines.foreign --data",
        "# DIR --write` writes this file, from the facts in validation/engines/foreign.yaml. Runs of one device only",
        "# were at hand, so no device could be left out; kept_out are rows of prompt lengths that were not fitted.",
        "stacks:",
    ]
    for name, stack in validated(Stacks, load_yaml(FILE), where=FILE.name).stacks.items():
        try:
            sweep = read(stack, options.data)
        except InputError as error:
            print(f"--data: {str(error).removeprefix('--table: ')}", file=sys.stderr)
            return 2
        at = surface(stack, sweep)
        found = fit(sweep, at)
        print("\n".join(text(stack, sweep, at, found)))
        lines += document(name, stack, sweep, found)
    print("\n".join(lines))
    if options.write:
        path = catalog.data_directories()[0] / "hardware" / "calibration" / FOREIGN
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
