"""What a host needs to launch one kernel: prints, and with --write stores, what measured steps without CUDA graphs say.

A host launches every kernel of a step and runs ahead of the GPU, so that a step lasts as long as the longer of the two.
Two kinds of measurements are held against each other, medians of repetitions (`measured/launches.csv`):

- `all_reduce`: eager all-reduces of at most 64 KiB, which last as long as their launch: seconds c of one device's host.
- `token`: decode steps of Splitwise's profile, batches of at most 16. Its engine is of 2023 and not named; from four
  GPUs on its steps follow neither the number of GPUs nor the batch: that they are launched without CUDA graphs is
  inferred from this, not published.

    token = step + sequence * batch + max(kernels as perfsim prices them, launches * ratio * c)

Fitted are the ratio, one for all devices, and that engine's own host time per step and sequence, which no other engine
is given. A launch is a kernel or collective that perfsim lowers; engines launch more and smaller ones (copies,
residual additions), whose time is in the ratio. Each device gets ratio * c, another one their geometric mean.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from perfsim.cost.launches import kernels_launched
from perfsim.cost.step import gpu_parts
from perfsim.errors import InputError
from perfsim.ops.step import StepShape
from perfsim.spec import catalog
from perfsim.spec.launches_file import LAUNCHES
from perfsim.spec.load import find_calibration
from perfsim.spec.policy import ServingPolicy
from validation.collectives.rows import NODES
from validation.compare.table import read_table

Floats = NDArray[np.float64]

SLICE = Path(__file__).resolve().parents[1] / "measured" / "launches.csv"
COLUMNS = ("kind", "device", "gpus", "batch", "context", "what", "rows", "seconds")
SOURCE = (
    "Splitwise's profile of Llama-2-70B (Mutinifni/splitwise-sim@8f99e7d, MIT, engine not named); eager all-reduces of"
    " vLLM 0.14 to 0.24 and SGLang 0.5.9 to 0.5.14 (ai-dynamo/aiconfigurator@095f58a, Apache-2.0)"
)
HEADER = (
    "# Seconds in which a host launches one kernel, where no CUDA graph does; do not edit: `python -m",
    "# validation.engines.launches --write` writes this file from validation/measured/launches.csv. `ratio` is that of",
    "# a launch in a decode step to an eager all-reduce, `of_that_engine` what the profiled engine of 2023 adds to a",
    "# step and per sequence, which no other engine is given. `mean` is for devices without an eager all-reduce.",
)
MODEL = "llama-2-70b"
SPLITWISE = {"a100-80gb": "dgx-a100", "h100-80gb": "dgx-h100"}
SMALL = 65536  # bytes of an all-reduce
LARGEST_BATCH = 16  # beyond it attention of that time grows faster than what is fitted to newer kernels
SOFT = 0.1  # relative errors far beyond it stop to count
UNIT = np.array([1.0, 1e-3, 1e-4])  # of the ratio, a step's and a sequence's seconds
PLAIN = ServingPolicy(sampling="plain")


@dataclass(frozen=True, slots=True)
class Row:
    """The median `seconds` of `rows` measurements; `what` is the engine of an exchange, the prompt of a step."""

    kind: str
    device: str
    gpus: int
    batch: int
    context: float
    what: str
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Steps:
    """Measured decode steps: seconds, batch, kernels' seconds and launches, float64[n]; device and its GPUs, str[n]."""

    measured: Floats
    batch: Floats
    kernels: Floats
    launches: Floats
    device: NDArray[np.str_]
    group: NDArray[np.str_]


@dataclass(frozen=True, slots=True)
class Fit:
    """(ratio, seconds of a step, of a sequence) with their covariance, and relative errors float64[n] of the steps.

    `left_out` are errors of each device's steps as the others alone predict them.
    """

    values: Floats
    covariance: Floats
    errors: Floats
    left_out: Floats


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m validation.engines.launches", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help=f"folder of the whole tables: writes measured/{SLICE.name} anew")
    parser.add_argument("--write", action="store_true", help=f"write hardware/calibration/{LAUNCHES}")
    options = parser.parse_args(arguments)
    if options.data is not None:
        try:
            write_slice(_cut(options.data), SLICE)
        except InputError as error:
            print(f"--data: {str(error).removeprefix('--table: ')}", file=sys.stderr)
            return 2
    rows = read_slice(SLICE)
    launch, steps = launch_seconds(rows), steps_of(rows)
    found = fit(steps, launch)
    print("\n".join(_table(rows, steps, launch, found)))
    if options.write:
        path = catalog.data_directories()[0] / "hardware" / "calibration" / LAUNCHES
        path.write_text("\n".join(document(rows, steps, launch, found)) + "\n", encoding="utf-8")
    return 0


def _cut(data: Path) -> list[Row]:
    """Medians of repetitions in the whole tables."""
    found: dict[tuple[str, str, int, int, float, str], list[float]] = {}
    for row in read_table(data / "serving" / "splitwise_perf_model.parquet").rows():
        node = SPLITWISE.get(row["hardware"])
        if node and row["model"] == "llama2-70b" and row["batch_size"] <= LARGEST_BATCH:
            context = row["prompt_size"] + row["token_size"] / 2.0
            key = ("token", catalog.node(node).accelerator.name, row["tensor_parallel"], row["batch_size"], context,
                   f"prompt of {row['prompt_size']}")  # fmt: skip
            found.setdefault(key, []).append(1e-3 * row["token_ms"])
    for row in read_table(data / "ops" / "collectives.parquet").rows():
        node = NODES.get(row["system"])
        eager = str(row["impl"]).endswith("_eager") and row["op_name"] in ("all_reduce", "allreduce")
        if node and eager and row["bytes"] <= SMALL:
            key = ("all_reduce", catalog.node(node).accelerator.name, row["num_gpus"], 0, 0.0,
                   f"{row['impl']} {row['version']}")  # fmt: skip
            found.setdefault(key, []).append(1e-6 * row["latency_us"])
    return [Row(*key, len(values), median(values)) for key, values in sorted(found.items())]


def write_slice(rows: Iterable[Row], path: Path) -> None:
    """The rows as CSV, seconds to four digits."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for row in rows:
            out.writerow([*(getattr(row, name) for name in COLUMNS[:-1]), f"{row.seconds:.4g}"])


def read_slice(path: Path) -> list[Row]:
    """The rows of `write_slice`."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(row["kind"], row["device"], int(row["gpus"]), int(row["batch"]), float(row["context"]),
                    row["what"], int(row["rows"]), float(row["seconds"]))
                for row in csv.DictReader(file)]  # fmt: skip


def launch_seconds(rows: Iterable[Row]) -> dict[str, Floats]:
    """Seconds of one eager all-reduce by device: one value per engine, version and number of GPUs."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.kind == "all_reduce":
            found.setdefault(row.device, []).append(row.seconds)
    return {device: np.array(values) for device, values in sorted(found.items())}


def steps_of(rows: Iterable[Row]) -> Steps:
    """The decode steps, with the kernels' time as perfsim prices it for vLLM and how many there are."""
    model, nodes = catalog.model(MODEL), {catalog.node(node).accelerator.name: node for node in SPLITWISE.values()}
    columns = []
    for row in rows:
        if row.kind != "token":
            continue
        node = catalog.node(nodes[row.device])
        calibration = find_calibration(accelerator=row.device, engine="vllm")
        batch = float(row.batch)
        shape = StepShape(batch, batch, batch, (batch * row.context,), 0.0, (0.0,), (0.0,))
        kernels = sum(
            float(part.seconds)
            for part in gpu_parts(shape, model=model, node=node, tp=row.gpus, calibration=calibration, policy=PLAIN)
        )
        count = kernels_launched(model, calibration.engine, tp=row.gpus, policy=PLAIN)
        columns.append((row.seconds, batch, kernels, float(count), row.device, f"{row.device} tp {row.gpus}"))
    measured, batches, kernel, launches, device, group = zip(*columns, strict=True)
    numbers = [np.array(column, dtype=np.float64) for column in (measured, batches, kernel, launches)]
    return Steps(*numbers, np.array(device), np.array(group))


def fit(steps: Steps, launch: dict[str, Floats]) -> Fit:
    """A robust fit of relative errors in which every device with its number of GPUs weighs the same.

    The covariance is the sandwich estimate clustered by these groups.
    """
    seconds = np.array([np.median(launch[device]) for device in steps.device])
    everything = np.full(len(steps.measured), True)
    values = _solve(steps, seconds, everything)
    left_out = np.full(len(steps.measured), np.nan)
    for device in np.unique(steps.device):
        own = steps.device == device
        left_out[own] = _errors(steps, seconds, _solve(steps, seconds, ~own))[own]
    return Fit(values, _covariance(steps, seconds, values), _errors(steps, seconds, values), left_out)


def _errors(steps: Steps, launch: Floats, values: Floats) -> Floats:
    ratio, step, sequence = values
    said = step + sequence * steps.batch + np.maximum(steps.kernels, steps.launches * ratio * launch)
    found: Floats = said / steps.measured - 1.0
    return found


def _weights(steps: Steps) -> Floats:
    _, place, count = np.unique(steps.group, return_inverse=True, return_counts=True)
    found: Floats = 1.0 / np.sqrt(count[place])
    return found


def _solve(steps: Steps, launch: Floats, keep: NDArray[np.bool_]) -> Floats:
    from scipy.optimize import least_squares

    weight = _weights(steps)

    def errors(scaled: Floats) -> Floats:
        found: Floats = (weight * _errors(steps, launch, scaled * UNIT))[keep]
        return found

    found = least_squares(errors, np.array([1.0, 5.0, 1.0]), bounds=(0.0, np.inf), loss="cauchy", f_scale=SOFT)
    result: Floats = found.x * UNIT
    return result


def _covariance(steps: Steps, launch: Floats, values: Floats) -> Floats:
    weight = _weights(steps)
    errors = weight * _errors(steps, launch, values)
    robust = (1.0 + (errors / SOFT) ** 2) ** -0.5  # of Cauchy's loss
    moved = np.eye(3) * UNIT * 1e-4
    slope = np.stack([(_errors(steps, launch, values + move) - _errors(steps, launch, values - move)) / 2e-4
                      for move in moved], axis=1)  # fmt: skip
    jacobian = (weight * robust)[:, None] * slope
    _, place = np.unique(steps.group, return_inverse=True)
    gradients = np.zeros((place.max() + 1, 3))
    np.add.at(gradients, place, jacobian * (robust * errors)[:, None])
    inverse = np.linalg.pinv(jacobian.T @ jacobian)
    result: Floats = inverse @ (gradients.T @ gradients) @ inverse * np.outer(UNIT, UNIT)
    return result


def _of_devices(launch: dict[str, Floats], found: Fit) -> dict[str, tuple[float, float]]:
    """(seconds per launch, standard error) by device: of the ratio, and of the median over engines and versions."""
    ratio, spread = float(found.values[0]), float(found.covariance[0, 0]) ** 0.5
    result = {}
    for device, values in launch.items():
        middle = float(np.median(values))
        own = 1.2533 * float(np.std(np.log(values), ddof=1)) / len(values) ** 0.5  # of a median
        result[device] = ratio * middle, ratio * middle * float(np.hypot(spread / ratio, own))
    return result


def _mean(devices: dict[str, tuple[float, float]]) -> tuple[float, float, float]:
    """(geometric mean over devices, its standard error, standard deviation of the logarithm over devices)."""
    logs = np.log([value for value, _ in devices.values()])
    middle, sigma = float(np.exp(logs.mean())), float(logs.std(ddof=1))
    return middle, middle * sigma / len(logs) ** 0.5, sigma


def _table(rows: Sequence[Row], steps: Steps, launch: dict[str, Floats], found: Fit) -> Iterator[str]:
    spread = np.sqrt(np.diag(found.covariance))
    for name, value, error in zip(("ratio", "step_s", "sequence_s"), found.values, spread, strict=True):
        yield f"{name:12} {value:10.4g} +- {error:.2g}"
    yield ""
    for device, (value, error) in _of_devices(launch, found).items():
        yield f"{device:28} {1e6 * value:6.1f} +- {1e6 * error:.1f} us per launch"
    middle, error, sigma = _mean(_of_devices(launch, found))
    yield f"{'another device':28} {1e6 * middle:6.1f} +- {1e6 * error:.1f} us, x/ {np.exp(sigma):.2f} over devices"
    yield ""
    yield f"{'steps of':28} rows kernels ms launches measured ms   error left out"
    for group in np.unique(steps.group):
        own = steps.group == group
        columns = 1e3 * steps.kernels, steps.launches, 1e3 * steps.measured, found.errors, found.left_out
        middles = [float(np.median(column[own])) for column in columns]
        yield "{:28} {:4d} {:10.1f} {:8.0f} {:11.1f} {:+7.3f} {:+8.3f}".format(group, int(own.sum()), *middles)


def document(rows: Sequence[Row], steps: Steps, launch: dict[str, Floats], found: Fit) -> Iterator[str]:
    """The file of coefficients; errors are those of the decode steps."""
    spread = np.sqrt(np.diag(found.covariance))
    devices = _of_devices(launch, found)
    middle, error, sigma = _mean(devices)
    text = "".join(f"{row.kind} {row.device} {row.gpus} {row.batch} {row.context} {row.what} {row.seconds:.4g}\n"
                   for row in rows)  # fmt: skip
    yield from HEADER
    yield f'source: "{SOURCE}"'
    yield f"ratio: {{value: {found.values[0]:.4g}, stderr: {spread[0]:.3g}}}"
    yield "of_that_engine:"
    yield f"  step: {{value: {found.values[1]:.4g}, stderr: {spread[1]:.3g}}}"
    yield f"  sequence: {{value: {found.values[2]:.4g}, stderr: {spread[2]:.3g}}}"
    yield f"mean: {{value: {middle:.4g}, stderr: {error:.3g}}}"
    yield "devices:"
    for device, (value, own) in devices.items():
        yield f"  {device}: {{value: {value:.4g}, stderr: {own:.3g}}}"
    yield f"spread: {sigma:.3g}"
    yield f"rows: {len(rows)}"
    yield f"sha256: {hashlib.sha256(text.encode()).hexdigest()}"
    tokens = [row for row in rows if row.kind == "token"]
    yield (f"range: {{batch: [1, {LARGEST_BATCH}], tp_size: [{min(row.gpus for row in tokens)}, "
           f"{max(row.gpus for row in tokens)}], launches: [{steps.launches.min():.0f}, {steps.launches.max():.0f}], "
           f"bytes: [0, {SMALL}]}}")  # fmt: skip
    yield f"median: {np.median(np.abs(found.errors)):.4f}"
    yield f"left_out_median: {np.median(np.abs(found.left_out)):.4f}"


if __name__ == "__main__":
    sys.exit(main())
